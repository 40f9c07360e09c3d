"""Many units of work in Ray tasks, and how far they are.

Comes in: a function and its units. Goes out: results as they come; an error of a file or of the network, or a death, in words.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from vidfuse.data.shards import DataError
from vidfuse.on_ray.waiting import Asked, wait_for_room

NOTE_SECONDS = 2.0
"""Between two notes of how far a unit is."""
_BOARD_SECONDS = 5.0
"""How long the board of what is under way is waited for."""
_CANCEL_SECONDS = 10.0
_RETRIES = 3
"""Of a unit whose process or machine dies."""


@dataclass
class Progress:
    """How far packing or checking is."""

    bytes_total: int
    videos_total: int
    bytes: int = 0
    videos: int = 0
    quarantined: int = 0
    bytes_before: int = 0
    """Done by an earlier run."""
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """In words: share, rates, time left."""
        seconds = max(time.monotonic() - self.started, 1e-6)
        rate = (self.bytes - self.bytes_before) / seconds
        share = 100 * self.bytes / max(1, self.bytes_total)
        left_out = f", {self.quarantined} left out" if self.quarantined else ""
        eta = _duration((self.bytes_total - self.bytes) / rate) if rate else "unknown"
        return f"{self.videos}/{self.videos_total} videos ({share:.0f} %), {rate / 1e6:.1f} MB/s{left_out}, eta {eta}"

    def add(self, videos: int, size: int, *, before: bool = False) -> None:
        """Count videos and bytes; `before`: done by an earlier run."""
        self.videos += videos
        self.bytes += size
        self.bytes_before += size if before else 0

    def with_more(self, videos: int, size: int) -> Progress:
        """With what is done of units that are under way."""
        return replace(self, videos=self.videos + videos, bytes=self.bytes + size)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_tasks(
    function: Callable[..., Any],
    units: Sequence[tuple[Any, ...]],
    *,
    names: Sequence[str] = (),
    on_wait: Callable[[], None] | None = None,
    wait_seconds: float = 10.0,
) -> Iterator[tuple[int, Any]]:
    """Call a function once for each unit in Ray tasks of one CPU, a bounded number at a time.

    Args:
        function: What a task does.
        units: Its arguments, each time.
        names: What the units are called in errors; without them, by their numbers.
        on_wait: Called when no task has ended for `wait_seconds`.
        wait_seconds: Between two such calls.

    Yields:
        The unit's number and the function's result, as they come.

    Raises:
        ValueError: raised by the function, as it was raised there.
        DataError: an error of a file or of the network, or workers that died, in words.
    """
    wait_for_room(Asked(1, 1.0, 0.0))
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(function)
    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pending: dict[Any, int] = {}
    rest = iter(enumerate(units))
    try:
        while True:
            while len(pending) < limit and (unit := next(rest, None)) is not None:
                pending[task.remote(*unit[1])] = unit[0]
            if not pending:
                return
            ended = ray.wait(list(pending), num_returns=1, timeout=wait_seconds)[0]
            for ref in ended:
                number = pending.pop(ref)
                yield number, _result(ref, names[number] if names else f"unit {number}")
            if not ended and on_wait:
                on_wait()
    finally:
        _cancel(list(pending))


def _cancel(refs: list[Any]) -> None:
    """Stop tasks and fetch how they ended: Ray prints errors that nobody fetches."""
    for ref in refs:
        ray.cancel(ref)
    for ref in ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_SECONDS)[0] if refs else ():
        with contextlib.suppress(RayError, ValueError, OSError):
            ray.get(ref)


def _result(ref: Any, name: str) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):
            raise cause from None
        if isinstance(cause, OSError):
            raise DataError(
                f"{name}: a Ray task failed: {' '.join(str(cause).split())}; give the same command again to continue"
            ) from None
        raise
    except RayError as error:
        raise DataError(
            f"{name}: the process or the machine that worked on it died, after {_RETRIES} retries, too ({type(error).__name__}): no"
            f" memory is left there, or a video crashes the decoder; give the same command again to continue, with more memory or"
            f" fewer CPUs for Ray; what dies again should be looked for among the videos of {name}"
        ) from None


class Teller:
    """Tells how far a job is: what has ended, and what is done of the units that are under way."""

    def __init__(self, progress: Progress, on_progress: Callable[[Progress], None] | None) -> None:
        self.board: Any = Board.remote()  # type: ignore[attr-defined]
        """For the tasks."""
        self._progress, self._on_progress = progress, on_progress

    def __call__(self, ended: str | None = None) -> None:
        """Tell it; `ended`: name of a unit that is counted now."""
        if ended is not None:
            self.board.forget.remote(ended)
        more = (0, 0)
        with contextlib.suppress(RayError):  # its node may die: then there is less to tell
            more = ray.get(self.board.total.remote(), timeout=_BOARD_SECONDS)
        if self._on_progress:
            self._on_progress(self._progress.with_more(*more))


class Noting:
    """Tells a board now and then, from a task, how far a unit is."""

    def __init__(self, board: Any, name: str) -> None:
        self._board, self._name, self._last = board, name, time.monotonic()
        self._videos = self._bytes = 0

    def add(self, size: int) -> None:
        """A video of so many bytes is done."""
        self._videos += 1
        self._bytes += size
        if self._board is not None and time.monotonic() - self._last >= NOTE_SECONDS:
            self._last = time.monotonic()
            self._board.note.remote(self._name, self._videos, self._bytes)


@ray.remote(num_cpus=0)
class Board:
    """Where tasks note how far they are with their unit."""

    def __init__(self) -> None:
        self._done: dict[str, tuple[int, int]] = {}

    def note(self, name: str, videos: int, size: int) -> None:
        """Of a unit: videos and bytes done so far."""
        self._done[name] = (videos, size)

    def forget(self, name: str) -> None:
        """A unit that has ended is counted elsewhere."""
        self._done.pop(name, None)

    def total(self) -> tuple[int, int]:
        """Videos and bytes of all units that are under way."""
        return sum(videos for videos, _ in self._done.values()), sum(size for _, size in self._done.values())
