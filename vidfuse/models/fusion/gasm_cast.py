"""Graph attention within each stream, then bottleneck cross-attention between them: GASM-CAST (plan B).

Axes: B clips, N tokens (Q of queries, K of keys), D width, h heads; G groups of q and k tokens.
Comes in: tokens of the two streams. Goes out: both streams' masked means, layer-normalised, side by side. In the semantic stream
the patches of a frame are a graph: those are joined whose features are alike. In the motion stream the tokens of a place are
one over the clip's segments (its different times): those at most `time_reach` segments apart are joined. Every token is joined
to itself. A motion stream of one token a segment is the plan's; with a grid, each cell has its own graph.
Source: the plan and its author's public notes (similarity threshold 0.8, window of 2, mean pooling and concatenation). Attention
restricted to a graph's edges is Velickovic et al. 2018 (arXiv:1710.10903), here with the dot products of Dwivedi and Bresson
2021 (arXiv:2012.09699); the exchanges are B-CAST (Lee et al. 2023, arXiv:2311.18825), `layers.BottleneckExchange`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vidfuse.models.attention import Attention
from vidfuse.models.checks import check_heads, check_share, check_two_streams
from vidfuse.models.exchange import BottleneckExchange, Direction, Window, WindowsOption, attend_in, windows_along
from vidfuse.models.layers import masked_mean, ranks, without_padding
from vidfuse.models.parts import Fused, Tokens

Edges = Sequence[Bool[Tensor, "_ _ _ _"]]


class GraphAttention(nn.Module):
    """Tokens read from their neighbours in a graph: `x + attention(norm(x))` over its edges.

    Args:
        width: D of the stream.
        heads: Attention heads; they divide `width`.
        dropout: Dropout of the attention weights and of the residual branch.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        mask: Bool[Tensor, "B N"] | None,
        windows: Sequence[Window],
        edges: Edges,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B h N N"] | None]:
        """`x` after reading, and the weights if asked for; a token sees its real neighbours."""
        normed = self.norm(x)
        read, weights = attend_in(windows, self.attention, normed, normed, mask, edges=edges, return_attention=return_attention)
        return x + self.drop(read), weights


class GasmCast(nn.Module):
    """Graph attention in each stream, exchanges between them, pooling.

    Args:
        graphs: Graph attention of `semantic` and `motion`.
        layers: The exchanges, in order; of the same options.
        widths: D of the tokens of `semantic` and `motion`.
        similarity: Cosine similarity from which on two patches of a frame are joined.
        time_reach: Segments up to which two tokens of a place are joined.
    """

    def __init__(
        self,
        graphs: Mapping[str, GraphAttention],
        layers: Sequence[BottleneckExchange],
        *,
        widths: Mapping[str, int],
        similarity: float,
        time_reach: int,
    ) -> None:
        super().__init__()
        self.width = sum(widths.values())
        self.similarity = similarity
        self.time_reach = time_reach
        self.graphs = nn.ModuleDict(graphs)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(d) for name, d in widths.items()})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Graph attention of both streams, then the exchanges."""
        return (*self.graphs.values(), *self.layers)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature; attention as `graph.<stream>_to_<stream>` and `layer<i>.<queries>_to_<keys>` if asked for."""
        tokens = {name: without_padding(streams[name]) for name in self.norm}
        positions = {name: t.positions for name, t in tokens.items()}
        masks = {name: t.mask for name, t in tokens.items()}
        values, attention = {}, {}
        for name, graph in self.graphs.items():
            windows, edges = self._spatial(tokens[name]) if name == "semantic" else self._temporal(tokens[name])
            values[name], weights = graph(tokens[name].values, masks[name], windows, edges, return_attention=return_attention)
            if weights is not None:
                attention[f"graph.{name}_to_{name}"] = weights
        meeting = cast(BottleneckExchange, self.layers[0]).meeting(positions)
        for i, layer in enumerate(self.layers):
            values, seen = layer(values, positions, masks, meeting, return_attention=return_attention)
            attention |= {f"layer{i}.{name}": weights for name, weights in seen.items()}
        pooled = [masked_mean(Tokens(norm(values[n]), positions[n], masks[n])) for n, norm in self.norm.items()]
        return Fused(torch.cat(pooled, dim=-1), attention)

    def _spatial(self, tokens: Tokens) -> tuple[Sequence[Window], Edges]:
        """Groups of tokens of equal time; edges between those that are alike."""
        windows = windows_along(tokens.positions, tokens.positions, "space")
        unit = F.normalize(tokens.values.detach().float(), dim=-1)
        alike = [unit[:, w.queries] @ unit[:, w.keys].mT >= self.similarity for w in windows]
        return windows, [a | _selves(w).to(a.device) for a, w in zip(alike, windows, strict=True)]

    def _temporal(self, tokens: Tokens) -> tuple[Sequence[Window], Edges]:
        """Groups of tokens of equal place; edges between those that are near in time."""
        windows = windows_along(tokens.positions, tokens.positions, "time")
        segment = ranks(tokens.positions[:, 0])
        apart = [(segment[w.queries][:, :, None] - segment[w.keys][:, None]).abs() for w in windows]
        near = [(a <= self.time_reach)[None] | _selves(w) for a, w in zip(apart, windows, strict=True)]
        return windows, [edges.to(tokens.values.device) for edges in near]


