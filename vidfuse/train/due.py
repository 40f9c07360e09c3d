"""When a checkpoint inside an epoch is due: by optimizer steps, by samples, by minutes.

Comes in: steps as they pass. Goes out: yes or no, the same on all ranks. Steps and samples are the same everywhere; of the time
only rank 0's clock counts, and its word travels with the sums of the next step.
"""

from __future__ import annotations

import time

from vidfuse.config import TrainConfig


class Due:
    """Since the last checkpoint.

    Args:
        train: the intervals.
        samples: used so far, over all epochs.
    """

    def __init__(self, train: TrainConfig, *, samples: int) -> None:
        self._steps, self._samples, self._minutes = (
            train.checkpoint_every_steps,
            train.checkpoint_every_samples,
            train.checkpoint_every_minutes,
        )
        self._saved_samples, self._saved_step, self._since = samples, -1, time.monotonic()
        self.now = False
        """Whether one is due."""

    def asks(self) -> bool:
        """Whether the minutes have passed: said once, before a step."""
        if self._minutes is None or time.monotonic() - self._since < 60 * self._minutes:
            return False
        self._since = time.monotonic()
        return True

    def passed(self, step: int, samples: int, *, asked: bool) -> None:
        """A step is done; `asked`: rank 0 asked for a checkpoint with the step before it."""
        by_steps = self._steps is not None and step % self._steps == 0
        by_samples = self._samples is not None and samples - self._saved_samples >= self._samples
        # A checkpoint since it was asked for is the one that was asked for.
        by_minutes = asked and self._saved_step < step - 1
        self.now = self.now or by_steps or by_samples or by_minutes

    def saved(self, step: int, samples: int) -> None:
        """A checkpoint was saved."""
        self._saved_step, self._saved_samples, self._since, self.now = step, samples, time.monotonic(), False
