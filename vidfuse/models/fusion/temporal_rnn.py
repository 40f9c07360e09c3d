"""A recurrent network over a stream's frames, then attention among them (plan D): the CNN-RNN baseline.

Axes: B clips, N tokens, S different times of a stream, D width of a token, F width of a feature.
Comes in: tokens of one stream. Goes out: the mean over time of what each time reads from all, by dot-product attention, of the
states of a one-layer LSTM. Tokens of equal time are averaged first; the order of times is that of their positions.
Source: recurrent networks over a CNN's frames are Donahue et al. 2015 (arXiv:1411.4389, LRCN); LSTM is Hochreiter and
Schmidhuber 1997; attention is Vaswani et al. 2017 (arXiv:1706.03762, equation 1) with one head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from vidfuse.models.checks import check_share
from vidfuse.models.layers import masked_mean, ranks, without_padding
from vidfuse.models.parts import Fused, Tokens


class TimeAttention(nn.Module):
    """Dot-product attention of a sequence over itself; the value keeps the width of the feature."""

    def __init__(self, width: int, attention_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, attention_width)
        self.key = nn.Linear(width, attention_width)
        self.value = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B S F"], real: Bool[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B S F"], Float[Tensor, "B S S"]]:
        """What each time reads from the real ones, and the weights (float32; zero in a clip without a real time)."""
        query, key = self.query(x), self.key(x)
        scores = (query @ key.mT).float() / math.sqrt(query.shape[-1])
        some = real.any(dim=1)[:, None, None]
        weights = scores.masked_fill(~real[:, None] & some, -torch.inf).softmax(dim=-1) * some
        return weights.to(x.dtype) @ self.value(x), weights


class TemporalRnn(nn.Module):
    """Mean of the tokens of each time, LSTM, attention among times, mean over times.

    Args:
        name: The stream.
        lstm: Over the times, batch first.
        attention: Among the times. `None`: the LSTM's states are averaged as they are.
        dropout: Dropout of the LSTM's states.
    """

    def __init__(self, name: str, lstm: nn.LSTM, attention: TimeAttention | None, *, dropout: float) -> None:
        super().__init__()
        self.name = name
        self.width = lstm.hidden_size * (1 + lstm.bidirectional)
        self.lstm = lstm
        self.attention = attention
        self.drop = nn.Dropout(dropout)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The attention; recomputing the LSTM would cost more time than its states cost memory."""
        return () if self.attention is None else (self.attention,)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature; attention as `time.<stream>_to_<stream>` if asked for.

        Attention is among times; given for tokens, each has its time's row, and a time's weight is shared equally by the
        real tokens that were averaged.
        """
        tokens = without_padding(streams[self.name])
        times, share = _by_time(tokens)
        assert times.mask is not None
        states = self.drop(self._states(times.values, None if tokens.mask is None else times.mask))
        if self.attention is None:
            return Fused(masked_mean(replace(times, values=states)), {})
        read, weights = self.attention(states, times.mask)
        feature = masked_mean(replace(times, values=read))
        if not return_attention:
            return Fused(feature, {})
        by_token = (weights @ share)[:, ranks(tokens.positions[:, 0])]
        return Fused(feature, {f"time.{self.name}_to_{self.name}": by_token[:, None]})

    def _states(self, x: Float[Tensor, "B S D"], real: Bool[Tensor, "B S"] | None) -> Float[Tensor, "B S F"]:
        """States of the LSTM at the real times, as if there were no others (on the meta device nothing is known of them)."""
        if real is None or real.is_meta:
            return self.lstm(x)[0]
        order = (~real).long().argsort(dim=1, stable=True)
        first = x.take_along_dim(order[..., None], dim=1)
        packed = pack_padded_sequence(first, real.sum(dim=1).clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return states.take_along_dim(order.argsort(dim=1)[..., None], dim=1)


def build(
    *,
    widths: Mapping[str, int],
    hidden: int = 256,
    bidirectional: bool = True,
    dropout: float = 0.3,
    attention: bool = True,
    attention_width: int = 256,
) -> TemporalRnn:
    """Build the fusion.

    Args:
        widths: D of the tokens of the one stream.
        hidden: Width of the LSTM's state, of each direction.
        bidirectional: Run the LSTM in both directions of time; the feature is twice as wide.
        dropout: Dropout of the LSTM's states.
        attention: Let each time read from all before the mean is taken.
        attention_width: Width of the attention's queries and keys.

    Raises:
        ValueError: not exactly one stream, or a number outside its range.
    """
    if len(widths) != 1:
        raise ValueError(
            f"fusion temporal_rnn takes one stream, given {' and '.join(widths) or 'none'}; "
            "leave one out, or take a fusion that joins streams, such as concat"
        )
    check_share("dropout", dropout)
    if hidden < 1 or attention_width < 1:
        raise ValueError(f"hidden >= 1 and attention_width >= 1 are needed, given {hidden=}, {attention_width=}")
    (name, width), *_ = widths.items()
    lstm = nn.LSTM(width, hidden, batch_first=True, bidirectional=bidirectional)
    reader = TimeAttention(hidden * (1 + bidirectional), attention_width) if attention else None
    return TemporalRnn(name, lstm, reader, dropout=dropout)


def _by_time(tokens: Tokens) -> tuple[Tokens, Float[Tensor, "B S N"]]:
    """Mean of the real tokens of each time in order (masked where there is none), and each token's share of it (float32)."""
    member = F.one_hot(ranks(tokens.positions[:, 0])).T.float()
    share = member.to(tokens.values.device).expand(len(tokens.values), -1, -1)
    if tokens.mask is not None:
        share = share * tokens.mask[:, None]
    count = share.sum(dim=-1, keepdim=True)
    share = share / count.clamp(min=1)
    places = member / member.sum(dim=-1, keepdim=True) @ tokens.positions
    return Tokens(share.to(tokens.values.dtype) @ tokens.values, places, count[..., 0] > 0), share
