"""Bidirectional cross-attention: each stream's tokens query the other's (plan A).

Axes: B clips, N tokens (Q of queries, K of keys), D width, h heads.
Comes in: tokens of the two streams. Goes out: both streams' masked means after the exchange (or what a learned query reads of
each), side by side.
Blocks are pre-norm transformer decoders without self-attention: multi-head attention of Vaswani et al. 2017
(arXiv:1706.03762), both directions read the layer's input (co-attention, ViLBERT, arXiv:1908.02265, figure 2b), pre-norm
as in Xiong et al. 2020 (arXiv:2002.04745). Tokens know their place by continuous 3-D sines and cosines of their positions,
so that streams of different grids meet on one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vidfuse.models.attention import Attention, AttentivePool, Mlp
from vidfuse.models.checks import check_heads, check_share, check_two_streams
from vidfuse.models.exchange import READERS, Direction
from vidfuse.models.layers import encode_positions, masked_mean, without_padding
from vidfuse.models.parts import Fused, Tokens

Pool = Literal["concat", "mean", "attentive"]
Values = dict[str, Float[Tensor, "B N D"]]
Masks = Mapping[str, Bool[Tensor, "B N"] | None]


class Reader(nn.Module):
    """One stream reads from the other: `x + attention(norm(x), norm(y))`, then `x + mlp(norm(x))`.

    Args:
        width: D of both streams.
        heads: Attention heads.
        mlp_ratio: Hidden width of the feed-forward part, as a multiple of `width`; `None`: no such part.
        dropout: Dropout of attention weights, of the feed-forward part and of both residual branches.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float | None, dropout: float) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(width)
        self.norm_key = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.mlp = None if mlp_ratio is None else nn.Sequential(nn.LayerNorm(width), Mlp(width, mlp_ratio, dropout))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "B Q D"],
        y: Float[Tensor, "B K D"],
        mask: Bool[Tensor, "B K"] | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B h Q K"] | None]:
        """`x` after reading `y`, whose real tokens are where `mask` is True; and the weights if asked for."""
        read, weights = self.attention(self.norm_query(x), self.norm_key(y), mask, return_attention=return_attention)
        x = x + self.drop(read)
        return (x if self.mlp is None else x + self.drop(self.mlp(x))), weights


class Exchange(nn.Module):
    """One layer: the readers of a direction, all reading the layer's input."""

    def __init__(self, direction: Direction, width: int, heads: int, mlp_ratio: float | None, dropout: float) -> None:
        super().__init__()
        readers = {f"{a}_to_{b}": Reader(width, heads, mlp_ratio, dropout) for a, b in READERS[direction]}
        self.readers = nn.ModuleDict(readers)
        self.pairs = READERS[direction]

    def forward(
        self, values: Values, masks: Masks, *, return_attention: bool = False
    ) -> tuple[Values, dict[str, Float[Tensor, "B h Q K"]]]:
        """Values of both streams after the layer, and attention by name (`semantic_to_motion`) if asked for."""
        after, attention = dict(values), {}
        for a, b in self.pairs:
            name = f"{a}_to_{b}"
            after[a], weights = self.readers[name](values[a], values[b], masks[b], return_attention=return_attention)
            if weights is not None:
                attention[name] = weights
        return after, attention


class CrossAttention(nn.Module):
    """Projection and positions, exchange layers, pooling.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        layers: The exchange layers, in order.
        width: D that both streams are projected to.
        dropout: Dropout of the projected tokens.
        pool: `concat` puts the two pooled streams side by side, `mean` averages them; `attentive` puts side by side what a
            learned query reads of each.
        heads: Attention heads of these queries.
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        layers: Sequence[Exchange],
        *,
        width: int,
        dropout: float,
        pool: Pool,
        heads: int,
    ) -> None:
        super().__init__()
        self.token_width = width
        self.width = width if pool == "mean" else width * len(widths)
        self.pool = pool
        self.project = nn.ModuleDict({n: nn.Sequential(nn.LayerNorm(d), nn.Linear(d, width)) for n, d in widths.items()})
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.ModuleDict({name: nn.LayerNorm(width) for name in widths})
        self.read = nn.ModuleDict({name: AttentivePool(width, heads) for name in widths} if pool == "attentive" else {})

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The exchange layers."""
        return tuple(self.layers)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature; attention of all heads as `layer<i>.<who queries>_to_<who is looked at>` if asked for."""
        values = {name: self._placed(name, streams[name]) for name in self.project}
        masks = {name: streams[name].mask for name in self.project}
        attention: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            values, seen = layer(values, masks, return_attention=return_attention)
            attention |= {f"layer{i}.{name}": weights for name, weights in seen.items()}
        normed = {n: Tokens(norm(values[n]), streams[n].positions, masks[n]) for n, norm in self.norm.items()}
        pooled = [self.read[n](tokens) if self.read else masked_mean(tokens) for n, tokens in normed.items()]
        return Fused(torch.stack(pooled).mean(dim=0) if self.pool == "mean" else torch.cat(pooled, dim=-1), attention)

    def _placed(self, name: str, tokens: Tokens) -> Float[Tensor, "B N D"]:
        values = self.project[name](without_padding(tokens).values)
        return self.drop(values + encode_positions(tokens.positions, self.token_width, values.device).to(values.dtype))


def build(
    *,
    widths: Mapping[str, int],
    width: int = 512,
    heads: int = 8,
    layers: int = 1,
    direction: Direction = "both",
    mlp_ratio: float | None = 4.0,
    dropout: float = 0.1,
    pool: Pool = "concat",
) -> CrossAttention:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        width: D that both streams are projected to.
        heads: Attention heads; they divide `width`.
        layers: Exchange layers.
        direction: `semantic_to_motion`: semantic tokens query motion tokens, motion stays as it is; and so on.
        mlp_ratio: Hidden width of a block's feed-forward part, as a multiple of `width`. `None`: attention only.
        dropout: Dropout of tokens, attention weights and residual branches.
        pool: How the two streams become the feature: their means side by side (`concat`, 2 x `width`), the mean of these
            (`mean`, `width`), or what a learned query reads of each, side by side (`attentive`, 2 x `width`).

    Raises:
        ValueError: not exactly the two streams; heads that do not divide the width; a number outside its range.
    """
    check_two_streams("cross_attention", widths)
    check_heads(width, heads)
    check_share("dropout", dropout)
    if layers < 1 or width < 6 or (mlp_ratio is not None and mlp_ratio * width < 1):
        raise ValueError(
            f"layers >= 1, width >= 6 and mlp_ratio > 0 (or null) are needed, given {layers=}, {width=}, {mlp_ratio=}"
        )
    exchanges = [Exchange(direction, width, heads, mlp_ratio, dropout) for _ in range(layers)]
    return CrossAttention(widths, exchanges, width=width, dropout=dropout, pool=pool, heads=heads)
