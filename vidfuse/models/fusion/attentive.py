"""Attentive pooling: a learned query of each stream reads its tokens; the head that V-JEPA's frozen features are judged with.

Axes: B clips, N tokens, D width.
Comes in: tokens of one or two streams. Goes out: what each query read, layer-normalised, side by side.
Source: Bardes et al. 2024, V-JEPA (arXiv:2404.08471), section 4.2, attentive probing: cross-attention with one learned query,
then a feed-forward part, both with residuals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vidfuse.models.attention import AttentivePool
from vidfuse.models.parts import Fused, Tokens


class Attentive(nn.Module):
    """A query and a layer norm of each stream.

    Args:
        widths: D of each stream's tokens.
        heads: Attention heads; they divide every D.
        mlp_ratio: Hidden width of the feed-forward part, as a multiple of D.
    """

    blocks: Sequence[nn.Module] = ()

    def __init__(self, widths: Mapping[str, int], *, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.read = nn.ModuleDict({name: AttentivePool(d, heads, mlp_ratio) for name, d in widths.items()})
        self.norm = nn.ModuleDict({name: nn.LayerNorm(d) for name, d in widths.items()})

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature [B, sum of widths]; the queries are no tokens, so there is no attention of tokens to return."""
        return Fused(torch.cat([norm(self.read[name](streams[name])) for name, norm in self.norm.items()], dim=-1), {})


def build(*, widths: Mapping[str, int], heads: int = 8, mlp_ratio: float = 4.0) -> Attentive:
    """Build the fusion.

    Args:
        widths: D of each stream's tokens, by its name.
        heads: Attention heads; they divide every D.
        mlp_ratio: Hidden width of the feed-forward part, as a multiple of D.

    Raises:
        ValueError: heads that do not divide a width, or a ratio that is not above 0.
    """
    if mlp_ratio <= 0:
        raise ValueError(f"mlp_ratio is above 0, given {mlp_ratio:g}")
    return Attentive(widths, heads=heads, mlp_ratio=mlp_ratio)
