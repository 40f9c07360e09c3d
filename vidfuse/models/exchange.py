"""Two streams that read from each other: directions, windows, and CAST's bottleneck exchange.

Axes: B clips, N tokens (Q of queries, K of keys), D width of a token, h heads; G groups of q queries and k keys, P and R places,
A axes of a position.
Comes in: tokens of two streams with their positions. Goes out: tokens after an exchange, or the groups of a window. Fusions that
exchange once or layer by layer are made of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vidfuse.models.attention import Attention
from vidfuse.models.layers import SAME_PLACE, encode_positions, ranks

Direction = Literal["both", "semantic_to_motion", "motion_to_semantic"]
READERS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "both": (("semantic", "motion"), ("motion", "semantic")),
    "semantic_to_motion": (("semantic", "motion"),),
    "motion_to_semantic": (("motion", "semantic"),),
}
"""(who queries, who is looked at) of each direction."""

Along = Literal["time", "space", "all"]
"""What a token looks along: `time` at its own place, `space` at its own time, `all` the whole clip."""
WindowsOption = Literal["time_space", "space_time", "none"]
WINDOWS: Mapping[str, Mapping[str, Along]] = {
    "time_space": {"semantic": "time", "motion": "space"},
    "space_time": {"semantic": "space", "motion": "time"},
    "none": {"semantic": "all", "motion": "all"},
}
"""What the queries of each stream look along; the first is CAST's."""
SPANNED: Mapping[Along, tuple[int, ...]] = {"time": (0,), "space": (1, 2), "all": (0, 1, 2)}
"""Axes of a position that vary within a window."""


@dataclass(frozen=True)
class Window:
    """Groups of equal size: the queries of a group look at the keys of that group and at no other. On the CPU, as positions."""

    queries: Int[Tensor, "G q"]
    """Indices of tokens."""
    keys: Int[Tensor, "G k"]
    """Indices of tokens; one may be in several groups."""


def windows_along(queries: Float[Tensor, "Q 3"], keys: Float[Tensor, "K 3"], along: Along) -> tuple[Window, ...]:
    """Groups of queries and of the keys they look at, a `Window` for each size of group; every query is in one group.

    A query looks along `time` at the keys in its own cell of space, along `space` at those in its own cell of time. Two tokens
    share a cell if the place (or time) of one is the nearest that its stream has to the other's; ties count. So streams of one
    grid meet cell by cell; of grids that differ, a cell of the coarser one meets all cells of the finer one that lie in it; and
    a class token, at its frame's centre, meets what is nearest to the centre. Padded tokens keep their places.
    """
    if along == "all":
        return (Window(_indices(queries)[None], _indices(keys)[None]),)
    fixed = [axis for axis in range(3) if axis not in SPANNED[along]]
    (query_places, query_at), (key_places, key_at) = (_places(p[:, fixed]) for p in (queries, keys))
    seen, group_at = _same_cell(query_places, key_places).unique(dim=0, return_inverse=True)
    group, looked_at = group_at[query_at], seen[:, key_at]
    counts = torch.stack((group.bincount(minlength=len(seen)), looked_at.sum(dim=1)), dim=1)
    order, starts = group.argsort(stable=True), counts[:, 0].cumsum(0) - counts[:, 0]
    windows = []
    for size in counts.unique(dim=0):
        chosen = (counts == size).all(dim=1)
        members = order[starts[chosen, None] + torch.arange(int(size[0]), device="cpu")]
        others = looked_at[chosen].nonzero()[:, 1].reshape(len(members), int(size[1]))
        windows.append(Window(members, others))
    return tuple(windows)


def attend_in(
    windows: Sequence[Window],
    attention: Attention,
    queries: Float[Tensor, "B Q D"],
    keys: Float[Tensor, "B K D"],
    mask: Bool[Tensor, "B K"] | None = None,
    *,
    edges: Sequence[Bool[Tensor, "_ _ _ _"]] | None = None,
    return_attention: bool = False,
) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B h Q K"] | None]:
    """What `queries` read from the keys of their windows, and the weights among all tokens (zero outside) if asked for.

    Args:
        windows: From `windows_along`.
        attention: Applied to each group as to a clip of its own.
        queries: Who reads.
        keys: Who is read.
        mask: Where a key is real.
        edges: For each window which of a group's queries look at which of its keys, [B or 1, G, q, k]. `None`: all do.
        return_attention: Give the weights, too.
    """
    batch, reads, weights = len(queries), [], None
    for i, window in enumerate(windows):
        x, y = _grouped(queries, window.queries), _grouped(keys, window.keys)
        lookable = None if mask is None else _grouped(mask, window.keys)
        if edges is not None:
            among = rearrange(edges[i].expand(batch, -1, -1, -1), "B G q k -> (B G) q k")
            lookable = among if lookable is None else among & lookable[:, None]
        read, seen = attention(x, y, lookable, return_attention=return_attention)
        reads.append(rearrange(read, "(B G) q D -> B (G q) D", B=batch))
        if seen is not None:
            weights = seen.new_zeros(batch, seen.shape[1], queries.shape[1], keys.shape[1]) if weights is None else weights
            weights[:, :, window.queries[:, :, None], window.keys[:, None]] = rearrange(
                seen, "(B G) h q k -> B h G q k", B=batch
            )
    order = torch.cat([window.queries.flatten() for window in windows]).argsort()
    return torch.cat(reads, dim=1)[:, order], weights


