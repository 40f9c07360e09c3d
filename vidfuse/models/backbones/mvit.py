"""MViT: a transformer over the clip whose blocks pool their tokens, from a fine narrow grid to a coarse wide one.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: normalised clips. Goes out: the class token of the clip and a token for each cell of the last block's grid (T / 2, H / 32,
W / 32, rounded up), after the last norm.
Source: Fan et al. 2021, MViT (arXiv:2104.11227), table 3, and Li et al. 2022, MViTv2 (arXiv:2112.01526), table 1; models and
Kinetics-400 weights by torchvision (`mvit_v2_s`: 34.5 M parameters with the classifier that is left out here, 80.8 top-1; `mvit_v1_b`:
36.6 M, 78.5; both at 16 x 224 x 224; BSD-3-Clause).
Other clips: v2's relative positions stay as published (those of 16 x 224 x 224) and are resampled to the grid at hand in each block,
as torchvision does, so that one file fits every size. v1's are absolute: it takes 16 x 224 x 224 alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import video

from vidfuse.models import weights
from vidfuse.models.checks import check_share
from vidfuse.models.layers import grid_positions, without
from vidfuse.models.parts import Tokens

PUBLISHED = {"v2s": video.MViT_V2_S_Weights.KINETICS400_V1, "v1b": video.MViT_V1_B_Weights.KINETICS400_V1}
BUILDERS = {"v2s": video.mvit_v2_s, "v1b": video.mvit_v1_b}


class MViT(nn.Module):
    """torchvision's network under its own parameter names, without the classifier, on a clip of any shape.

    Args:
        network: torchvision's model.
        tokens: `all` the class token and the cells, `class` or `patch` only these.
        mean: Mean of each channel of its input, for values 0..1.
        std: Standard deviation of each channel of its input, for values 0..1.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        tokens: Literal["all", "class", "patch"],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        parts = cast(Any, network)
        self.conv_proj: nn.Conv3d = parts.conv_proj
        self.pos_encoding: nn.Module = parts.pos_encoding
        self.blocks: nn.ModuleList = parts.blocks
        self.norm: nn.LayerNorm = parts.norm
        self.tokens = tokens
        self.width: int = self.norm.normalized_shape[0]
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """The class token first, then the last block's cells, time slowest."""
        x = self.conv_proj(rearrange(clip, "B T C H W -> B C T H W"))
        grid = tuple(x.shape[2:])
        x = self.pos_encoding(rearrange(x, "B D t h w -> B (t h w) D"))
        for block in self.blocks:
            x, grid = block(x, grid)
        kept = {"all": slice(None), "class": slice(1), "patch": slice(1, None)}[self.tokens]
        return Tokens(self.norm(x)[:, kept], _positions(grid)[kept])

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of torchvision's file without the classifier."""
        return without(state, ("head.",), said="mvit")


def _positions(grid: tuple[int, int, int]) -> Float[Tensor, "N 3"]:
    return torch.cat((grid_positions(1, 1, 1), grid_positions(*grid)))


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Literal["v2s", "v1b"] = "v2s",
    tokens: Literal["all", "class", "patch"] = "all",
    stochastic_depth: float = 0.0,
) -> MViT:
    """Build the backbone.

    Args:
        frames: T of a clip; any for v2s, 16 for v1b. 16 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any for v2s, 224 for v1b. 224 is what the published weights were trained with.
        pretrained: Fetch the published Kinetics-400 weights.
        variant: `v2s` is MViTv2-S, `v1b` MViT-B 16x4; both are 768 wide at the end.
        tokens: Which tokens are given: the clip's one class token, the cells (`patch`) or both.
        stochastic_depth: Share of clips that skip the last block's branches in training, less in earlier blocks; 0.2 is torchvision's.

    Raises:
        ValueError: `stochastic_depth` is no share, v1b with another clip than 16 x 224 x 224, or the weights cannot be fetched.
    """
    check_share("stochastic_depth", stochastic_depth)
    if variant == "v1b" and (frames, size) != (16, 224):
        raise ValueError(
            f"mvit v1b has absolute positions for frames=16, size=224; given frames={frames}, size={size}. "
            "Take these, or variant=v2s, whose positions are relative"
        )
    published = PUBLISHED[variant]
    network = BUILDERS[variant](stochastic_depth_prob=stochastic_depth)
    transform = published.transforms()
    backbone = MViT(network, tokens=tokens, mean=transform.mean, std=transform.std)
    file = weights.from_url(published.url, f"mvit {variant} (Kinetics-400)", hashed=True)
    weights.load(backbone, file if pretrained else None)
    return backbone
