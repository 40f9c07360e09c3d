"""VideoMAE: a plain video transformer, pretrained by reconstructing masked tubelets.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: a token for each tubelet of 2 frames x 16 x 16 pixels, time slowest; there is no class token.
Source: Tong et al. 2022 (arXiv:2203.12602), tables 6 and 7: S, B and L have 22, 87 and 305 M parameters with the classifier (304.3
as built) and 57, 180 and 597 GFLOPs at 16 x 224 x 224; model by transformers (`VideoMAEModel`), weights by the authors on the Hugging Face
hub (`MCG-NJU/videomae-*`), under CC-BY-NC 4.0. S has the 6 heads of the authors' code; transformers' converter wrote 16.
Positions are sines and cosines of a token's number, so they are computed for any clip; weights have seen those of 16 x 224 x 224.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import VideoMAEConfig, VideoMAEModel

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_tubelet, kept_blocks
from vidfuse.models.layers import drop_rates, grid_positions, without
from vidfuse.models.parts import Branches, Tokens, Underway

Variant = Literal["vits16", "vitb16", "vitl16"]
Checkpoint = Literal["pretrain", "kinetics", "ssv2"]
TUBELET, PATCH = 2, 16
SIZES = {"vits16": (384, 12, 6), "vitb16": (768, 12, 12), "vitl16": (1024, 24, 16)}
"""Width, blocks, heads."""
PUBLISHED = {
    ("vits16", "kinetics"): "MCG-NJU/videomae-small-finetuned-kinetics",
    ("vits16", "ssv2"): "MCG-NJU/videomae-small-finetuned-ssv2",
    ("vitb16", "pretrain"): "MCG-NJU/videomae-base",
    ("vitb16", "kinetics"): "MCG-NJU/videomae-base-finetuned-kinetics",
    ("vitb16", "ssv2"): "MCG-NJU/videomae-base-finetuned-ssv2",
    ("vitl16", "pretrain"): "MCG-NJU/videomae-large",
    ("vitl16", "kinetics"): "MCG-NJU/videomae-large-finetuned-kinetics",
}
NOT_HERE = ("decoder.", "encoder_to_decoder.", "mask_token", "fc_norm.", "classifier.")
LICENCE = (
    "VideoMAE weights are under CC-BY-NC 4.0 (https://creativecommons.org/licenses/by-nc/4.0/): "
    "no commercial use, of a model that holds them either"
)


class VideoMAE(nn.Module):
    """transformers' encoder under the names of the hub's files, with its table of positions where its weights are.

    Args:
        videomae: The encoder.
        later: Blocks of a published file that come after the encoder's and are not used.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    licence = LICENCE
    patches_count = True

    def __init__(self, videomae: VideoMAEModel, *, later: Sequence[int] = ()) -> None:
        super().__init__()
        self.videomae = videomae
        self.width: int = videomae.config.hidden_size
        self._later = tuple(f"videomae.encoder.layer.{number}." for number in later)
        embeddings = cast(nn.Module, videomae.embeddings)
        table = embeddings.__dict__.pop("position_embeddings")  # a plain tensor: it would be copied to the device each step
        embeddings.register_buffer("position_embeddings", table, persistent=False)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        return tuple(self.videomae.encoder.layer)

    @property
    def branches(self) -> Sequence[Branches]:
        """Attention and feed-forward part of each block; the latter's second half adds it to the tokens."""
        layers = cast(Sequence[Any], self.blocks)
        return tuple(Branches({"attention": layer.attention}, (layer.intermediate, layer.output)) for layer in layers)

    @property
    def halfway(self) -> Sequence[nn.Module]:
        """The attention of each block."""
        return tuple(layer.attention for layer in cast(Sequence[Any], self.blocks))

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each tubelet."""
        return Tokens(self.videomae(clip).last_hidden_state, grid_positions(*_grid(clip)))

    def begin(self, clip: Float[Tensor, "B T C H W"]) -> Underway:
        """Tokens before the first block."""
        return Underway(self.videomae.embeddings(clip, None), _grid(clip))

    def end(self, underway: Underway) -> Tokens:
        """Tokens as of a call, of values after the last block."""
        norm = self.videomae.layernorm
        return Tokens(underway.values if norm is None else norm(underway.values), grid_positions(*underway.grid))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of a hub's file without decoder, classifier and the blocks that are not here.

        Raises:
            ValueError: the file is of a pretraining and this encoder of a fine-tuning, or the other way round.
        """
        named = {_own_name(key): value for key, value in state.items()}
        kept = without(named, (*NOT_HERE, *self._later), said="videomae")
        if ("videomae.layernorm.weight" in kept) != (self.videomae.layernorm is not None):
            fitting = "pretrain" if self.videomae.layernorm is None else "kinetics or ssv2"
            raise ValueError(
                "videomae: only a pretraining's encoder ends in a layer norm, and the file and the model differ in that; "
                f"for this file give the option checkpoint={fitting}"
            )
        return kept


