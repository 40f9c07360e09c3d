"""The streams side by side: late fusion without exchange, the ablation that cross-attention is compared with.

Axes: B clips, N tokens, D width.
Comes in: tokens of one or two streams. Goes out: their masked means, layer-normalised one by one (so that the stream of the
larger scale does not drown the other) and concatenated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vidfuse.models.layers import masked_mean
from vidfuse.models.parts import Fused, Tokens


class Concat(nn.Module):
    """Masked mean and layer norm of each stream, concatenated."""

    blocks: Sequence[nn.Module] = ()

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.norm = nn.ModuleDict({name: nn.LayerNorm(d) for name, d in widths.items()})

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature [B, sum of widths]; there is no attention to return."""
        features = [norm(masked_mean(streams[name])) for name, norm in self.norm.items()]
        return Fused(torch.cat(features, dim=-1), {})


def build(*, widths: Mapping[str, int]) -> Concat:
    """Build the fusion.

    Args:
        widths: D of each stream's tokens, by its name.
    """
    return Concat(widths)
