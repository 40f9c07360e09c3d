"""An exponential moving average of the weights, sharded as the optimizer's.

Comes in: an engine after each optimizer step. Goes out: for as long as a context is open, an engine whose weights are the average.
Each rank averages its own fp32 shard (one more of it, on the same device); nothing is gathered until the average is looked at.
Buffers are not averaged: they are the model's own at every moment. A step that fp16's loss scaling skips counts as one.

Polyak and Juditsky 1992 average iterates; the warm-up of the decay is Katherine Crowson's, as in timm's `ModelEmaV3`
(Apache-2.0) with its default power 2/3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vidfuse.config import TrainConfig
from vidfuse.train.engine import Engine, assign_masters, masters, show_masters

PIECE = 2**24
"""Elements that are exchanged at a time, so that showing the average takes no second copy of the shard."""


def decay_at(step: int, decay: float, *, warmup: bool) -> float:
    """How much of the average step number `step` leaves: nothing at the first, whose weights the average then is.

    Args:
        step: of the optimizer, from 1.
        decay: largest share.
        warmup: whether it grows as 1 - step^(-2/3) until then.
    """
    if step <= 1:
        return 0.0
    return min(decay, 1 - step ** (-2 / 3)) if warmup else decay


class Average:
    """The average of an engine's trained weights. All ranks call everything.

    Args:
        engine: whose weights are the average's first.
        decay: see `decay_at`.
        warmup: see `decay_at`.
    """

    def __init__(self, engine: Engine, *, decay: float, warmup: bool) -> None:
        self._decay, self._warmup = decay, warmup
        self._shards = [shard.clone() for shard in masters(engine)]

    @classmethod
    def of(cls, engine: Engine, train: TrainConfig) -> Average | None:
        """The average that a config asks for, if it does."""
        return cls(engine, decay=train.ema_decay, warmup=train.ema_warmup) if train.ema_decay is not None else None

    def update(self, engine: Engine, step: int) -> None:
        """Take in the weights after step number `step`, from 1."""
        torch._foreach_lerp_(self._shards, masters(engine), 1 - decay_at(step, self._decay, warmup=self._warmup))

    @contextmanager
    def shown(self, engine: Engine) -> Iterator[None]:
        """The engine computes with the average and exports it; afterwards its own weights are there again, bit for bit.

        After an exception inside they are not, and the run is over: one rank alone must not wait for the others here.
        """
        self._exchange(engine)
        show_masters(engine)
        yield
        self._exchange(engine)
        show_masters(engine)

    def load(self, engine: Engine, tensors: Mapping[str, Tensor]) -> None:
        """Take over an average that was exported, at whatever world size: whole fp32 parameters by name."""
        self._shards = [shard.clone() for shard in masters(engine)]
        assign_masters(engine, tensors)
        self._exchange(engine)

    def _exchange(self, engine: Engine) -> None:
        for mine, theirs in zip(self._shards, masters(engine), strict=True):
            for a, b in zip(_pieces(mine), _pieces(theirs), strict=True):
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.view(-1).split(PIECE) if tensor.is_contiguous() else (tensor,)