def _grid(clip: Float[Tensor, "B T C H W"]) -> tuple[int, int, int]:
    frames, _, height, width = clip.shape[1:]
    return frames // TUBELET, height // PATCH, width // PATCH


def _own_name(key: str) -> str:
    """Name of a hub's tensor with the encoder's prefix and with biases as transformers has them since its version 5."""
    key = re.sub(r"^(embeddings|encoder|layernorm)\.", r"videomae.\1.", key)
    return re.sub(r"\.attention\.([qv])_bias$", lambda m: f".attention.{'query' if m[1] == 'q' else 'value'}.bias", key)


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vitb16",
    checkpoint: Checkpoint = "pretrain",
    depth: int | None = None,
    stochastic_depth: float = 0.0,
) -> VideoMAE:
    """Build the backbone.

    Args:
        frames: T of a clip; even. 16 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; a multiple of 16. 224 is what the published weights were trained with.
        pretrained: Fetch the published weights; the licence is logged.
        variant: Size of the transformer.
        checkpoint: Training that the weights are of: self-supervised on Kinetics-400 (`pretrain`; not published of vits16), or
            fine-tuned to classify Kinetics-400 or Something-Something V2 (`ssv2`; not published of vitl16). It decides about the
            architecture, too: fine-tuned tokens are not normed last, as the fine-tuned norm is one of their mean.
        depth: Number of blocks kept, from the first. `None`: all.
        stochastic_depth: Share of clips that skip the last block's branches in training, less in earlier blocks.

    Raises:
        ValueError: frames or size that tubelets do not tile, a depth beyond the variant's, a stochastic depth that is no share, or
            weights that are not published or cannot be fetched.
    """
    check_tubelet(frames, TUBELET)
    check_patch(size, PATCH)
    repository = _repository(variant, checkpoint) if pretrained else None
    width, blocks, heads = SIZES[variant]
    kept = kept_blocks(depth, blocks)
    config = VideoMAEConfig(
        image_size=size,
        num_frames=frames,
        hidden_size=width,
        num_hidden_layers=kept,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        use_mean_pooling=checkpoint != "pretrain",
    )
    model = VideoMAEModel(config)
    model.set_attn_implementation("sdpa")
    layers = cast(Sequence[Any], model.encoder.layer)
    for layer, rate in zip(layers, drop_rates(stochastic_depth, kept), strict=True):
        for branch in (layer.attention.output, layer.output):
            branch.dropout = StochasticDepth(rate, "row")  # in the place of a dropout of 0: the library has none of this kind
    backbone = VideoMAE(model, later=range(kept, blocks))
    weights.load(backbone, weights.from_hub(repository) if repository else None)
    return backbone


def _repository(variant: str, checkpoint: str) -> str:
    if (variant, checkpoint) not in PUBLISHED:
        there = ", ".join(f"{v} {c}" for v, c in PUBLISHED)
        raise ValueError(f"videomae {variant} has no published {checkpoint} weights; there are: {there}")
    return PUBLISHED[variant, checkpoint]
