"""Bottleneck cross-attention in space and time (B-CAST), between the blocks of both backbones or after them.

Axes: B clips, N tokens (Q of queries, K of keys), D width, h heads.
Comes in: tokens of the two streams. Goes out: both streams' masked means after the exchanges, layer-normalised, side by side;
each keeps its own width. Semantic tokens look along time at motion tokens of their place, motion tokens look over space at
semantic tokens of their time; `layers.windows_along` has the rule by which streams of different grids meet.
Source: Lee et al. 2023 (NeurIPS, arXiv:2311.18825), figure 3; the block is `exchange.BottleneckExchange`, written anew
after the structure of the published one (the authors' code, KHU-VLL/CAST at 51eb871, is CC BY-NC 4.0; none of it is
here). Published, an exchange follows the attention of every pair of the backbones' blocks: `placement=blocks`, for which see
`lockstep`. In the late form they follow one another with nothing between, and backbones of any kind will do. Published, what comes
out of the backbones is pooled, then normed, and adapters and a sum lead to the classifier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast, get_type_hints

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import select
from vidfuse.models.checks import check_heads, check_share, check_two_streams
from vidfuse.models.exchange import READERS, BottleneckExchange, Direction, WindowsOption
from vidfuse.models.layers import masked_mean, without_padding
from vidfuse.models.lockstep import paired
from vidfuse.models.parts import Fused, Stepwise, Tokens


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
        after = {name: Tokens(values[name], positions[name], masks[name]) for name in self.norm}
        return Fused(_pooled(self.norm, after), attention)


class InterleavedBCast(nn.Module):
    """Exchanges between the streams' blocks, which whoever runs the streams calls, then pooling.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        layers: The exchanges.
        numbers: Of the pairs of blocks that they are in, from 1, in order.
    """

    def __init__(self, widths: Mapping[str, int], layers: Sequence[BottleneckExchange], numbers: Sequence[int]) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.layers = nn.ModuleList(layers)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(d) for name, d in widths.items()})
        self._numbers = tuple(numbers)

    @property
    def exchanges(self) -> Mapping[int, nn.Module]:
        """By the number of the pair of blocks that they are in."""
        return dict(zip(self._numbers, self.layers, strict=True))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """None: exchanges are computed again with the streams' blocks."""
        return ()

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature of streams that have exchanged; it has no attention of its own."""
        return Fused(_pooled(self.norm, {name: without_padding(streams[name]) for name in self.norm}), {})


def _pooled(norms: nn.ModuleDict, streams: Mapping[str, Tokens]) -> Float[Tensor, "B D"]:
    return torch.cat([masked_mean(replace(streams[n], values=norm(streams[n].values))) for n, norm in norms.items()], dim=-1)


def build(
    *,
    widths: Mapping[str, int],
    streams: Mapping[str, nn.Module] | None = None,
    placement: Literal["late", "blocks"] = "late",
    layers: int = 1,
    every: int = 1,
    bottleneck: int | None = None,
    heads: int = 8,
    direction: Direction = "both",
    windows: WindowsOption = "time_space",
    dropout: float = 0.1,
    stochastic_depth: float = 0.0,
) -> BCast | InterleavedBCast:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        streams: The backbones; needed with `placement=blocks` alone.
        placement: `late`: exchanges after both backbones; `blocks`: as published, one between the attention and the feed-forward
            part of pairs of their blocks, which must be as many, or one stream's a multiple of the other's.
        layers: Exchanges, one after another; of `placement=late`.
        every: Pairs of blocks from one exchange to the next; of `placement=blocks`. Published: 1.
        bottleneck: Width inside an exchange. `None`: half of the wider stream, as published (there both are 768), up to the next
            multiple of `heads`.
        heads: Attention heads; they divide `bottleneck`. Published: 12.
        direction: `semantic_to_motion`: semantic tokens query motion tokens, motion stays as it is; and so on.
        windows: What the queries look along: `time_space` semantic along time and motion along space, as published;
            `space_time` the other way round; `none` over the whole clip.
        dropout: Dropout of attention weights and of the residual branches.
        stochastic_depth: Share of clips that the last exchange adds nothing to in training, less in earlier ones, none in the first
            of several. Published: 0.3 for Something-Something V2.

    Raises:
        ValueError: not exactly the two streams; heads that do not divide the bottleneck; a number outside its range; an option of
            the other placement; backbones that cannot be run block by block, or whose blocks do not pair.
    """
    check_two_streams("bcast", widths)
    check_share("dropout", dropout)
    check_share("stochastic_depth", stochastic_depth)
    if layers < 1 or heads < 1 or every < 1:
        raise ValueError(f"layers >= 1, every >= 1 and heads >= 1 are needed, given {layers=}, {every=}, {heads=}")
    inner = math.ceil(max(widths.values()) / 2 / heads) * heads if bottleneck is None else bottleneck
    check_heads(inner, heads)
    if placement == "late":
        if every != 1:
            raise ValueError(f"every is of placement=blocks, given {every=} with placement=late, which has {layers=}")
        directions = dict.fromkeys(range(layers), direction)
    else:
        if layers != 1:
            raise ValueError(f"layers is of placement=late, given {layers=} with placement=blocks, where every decides")
        directions = _directions(_stepwise(streams or {}), every, direction)
    rates = torch.linspace(0 if len(directions) > 1 else stochastic_depth, stochastic_depth, len(directions), device="cpu")
    exchanges = [
        BottleneckExchange(
            widths, bottleneck=inner, heads=heads, direction=d, windows=windows, dropout=dropout, stochastic_depth=rate
        )
        for d, rate in zip(directions.values(), rates.tolist(), strict=True)
    ]
    return BCast(widths, exchanges) if placement == "late" else InterleavedBCast(widths, exchanges, tuple(directions))


def _stepwise(streams: Mapping[str, nn.Module]) -> dict[str, Stepwise]:
    cannot = [f"{name} ({type(stream).__name__})" for name, stream in streams.items() if not isinstance(stream, Stepwise)]
    if cannot or not streams:
        builders = {name: select.builder("backbones", name) for name in select.names("backbones")}
        can = [name for name, builder in builders.items() if hasattr(get_type_hints(builder)["return"], "halfway")]
        raise ValueError(
            f"fusion bcast with placement=blocks runs both backbones block by block, which {', '.join(cannot) or 'none given'} "
            f"cannot; backbones that can: {', '.join(can)}. placement=late takes all"
        )
    return cast(dict[str, Stepwise], dict(streams))


def _directions(streams: Mapping[str, Stepwise], every: int, direction: Direction) -> dict[int, Direction]:
    """Who reads in the exchange of each pair of blocks that has one.

    What patches read in the last block is lost to a stream that does not give patches: nobody reads for it there.
    """
    pairs = len(paired({name: len(stream.blocks) for name, stream in streams.items()}))
    lost = {name for name, stream in streams.items() if not stream.patches_count}
    directions: dict[int, Direction] = dict.fromkeys(range(every, pairs + 1, every), direction)
    if pairs in directions:
        left = [f"{a}_to_{b}" for a, b in READERS[direction] if a not in lost]
        if not left:
            del directions[pairs]
        elif len(left) < len(READERS[direction]):
            directions[pairs] = cast(Direction, left[0])
    if not directions:
        raise ValueError(
            f"every={every} leaves no exchange that counts in {pairs} pairs of blocks; lower every, or give patches (tokens)"
        )
    return directions
