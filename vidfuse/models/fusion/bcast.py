"""Bottleneck cross-attention in space and time (B-CAST) after both backbones.

Axes: B clips, N tokens (Q of queries, K of keys), D width, h heads.
Comes in: tokens of the two streams. Goes out: both streams' masked means after the exchanges, layer-normalised, side by side;
each keeps its own width. Semantic tokens look along time at motion tokens of their place, motion tokens look over space at
semantic tokens of their time; `layers.windows_along` has the rule by which streams of different grids meet.
Source: Lee et al. 2023 (NeurIPS, arXiv:2311.18825), figure 3; the block is `layers.BottleneckExchange`, written anew
after the structure of the published one (the authors' code, KHU-VLL/CAST at 51eb871, is CC BY-NC 4.0; none of it is
here). Published, an exchange follows the attention of every pair of the backbones' blocks; this is the late form, where they
follow one another with nothing between, and backbones of any kind will do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vidfuse.models.exchange import BottleneckExchange, Direction, WindowsOption
from vidfuse.models.layers import check_heads, check_share, check_two_streams, masked_mean, without_padding
from vidfuse.models.parts import Fused, Tokens


class BCast(nn.Module):
    """Exchanges, one after another, then pooling.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        layers: The exchanges, in order; of the same options.
    """

    def __init__(self, widths: Mapping[str, int], layers: Sequence[BottleneckExchange]) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.layers = nn.ModuleList(layers)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(d) for name, d in widths.items()})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The exchanges."""
        return tuple(self.layers)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature; attention of all heads as `layer<i>.<who queries>_to_<who is looked at>` if asked for."""
        values = {name: without_padding(streams[name]).values for name in self.norm}
        positions = {name: streams[name].positions for name in self.norm}
        masks = {name: streams[name].mask for name in self.norm}
        meeting = cast(BottleneckExchange, self.layers[0]).meeting(positions)
        attention: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            values, seen = layer(values, positions, masks, meeting, return_attention=return_attention)
            attention |= {f"layer{i}.{name}": weights for name, weights in seen.items()}
        pooled = [masked_mean(Tokens(norm(values[n]), positions[n], masks[n])) for n, norm in self.norm.items()]
        return Fused(torch.cat(pooled, dim=-1), attention)


def build(
    *,
    widths: Mapping[str, int],
    layers: int = 1,
    bottleneck: int | None = None,
    heads: int = 8,
    direction: Direction = "both",
    windows: WindowsOption = "time_space",
    dropout: float = 0.1,
) -> BCast:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        layers: Exchanges, one after another.
        bottleneck: Width inside an exchange. `None`: half of the wider stream, as published (there both are 768), up to the next
            multiple of `heads`.
        heads: Attention heads; they divide `bottleneck`. Published: 12.
        direction: `semantic_to_motion`: semantic tokens query motion tokens, motion stays as it is; and so on.
        windows: What the queries look along: `time_space` semantic along time and motion along space, as published;
            `space_time` the other way round; `none` over the whole clip.
        dropout: Dropout of attention weights and of the residual branches.

    Raises:
        ValueError: not exactly the two streams; heads that do not divide the bottleneck; a number outside its range.
    """
    check_two_streams("bcast", widths)
    check_share("dropout", dropout)
    if layers < 1 or heads < 1:
        raise ValueError(f"layers >= 1 and heads >= 1 are needed, given {layers=}, {heads=}")
    inner = math.ceil(max(widths.values()) / 2 / heads) * heads if bottleneck is None else bottleneck
    check_heads(inner, heads)
    exchanges = [
        BottleneckExchange(widths, bottleneck=inner, heads=heads, direction=direction, windows=windows, dropout=dropout)
        for _ in range(layers)
    ]
    return BCast(widths, exchanges)
