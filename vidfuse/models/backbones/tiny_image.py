"""A small image backbone over frames, for the demo and for tests: patches, one mixing stage, a class token a frame.

Axes: B clips, T frames, C channels, H height, W width, N = T (1 + P) tokens, P patches of a frame, D width.
Comes in: normalised clips. Goes out: of each frame a class token (the mean of its patches) and its patch tokens. It is used
frozen with random weights: random features of frames still tell what is there (Rahimi and Recht 2007), and nothing of how it moves.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models.checks import check_patch
from vidfuse.models.layers import frame_positions
from vidfuse.models.parts import Tokens

PATCH = 16
"""Pixels of a patch's side."""


class Stage(nn.Module):
    """Residual convolution over patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.point = (
            nn.GroupNorm(1, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """The mixed patches."""
        return x + self.point(nn.functional.gelu(self.wide(self.norm(x))))


class TinyImage(nn.Module):
    """Patch embedding and stages.

    Args:
        width: D.
        depth: Stages.
    """

    mean, std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Conv2d(3, width, PATCH, PATCH)
        self.blocks = nn.ModuleList(Stage(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """Class token, then patches in rows, of each frame in order."""
        batch, frames = clip.shape[:2]
        x = self.embed(clip.flatten(0, 1))
        for block in self.blocks:
            x = block(x)
        high, wide = x.shape[2:]
        patches = rearrange(x, "bt d h w -> bt (h w) d")
        values = self.norm(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))
        return Tokens(rearrange(values, "(b t) n d -> b (t n) d", b=batch), frame_positions(frames, high, wide))


def build(*, frames: int, size: int, width: int = 32, depth: int = 1) -> TinyImage:
    """Build the backbone.

    Args:
        frames: T of a clip.
        size: Height and width of a clip, in pixels; a multiple of 16.
        width: D of the tokens.
        depth: Mixing stages.

    Raises:
        ValueError: a size that the patch does not divide, or a number below 1.
    """
    check_patch(size, PATCH)
    if width < 1 or depth < 1:
        raise ValueError(f"width and depth are 1 or more, given {width=}, {depth=}")
    return TinyImage(width, depth)
