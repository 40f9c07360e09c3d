"""V-JEPA 2: a video transformer with rotary positions, pretrained by predicting the features of masked regions.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: a token for each tubelet of 2 frames x 16 x 16 pixels, time slowest, after the encoder's last
norm; there is no class token, and the predictor of the pretraining is left out.
Source: Assran et al. 2025 (arXiv:2506.09985), whose repository states 300 M (L), 600 M (H) and 1 B (g) parameters of the encoders; model
by transformers (`VJEPA2Model`), weights by the authors on the Hugging Face hub (`facebook/vjepa2-*-fpc64-*`), under the MIT licence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import VJEPA2Config, VJEPA2Model

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_tubelet, kept_blocks
from vidfuse.models.layers import drop_rates, grid_positions, without
from vidfuse.models.parts import Branches, Tokens, Underway

Variant = Literal["vitl16", "vith16", "vitg16", "vitg16_384"]
TUBELET, PATCH = 2, 16
SIZES = {"vitl16": (1024, 24, 16, 4.0), "vith16": (1280, 32, 16, 4.0), "vitg16": (1408, 40, 22, 48 / 11)}
"""Width, blocks, heads, hidden width of a block's feed-forward part as a multiple of the width."""
PUBLISHED = {
    "vitl16": "facebook/vjepa2-vitl-fpc64-256",
    "vith16": "facebook/vjepa2-vith-fpc64-256",
    "vitg16": "facebook/vjepa2-vitg-fpc64-256",
    "vitg16_384": "facebook/vjepa2-vitg-fpc64-384",
}


class VJEPA2(nn.Module):
    """transformers' encoder under the names of the hub's files.

    Args:
        model: transformers' model, of which the predictor is left behind.
        later: Blocks of a published file that come after the encoder's and are not used.
    """

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    patches_count = True

    def __init__(self, model: VJEPA2Model, *, later: Sequence[int] = ()) -> None:
        super().__init__()
        self.encoder = model.encoder
        self.width: int = model.config.hidden_size
        self._later = tuple(f"encoder.layer.{number}." for number in later)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        return tuple(self.encoder.layer)

    @property
    def branches(self) -> Sequence[Branches]:
        """Attention and feed-forward part of each block."""
        return tuple(Branches({"attention": layer.attention}, (layer.mlp,)) for layer in cast(Sequence[Any], self.blocks))

    @property
    def halfway(self) -> Sequence[nn.Module]:
        """Of each block its stochastic depth, or nothing, which is called for attention's branch first."""
        return tuple(layer.drop_path for layer in cast(Sequence[Any], self.blocks))

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each tubelet."""
        return Tokens(self.encoder(clip).last_hidden_state, grid_positions(*_grid(clip)))

    def begin(self, clip: Float[Tensor, "B T C H W"]) -> Underway:
        """Tokens before the first block."""
        return Underway(self.encoder.embeddings(clip), _grid(clip))

    def end(self, underway: Underway) -> Tokens:
        """Tokens as of a call, of values after the last block."""
        return Tokens(self.encoder.layernorm(underway.values), grid_positions(*underway.grid))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of a hub's file without predictor, pooler, classifier and the blocks that are not here."""
        named = {key.removeprefix("vjepa2."): value for key, value in state.items()}
        return without(named, ("predictor.", "pooler.", "classifier.", *self._later), said="vjepa2")


def _grid(clip: Float[Tensor, "B T C H W"]) -> tuple[int, int, int]:
    frames, _, height, width = clip.shape[1:]
    return frames // TUBELET, height // PATCH, width // PATCH


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vitl16",
    depth: int | None = None,
    stochastic_depth: float = 0.0,
) -> VJEPA2:
    """Build the backbone.

    Args:
        frames: T of a clip; even. 64 is what the published weights were trained with last, 16 what they were before.
        size: Height and width of a clip, in pixels; a multiple of 16. 256 is what the published weights were trained with, 384
            those of vitg16_384.
        pretrained: Fetch the published weights.
        variant: Size of the transformer; vitg16_384 is vitg16 with weights trained at 384 x 384.
        depth: Number of blocks kept, from the first. `None`: all.
        stochastic_depth: Share of clips that skip the last block's branches in training, less in earlier blocks.

    Raises:
        ValueError: frames or size that tubelets do not tile, a depth beyond the variant's, a stochastic depth that is no share, or
            weights that cannot be fetched.
    """
    check_tubelet(frames, TUBELET)
    check_patch(size, PATCH)
    width, blocks, heads, ratio = SIZES[variant.removesuffix("_384")]
    kept = kept_blocks(depth, blocks)
    config = VJEPA2Config(
        crop_size=size,
        frames_per_clip=frames,
        hidden_size=width,
        num_hidden_layers=kept,
        num_attention_heads=heads,
        mlp_ratio=ratio,
        pred_num_hidden_layers=0,
    )
    model = VJEPA2Model(config)
    model.set_attn_implementation("sdpa")
    for layer, rate in zip(model.encoder.layer, drop_rates(stochastic_depth, kept), strict=True):
        layer.drop_path = StochasticDepth(rate, "row")  # the library's rounds its draws where weights are bfloat16
    backbone = VJEPA2(model, later=range(kept, blocks))
    weights.load(backbone, weights.from_hub(PUBLISHED[variant]) if pretrained else None)
    return backbone
