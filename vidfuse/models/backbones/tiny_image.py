"""Placeholder until the recipe's own file replaces it: a small per-frame convolutional network."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models.parts import Tokens


class TinyImage(nn.Module):
    """One patch embedding and one mixing block per frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.mean, self.std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)
        self.embed = nn.Conv2d(3, width, 16, 16)
        self.blocks = nn.ModuleList([nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 1))])

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        b, t = clip.shape[:2]
        x = self.embed(clip.flatten(0, 1))
        for block in self.blocks:
            x = block(x)
        h, w = x.shape[2:]
        axes = [(torch.arange(n, device=x.device) + 0.5) / n for n in (t, h, w)]
        values = x.unflatten(0, (b, t)).permute(0, 1, 3, 4, 2).reshape(b, t * h * w, -1)
        return Tokens(values, torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3))


def build(*, frames: int, size: int, width: int = 32) -> TinyImage:
    """Build it.

    Args:
        frames: of a clip.
        size: of a clip, pixels.
        width: D.
    """
    return TinyImage(width)
