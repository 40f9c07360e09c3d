"""Where a run and its driver meet: an actor. Its module imports next to nothing, since its process has to start for each run.

Comes in: a worker's events, faults and warnings; a driver's wish to stop. Goes out: the same, to the other side.
"""

from __future__ import annotations

from typing import Any

import ray


@ray.remote(num_cpus=0)
class Monitor:
    """Where a run and its driver meet: the newest progress event one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._event: dict[str, Any] = {}
        self._unheard: dict[str, Any] = {}
        self._stop = False
        self._fault: str | None = None
        self._warnings: list[str] = []
        self._judged: list[dict[str, Any]] = []

    def tell(self, event: dict[str, Any]) -> bool:
        """A worker's event; answers whether the run is to stop."""
        self._event = self._unheard = event
        if "top1" in event:
            self._judged.append(event)
        return self._stop

    def judged(self, since: int) -> list[dict[str, Any]]:
        """Validations in order, without the first `since`."""
        return self._judged[since:]

    def latest(self) -> dict[str, Any]:
        """The newest event; empty before the first."""
        return self._event

    def hand_over(self) -> dict[str, Any]:
        """The newest event that was not handed over before, for the next try of the workers."""
        event, self._unheard = self._unheard, {}
        return event

    def stop(self) -> None:
        """Ask the run to end with a checkpoint."""
        self._stop = True

    def warn(self, message: str) -> None:
        """Have the driver tell a person."""
        self._warnings.append(message)

    def warnings(self) -> list[str]:
        """All so far."""
        return self._warnings

    def begin(self) -> None:
        """Workers have started (anew): why an earlier one gave up is no longer why the run ends."""
        self._fault = None

    def fault(self, message: str | None = None) -> str | None:
        """Note why a worker gave up, in words for a person; answers the first such note."""
        self._fault = self._fault or message
        return self._fault
