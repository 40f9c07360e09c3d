"""TimeSformer: an image transformer over the patches of all frames, with attention divided between time and space.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; h, w of the patches' grid.
Comes in: normalised clips. Goes out: tokens after the last norm: the class token and then every patch of every frame, with time
fastest; with `attention=space_only`, class token and patches frame by frame (the authors average frames before their classifier).
Source: Bertasius et al. 2021 (arXiv:2102.05095), table 1: 121.4 M parameters with divided attention, 85.9 M with joint and with
space-only attention, classifier of Something-Something V2 included; table 2: 0.59 TFLOPs for 3 views of 8 x 224 x 224. Model by
transformers (`TimesformerModel`), weights of divided attention by the authors on the Hugging Face hub
(`facebook/timesformer-base-finetuned-*`), under CC-BY-NC 4.0. Normalisation is that of the authors' code (0.45, 0.225).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import TimesformerConfig, TimesformerModel

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, kept_blocks
from vidfuse.models.layers import drop_rates, frame_positions, grid_positions, without
from vidfuse.models.parts import Branches, Tokens

Attention = Literal["divided", "joint", "space_only"]
TYPES = {"divided": "divided_space_time", "joint": "joint_space_time", "space_only": "space_only"}
PUBLISHED = {"kinetics": "facebook/timesformer-base-finetuned-k400", "ssv2": "facebook/timesformer-base-finetuned-ssv2"}
PATCH, BLOCKS = 16, 12
TIMES, PLACES = "timesformer.embeddings.time_embeddings", "timesformer.embeddings.position_embeddings"
LICENCE = (
    "TimeSformer weights are under CC-BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/): "
    "no commercial use, of a model that holds them either"
)


class TimeSformer(nn.Module):
    """transformers' model without classifier, under the names of the hub's files.

    Args:
        timesformer: The model.
        later: Blocks of a published file that come after the model's and are not used.
    """

    mean, std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
    licence = LICENCE

    def __init__(self, timesformer: TimesformerModel, *, later: Sequence[int] = ()) -> None:
        super().__init__()
        self.timesformer = timesformer
        self.width: int = timesformer.config.hidden_size
        self._later = tuple(f"timesformer.encoder.layer.{number}." for number in later)
        self._by_frame = timesformer.config.attention_type == "space_only"

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        return tuple(self.timesformer.encoder.layer)

    @property
    def branches(self) -> Sequence[Branches]:
        """Attentions and feed-forward part of each block; divided attention is two, over time and over the frame."""
        layers = cast(Sequence[Any], self.blocks)
        names = [name for name in ("temporal_attention", "attention") if hasattr(layers[0], name)]
        return tuple(Branches({n: getattr(layer, n) for n in names}, (layer.intermediate, layer.output)) for layer in layers)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """Class token and patches of the clip, or of each of its frames."""
        frames, _, height, width = clip.shape[1:]
        grid = frames, height // PATCH, width // PATCH
        values = self.timesformer(clip).last_hidden_state
        if self._by_frame:
            return Tokens(rearrange(values, "(B T) n D -> B (T n) D", T=frames), frame_positions(*grid))
        patches = rearrange(grid_positions(*grid), "(t n) a -> (n t) a", t=frames)
        return Tokens(values, torch.cat((grid_positions(1, 1, 1), patches)))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of a hub's file without classifier and the blocks that are not here, its positions for this clip.

        Embeddings of time and of place are resampled to the nearest, as the authors do for another number of frames or size.
        """
        named = {re.sub(r"^(embeddings|encoder|layernorm)\.", r"timesformer.\1.", key): v for key, v in state.items()}
        kept = without(named, ("classifier.", *self._later), said="timesformer")
        own = self.state_dict()
        if TIMES in kept and TIMES in own:
            kept[TIMES] = _other_times(kept[TIMES], own[TIMES].shape[1])
        if PLACES in kept:
            kept[PLACES] = _other_places(kept[PLACES], own[PLACES].shape[1])
        return kept


def _other_times(given: Float[Tensor, "1 S D"], frames: int) -> Float[Tensor, "1 T D"]:
    return given if given.shape[1] == frames else F.interpolate(given.mT, size=frames, mode="nearest").mT.contiguous()


def _other_places(given: Float[Tensor, "1 M D"], count: int) -> Float[Tensor, "1 N D"]:
    if given.shape[1] == count:
        return given
    grid = rearrange(given[:, 1:], "1 (h w) D -> 1 D h w", h=round((given.shape[1] - 1) ** 0.5))
    nearest = F.interpolate(grid, size=(round((count - 1) ** 0.5),) * 2, mode="nearest")
    return torch.cat((given[:, :1], rearrange(nearest, "1 D h w -> 1 (h w) D")), dim=1)


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    attention: Attention = "divided",
    checkpoint: Literal["kinetics", "ssv2"] = "kinetics",
    depth: int | None = None,
    stochastic_depth: float = 0.0,
) -> TimeSformer:
    """Build the backbone.

    Args:
        frames: T of a clip; any. 8 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; a multiple of 16. 224 is what the published weights were trained with.
        pretrained: Fetch the published weights; the licence is logged.
        attention: What a patch attends to in a block: its place in all frames and then its frame (`divided`), all patches of all
            frames at once (`joint`), or its frame (`space_only`). Weights are published of `divided`.
        checkpoint: Data set that the weights were trained to classify: Kinetics-400 or Something-Something V2.
        depth: Number of blocks kept, from the first. `None`: all 12.
        stochastic_depth: Share of clips that skip the last block's branches in training, less in earlier blocks; of divided attention
            each place's frames skip attention over time, and each frame that in space, by themselves, as in the library.

    Raises:
        ValueError: no frame, a size that patches do not tile, a depth beyond 12, a stochastic depth that is no share, or weights
            that are not published or cannot be fetched.
    """
    if frames < 1:
        raise ValueError(f"timesformer takes clips of 1 frame or more, given {frames}")
    check_patch(size, PATCH)
    if pretrained and attention != "divided":
        raise ValueError(f"timesformer has published weights of attention=divided alone, given attention={attention}")
    kept = kept_blocks(depth, BLOCKS)
    config = TimesformerConfig(
        image_size=size, num_frames=frames, num_hidden_layers=kept, attention_type=TYPES[cast(str, attention)]
    )
    model = TimesformerModel(config)
    for layer, rate in zip(model.encoder.layer, drop_rates(stochastic_depth, kept), strict=True):
        layer.drop_path = StochasticDepth(rate, "row")  # of the library's configuration the rate is a whole number
    backbone = TimeSformer(model, later=range(kept, BLOCKS))
    if pretrained:
        weights.load(backbone, weights.from_hub(PUBLISHED[checkpoint]))
    return backbone
