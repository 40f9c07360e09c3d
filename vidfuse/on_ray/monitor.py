"""Where a run and its driver meet: an actor. Its module imports next to nothing, since its process has to start for each run.

Comes in: a worker's events, faults and warnings; a driver's wish to stop. Goes out: the same, to the other side.
"""

from __future__ import annotations

import time
from typing import Any

import ray

RUN = "run "
"""What the name that a monitor shows in Ray's table of actors begins with."""


class Tries:
    """The tries of a run, as its figures have them: starts of the workers, and what lies between.

    Times are this process' own. Lost is the time from the last step that was heard of before a restart to the first one after it that is
    ahead of that.
    """

    def __init__(self) -> None:
        self._size: int | None = None
        self._furthest = self._step = -1
        self._heard = time.time()
        self._behind_since: float | None = None
        self._restarts = self._resizes = 0
        self._lost = 0.0

    def begin(self, size: int) -> None:
        """So many workers have started."""
        if self._size is not None:
            self._restarts += 1
            self._resizes += size != self._size
            self._behind_since = self._behind_since or self._heard
        self._size = size

    def hear(self, step: int, *, judged: bool) -> None:
        """The newest step of the workers; `judged`: they have just validated."""
        now = time.time()
        if step != self._step or judged:
            self._step, self._heard = step, now
        if step > self._furthest:
            self._furthest = step
            if self._behind_since is not None:
                self._lost += now - self._behind_since
                self._behind_since = None

    def figures(self) -> dict[str, float]:
        """By their names in the table of metrics."""
        behind = 0.0 if self._behind_since is None else time.time() - self._behind_since
        return {
            "progress_timestamp_seconds": self._heard,
            "restarts_total": self._restarts,
            "resizes_total": self._resizes,
            "lost_seconds_total": self._lost + behind,
        }


@ray.remote(num_cpus=0)
class Monitor:
    """Where a run and its driver meet: the newest progress event one way, the wish to stop the other.

    Args:
        name: of the run; other jobs see it in Ray's table of actors.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._placing: tuple[str, float] | None = None
        self._event: dict[str, Any] = {}
        self._unheard: dict[str, Any] = {}
        self._stop = False
        self._fault: str | None = None
        self._warnings: list[str] = []
        self._judged: list[dict[str, Any]] = []
        self._tries = Tries()

    def __repr__(self) -> str:
        return f"{RUN}{self._name}"

    def place(self, controller: str | None) -> None:
        """The controller of the workers (an actor's id) tries to place them; `None`: they run, or the run ends."""
        if controller is None:
            self._placing = None
        elif self._placing is None or self._placing[0] != controller:
            self._placing = (controller, time.time())

    def placing(self) -> tuple[str, float] | None:
        """The controller that tries to place workers, and for how many seconds."""
        return None if self._placing is None else (self._placing[0], time.time() - self._placing[1])

    def tell(self, event: dict[str, Any]) -> bool:
        """A worker's event; answers whether the run is to stop."""
        self._event = self._unheard = event
        self._tries.hear(event["step"], judged="top1" in event)
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

    def begin(self, size: int) -> None:
        """So many workers have started (anew): why an earlier one gave up is no longer why the run ends."""
        self._fault = None
        self._tries.begin(size)

    def figures(self) -> dict[str, float]:
        """What those who watch are told of the tries so far."""
        return self._tries.figures()

    def fault(self, message: str | None = None) -> str | None:
        """Note why a worker gave up, in words for a person; answers the first such note."""
        self._fault = self._fault or message
        return self._fault
