"""Attention of one stream's tokens over another's, and what goes with it.

Axes: B clips, N tokens (Q of queries, K of keys), D width of a token, h heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vidfuse.models.checks import check_heads
from vidfuse.models.layers import without_padding
from vidfuse.models.parts import Tokens


class Attention(nn.Module):
    """Multi-head attention of one stream's tokens over another's (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    Args:
        width: D of queries, keys and result.
        heads: Number of heads; divides `width`.
        dropout: Dropout of the attention weights.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B K D"],
        mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"] | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B h Q K"] | None]:
        """What `queries` read from `keys`, and the weights they did it with (float32, before dropout) if asked for.

        Where `mask` is False a key is not looked at (by that query); with no key to look at a query reads zero with weights
        of zero.
        """
        q = rearrange(self.query(queries), "B Q (h d) -> B h Q d", h=self.heads)
        k, v = rearrange(self.key_value(keys), "B K (two h d) -> two B h K d", two=2, h=self.heads)
        weights = self._weights(q, k, mask) if return_attention else None
        read = self._read(q, k, v, mask) if weights is None else self._dropped(weights).to(v.dtype) @ v
        if mask is not None:
            read = read * _looking(mask)
        return self.out(rearrange(read, "B h Q d -> B Q (h d)")), weights

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else _lookable(mask), dropout_p=dropout)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
        if mask is None:
            return scores.softmax(dim=-1)
        return scores.masked_fill(~_lookable(mask), -torch.inf).softmax(dim=-1) * _looking(mask)

    def _dropped(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout, self.training)


class Mlp(nn.Sequential):
    """The feed-forward part of a transformer block: wide, GELU, back."""

    def __init__(self, width: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class AttentivePool(nn.Module):
    """One learned query reads all tokens (the attentive probe of V-JEPA: Bardes et al. 2024, arXiv:2404.08471, section 4.2).

    Args:
        width: D of the tokens.
        heads: Attention heads; they divide `width`.
        mlp_ratio: Hidden width of the feed-forward part after it, as a multiple of `width`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), Mlp(width, mlp_ratio))

    def forward(self, tokens: Tokens) -> Float[Tensor, "B D"]:
        """The clip's feature; padded tokens are not looked at."""
        query = self.query.expand(len(tokens.values), -1, -1)
        x = query + self.attention(query, self.norm(without_padding(tokens).values), tokens.mask)[0]
        return (x + self.mlp(x))[:, 0]


def _lookable(mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"]) -> Bool[Tensor, "B 1 _ K"]:
    """The mask as attention takes it; a query with no key looks at all (softmax of nothing is not a number)."""
    by_query = mask if mask.ndim == 3 else mask[:, None]
    return (by_query | ~by_query.any(dim=-1, keepdim=True))[:, None]


def _looking(mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"]) -> Bool[Tensor, "B 1 _ 1"]:
    """Whether a query has a key to look at."""
    by_query = mask if mask.ndim == 3 else mask[:, None]
    return by_query.any(dim=-1, keepdim=True)[:, None]
