"""Placeholder until the recipe's own file replaces it: a small 3-D convolutional network."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models.parts import Tokens


class TinyMotion(nn.Module):
    """Three convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mean, self.std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
        self.stem = nn.Conv3d(3, width, (3, 7, 7), (1, 4, 4), (1, 3, 3))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, width), nn.GELU(), nn.Conv3d(width, width, 3, (1, 2, 2), 1)) for _ in range(2)
        )

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        x = self.stem(clip.transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        t, h, w = x.shape[2:]
        axes = [(torch.arange(n, device=x.device) + 0.5) / n for n in (t, h, w)]
        return Tokens(x.flatten(2).transpose(1, 2), torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))


def build(*, frames: int, size: int, width: int = 32) -> TinyMotion:
    """Build it.

    Args:
        frames: of a clip.
        size: of a clip, pixels.
        width: D.
    """
    return TinyMotion(width)
