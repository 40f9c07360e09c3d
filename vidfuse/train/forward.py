"""A batch to logits: the one place where what a loader gives meets what a model takes.

Comes in: a recogniser (or the engine around it) and a batch on its device. Goes out: logits [B, K].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vidfuse.data.batch import Batch
from vidfuse.models.parts import Tokens


def forward(model: Callable[..., Any], batch: Batch, clips: Tensor | None = None) -> Tensor:
    """Logits of a batch; `clips` stand in for its own, if they are given."""
    seen = batch.clips if clips is None else clips
    cached = {name: Tokens(of.values, of.positions) for name, of in batch.features.items()}
    logits: Tensor = model(seen, cached) if cached else model(seen)
    return logits
