"""`Worker` over Ray Train.

Comes in: Ray Train's context of one worker. Goes out: checkpoints and records on the run's storage, validation's figures through
`ray.train.report`, progress to a `Monitor` actor (`on_ray/monitor.py`) that the driver looks at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from vidfuse.config import RunConfig
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.weights import local
from vidfuse.train.keeper import Keeper
from vidfuse.train.shelf import Found


class RayWorker:
    """One rank of a Ray Train run. Constructed inside `train_loop_per_worker`."""

    def __init__(self, run: RunConfig, monitor: Any) -> None:
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.machine = ray.get_runtime_context().get_node_id()
        self.device: torch.device = ray.train.torch.get_device()
        self._folder = RunFolder.of(run)
        self._monitor, self._answer, self._stop = monitor, None, False
        self._notice: Any = None
        self._keeper = Keeper(self._folder.shelf, machine=self.machine, in_place=False, publish=self._folder.put)
        if self.rank == 0:
            ray.get(monitor.begin.remote())

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Found]:
        """See `Worker`. Downloaded and verified once a machine."""
        with self._keeper.find() as found:
            for damage in found.damaged if self.rank == 0 else ():
                self._monitor.warn.remote(f"{damage}; continuing from {found.name or 'the beginning'}")
            yield found

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float], *, keep: int, records: Path | None
    ) -> None:
        """See `Worker`. Ray hears of validated ones (a search goes by them); it does not keep them."""
        self._keeper.save(name, write, metrics, keep=keep, records=records)
        if metrics:
            ray.train.report(dict(metrics))

    def settle(self) -> None:
        """See `Worker`."""
        self._keeper.settle()

    def close(self, *, at_most_seconds: float) -> None:
        """See `Worker`."""
        self._keeper.close(at_most_seconds=at_most_seconds)

    def local(self, source: str) -> str:
        """See `Worker`."""
        return local(source)

    def publish(self, folder: Path) -> None:
        """See `Worker`."""
        self._folder.put(folder)

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """See `Worker`."""
        self._folder.keep(name, content)

    def kept(self, folder: str) -> list[str]:
        """See `Worker`."""
        return self._folder.kept(folder)

    def last_heard(self) -> Mapping[str, Any] | None:
        """See `Worker`; the monitor outlives workers, not the driver."""
        event: dict[str, Any] = ray.get(self._monitor.hand_over.remote())
        return event or None

    def progress(self, event: Mapping[str, Any]) -> None:
        """See `Worker`; it never waits for the driver."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        if self._answer is None:
            self._answer = self._monitor.tell.remote(dict(event))

    def should_stop(self) -> bool:
        """See `Worker`; rank 0 hears it with its next progress event, the step tells the others."""
        return self._stop

    def told_to_save(self) -> bool:
        """See `Worker`; Ray's notice of a node that is drained (a spot machine that is reclaimed).

        `ray.train.get_preemption_info` says the same behind a barrier of all ranks, at each step. Here each rank looks at what it
        was told, and the step's own sum tells the others.
        """
        if self._notice is None:
            self._notice = get_internal_train_context().preemption_context.preemption_info
            return self._notice is not None
        return False
