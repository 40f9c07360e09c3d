"""Where the time of a run goes: waiting for data, stepping, the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Clock:
    """Seconds and steps since the start, and since the last `lap` of each who asks."""

    wait_seconds: float = 0.0
    """Spent waiting for batches."""
    busy_seconds: float = 0.0
    """Spent from asking for a batch to the end of its step (waiting included; validation and checkpoints not)."""
    steps: int = 0
    started: float = field(default_factory=time.monotonic)
    _laps: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def timed(self, steps: Iterator[T]) -> Iterator[T]:
        """The same steps; what passes until each comes counts as waiting."""
        while True:
            asked = time.monotonic()
            step = next(steps, None)
            came = time.monotonic()
            if step is None:
                return
            yield step
            self.wait_seconds += came - asked
            self.busy_seconds += time.monotonic() - asked
            self.steps += 1

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def speed(self, batch: int) -> dict[str, float]:
        """`clips_per_second`, `data_wait_fraction` and `step_seconds` over all steps so far, of `batch` clips each."""
        return _speed(self.wait_seconds, self.busy_seconds, self.steps, batch)

    def lap(self, batch: int, of: str) -> dict[str, float]:
        """The same since the last lap of one who asks."""
        now = (self.wait_seconds, self.busy_seconds, self.steps)
        past, self._laps[of] = self._laps.get(of, (0.0, 0.0, 0)), now
        return _speed(now[0] - past[0], now[1] - past[1], now[2] - past[2], batch)


def _speed(wait: float, busy: float, steps: int, batch: int) -> dict[str, float]:
    busy = max(busy, 1e-9)
    return {
        "clips_per_second": round(steps * batch / busy, 3),
        "data_wait_fraction": round(wait / busy, 4),
        "step_seconds": round(busy / max(steps, 1), 4),
    }