def build(
    *,
    widths: Mapping[str, int],
    similarity: float = 0.8,
    time_reach: int = 2,
    layers: int = 3,
    bottleneck: int = 256,
    heads: int = 8,
    graph_heads: int | None = None,
    direction: Direction = "both",
    windows: WindowsOption = "time_space",
    dropout: float = 0.1,
) -> GasmCast:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        similarity: Cosine similarity, -1 to 1, from which on two tokens of a semantic frame are joined; 1: hardly any, -1: all.
        time_reach: Segments up to which two motion tokens of a place are joined; 0: each with itself only.
        layers: Exchanges between the streams.
        bottleneck: Width inside an exchange.
        heads: Attention heads of an exchange; they divide `bottleneck`.
        graph_heads: Heads of the graph attention; they divide both widths. `None`: the most up to `heads` that do.
        direction: `semantic_to_motion`: semantic tokens query motion tokens, motion is not changed by them; and so on.
        windows: What the queries of an exchange look along: `time_space` semantic along time and motion along space, as CAST
            publishes it; `space_time` the other way round; `none` over the whole clip.
        dropout: Dropout of attention weights and of the residual branches.

    Raises:
        ValueError: not exactly the two streams; heads that do not divide their width; a number outside its range.
    """
    check_two_streams("gasm_cast", widths)
    check_heads(bottleneck, heads)
    check_share("dropout", dropout)
    if not -1 <= similarity <= 1 or time_reach < 0 or layers < 1:
        raise ValueError(
            f"similarity in -1..1, time_reach >= 0 and layers >= 1 are needed, given {similarity=:g}, {time_reach=}, {layers=}"
        )
    if graph_heads is None:
        graph_heads = next(h for h in range(heads, 0, -1) if all(d % h == 0 for d in widths.values()))
    for width in widths.values():
        check_heads(width, graph_heads)
    graphs = {name: GraphAttention(d, graph_heads, dropout) for name, d in widths.items()}
    exchanges = [
        BottleneckExchange(widths, bottleneck=bottleneck, heads=heads, direction=direction, windows=windows, dropout=dropout)
        for _ in range(layers)
    ]
    return GasmCast(graphs, exchanges, widths=widths, similarity=similarity, time_reach=time_reach)


def _selves(window: Window) -> Bool[Tensor, "1 G q k"]:
    return (window.queries[:, :, None] == window.keys[:, None])[None]