class StochasticDepth(nn.Module):
    """A residual branch that is left out for some clips in training, and scaled up for the others (arXiv:1603.09382).

    Args:
        rate: Share of clips.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """The branch of clips that keep it, zeros for others."""
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate)).to(branch.dtype)


class BottleneckExchange(nn.Module):
    """Cross-attention of two streams inside a bottleneck: B-CAST (Lee et al. 2023, arXiv:2311.18825, figure 3).

    Both streams are projected down and normed; each reader attends there to the other stream's tokens in its windows; what it
    reads goes through GELU and a projection up and is added to the stream. The projection up starts at zero, as published, so
    that an untrained exchange changes nothing. Both readers see the layer's input. Published tables of positions, learned for
    one grid, are sines and cosines here; as published a reader is told the place along its window only. Published class tokens
    take no part in the attention; here they are tokens at their frame's centre (leave them out with `tokens=patch`).

    Args:
        widths: D of `semantic` and `motion`.
        bottleneck: Width inside; published half of the streams'.
        heads: Attention heads; they divide `bottleneck`.
        direction: Who reads.
        windows: What the queries look along: `time_space` semantic along time and motion along space, as published;
            `space_time` the other way round; `none` over the whole clip.
        dropout: Dropout of attention weights and of the residual branches.
        stochastic_depth: Share of clips that a reader adds nothing to in training; what it adds to others is scaled up.

    Raises:
        ValueError: heads that do not divide the bottleneck, or a bottleneck below 6.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        *,
        bottleneck: int,
        heads: int,
        direction: Direction = "both",
        windows: WindowsOption = "time_space",
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        if bottleneck < 6:
            raise ValueError(f"positions in three axes need a bottleneck of 6 or more, given {bottleneck}")
        self.bottleneck, self.pairs, self.along = bottleneck, READERS[direction], WINDOWS[windows]
        down = {name: nn.Sequential(nn.Linear(d, bottleneck), nn.LayerNorm(bottleneck, eps=1e-6)) for name, d in widths.items()}
        self.down = nn.ModuleDict(down)
        self.attention = nn.ModuleDict({f"{a}_to_{b}": Attention(bottleneck, heads, dropout) for a, b in self.pairs})
        self.up = nn.ModuleDict({a: nn.Sequential(nn.GELU(), nn.Linear(bottleneck, widths[a])) for a, _ in self.pairs})
        self.drop = nn.Sequential(nn.Dropout(dropout), StochasticDepth(stochastic_depth))
        for up in self.up.values():
            for parameter in cast(nn.Sequential, up)[1].parameters():
                nn.init.zeros_(parameter)

    def meeting(self, positions: Mapping[str, Float[Tensor, "_ 3"]]) -> dict[str, tuple[Window, ...]]:
        """The windows of each reader by its name, for `forward`; exchanges of the same options in a row share them."""
        return {f"{a}_to_{b}": windows_along(positions[a], positions[b], self.along[a]) for a, b in self.pairs}

    def forward(
        self,
        values: Mapping[str, Float[Tensor, "B _ _"]],
        positions: Mapping[str, Float[Tensor, "_ 3"]],
        masks: Mapping[str, Bool[Tensor, "B _"] | None],
        meeting: Mapping[str, Sequence[Window]],
        *,
        added_only: bool = False,
        return_attention: bool = False,
    ) -> tuple[dict[str, Float[Tensor, "B _ _"]], dict[str, Float[Tensor, "B h Q K"]]]:
        """Values of both streams after the exchange, and attention by name (`semantic_to_motion`) if asked for.

        With `added_only` what the exchange adds to the values, of the streams that read.
        """
        low = {name: down(values[name]) for name, down in self.down.items()}
        added, seen = {}, {}
        for a, b in self.pairs:
            name = f"{a}_to_{b}"
            x, y = (low[n] + self._placed(positions[n], self.along[a], low[n]) for n in (a, b))
            read, weights = attend_in(
                meeting[name], cast(Attention, self.attention[name]), x, y, masks[b], return_attention=return_attention
            )
            added[a] = self.drop(self.up[a](read))
            if weights is not None:
                seen[name] = weights
        return (added if added_only else {n: v + added[n] if n in added else v for n, v in values.items()}), seen

    def _placed(self, positions: Float[Tensor, "N 3"], along: Along, like: Tensor) -> Float[Tensor, "N d"]:
        spanned = torch.tensor([axis in SPANNED[along] for axis in range(3)], device=positions.device)
        return encode_positions(positions * spanned, self.bottleneck, like.device).to(like.dtype)


def _indices(values: Tensor) -> Int[Tensor, " N"]:
    return torch.arange(len(values), device=values.device)


def _grouped(values: Tensor, index: Int[Tensor, "G n"]) -> Tensor:
    """[B N ...] to [(B G) n ...]."""
    return rearrange(values[:, index], "B G ... -> (B G) ...")


def _places(positions: Float[Tensor, "N A"]) -> tuple[Float[Tensor, "P A"], Int[Tensor, " N"]]:
    """The places there are, and which of them each token is at."""
    codes = torch.zeros(len(positions), dtype=torch.long, device=positions.device)
    for axis in positions.T:
        codes = codes * len(positions) + ranks(axis)
    codes, at = codes.unique(return_inverse=True)
    places = positions.new_empty(len(codes), positions.shape[1])
    places[at] = positions
    return places, at


def _same_cell(queries: Float[Tensor, "P A"], keys: Float[Tensor, "R A"]) -> Bool[Tensor, "P R"]:
    distance = (queries[:, None] - keys).norm(dim=-1)
    nearest_key, nearest_query = distance.amin(dim=1, keepdim=True), distance.amin(dim=0, keepdim=True)
    return (distance <= nearest_key + SAME_PLACE) | (distance <= nearest_query + SAME_PLACE)
