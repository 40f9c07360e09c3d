"""`Worker` on a Ray cluster: of Ray Train, or alone in the process that asks.

Comes in: Ray Train's context of one worker, or nothing. Goes out: checkpoints and records on the run's storage; validation's figures
through `ray.train.report` and progress to a `Monitor` actor (`on_ray/monitor.py`) that the driver looks at, or both to the caller.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from vidfuse.config import RunConfig
from vidfuse.on_ray import devices
from vidfuse.on_ray.metrics import Teller
from vidfuse.on_ray.observe import Board, peak_of
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.weights import local
from vidfuse.train.keeper import Keeper, Stored
from vidfuse.train.shelf import Found
from vidfuse.train.worker import Progress, init_process_group

log = logging.getLogger(__name__)


class StoredRun:
    """What workers of a run on a storage have in common: its checkpoints and records, and a board for its figures.

    Args:
        run: of the run.
        rank: of the worker.
        world_size: of the run.
        device: of the worker.
        tellers: whose figures this process tells besides the worker's own.
        operations: of one clip in training; `None`: not known, or nothing can be told from it.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        tellers: Sequence[Teller] = (),
        operations: float | None = None,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.machine = ray.get_runtime_context().get_node_id()
        self.board = Board("worker", *(("rank 0",) if rank == 0 else ()), *tellers, run=run.name, rank=str(rank))
        peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self._share = operations / (peak * world_size) if operations and peak else None
        self._folder = RunFolder.of(run)
        self._keeper = Keeper(
            self._folder.shelf, machine=self.machine, in_place=False, publish=self._folder.put, on_stored=self._stored
        )

    def warn(self, message: str) -> None:
        """See `Worker`."""
        log.error("%s", message)

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Found]:
        """See `Worker`. Downloaded and verified once a machine."""
        with self._keeper.find() as found:
            for damage in found.damaged if self.rank == 0 else ():
                self.warn(f"{damage}; continuing from {found.name or 'the beginning'}")
            if self.rank == 0:
                self.board.set("checkpoint_good_timestamp_seconds", time.time())
            yield found

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float], *, keep: int, records: Path | None
    ) -> None:
        """See `Worker`."""
        self._keeper.save(name, write, metrics, keep=keep, records=records)

    def settle(self) -> None:
        """See `Worker`."""
        self._keeper.settle()

    def close(self, *, at_most_seconds: float) -> None:
        """See `Worker`."""
        try:
            self._keeper.close(at_most_seconds=at_most_seconds)
        finally:
            self.board.close()

    def tell(self, figures: Mapping[str, float]) -> None:
        """See `Worker`."""
        for name, value in figures.items():
            self.board.set(name, value)
        if self._share is not None and "clips_per_second" in figures:
            self.board.set("mfu_ratio", figures["clips_per_second"] * self._share)

    def _stored(self, checkpoint: Stored) -> None:
        self.board.set("checkpoint_good_timestamp_seconds", checkpoint.began)
        self.board.set("checkpoint_seconds", checkpoint.seconds)
        self.board.set("checkpoint_bytes", checkpoint.size)
        self.board.add("checkpoints_total", 1)

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


class LoneWorker(StoredRun):
    """The only rank of a run, in the process that asks for it; on its GPU, if Ray gave it one.

    Args:
        run: of the run.
        on_progress: is given every progress event; what it raises ends the run.
        stop: set it to have the run end with a checkpoint.
        precision: what it computes in.
        operations: of one clip in training.

    Raises:
        RunError: it was given a GPU that it cannot use.
    """

    def __init__(
        self,
        run: RunConfig,
        on_progress: Progress,
        stop: threading.Event,
        *,
        precision: str = "fp32",
        operations: float | None = None,
    ) -> None:
        if ray.get_gpu_ids():
            devices.hold([devices.look()], precision)
        init_process_group()
        device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        super().__init__(run, rank=0, world_size=1, device=device, tellers=("driver",), operations=operations)
        self.tell({"world_size_wanted": 1, "progress_timestamp_seconds": time.time()})
        self._on_progress, self._stop = on_progress, stop

    def last_heard(self) -> Mapping[str, Any] | None:
        """See `Worker`; one that was killed took it along."""
        return None

    def progress(self, event: Mapping[str, Any]) -> None:
        """See `Worker`."""
        self.board.set("progress_timestamp_seconds", time.time())
        self._on_progress(event)

    def should_stop(self) -> bool:
        """See `Worker`."""
        return self._stop.is_set()

    def told_to_save(self) -> bool:
        """See `Worker`; Ray tells its Train workers alone."""
        return False


class RayWorker(StoredRun):
    """One rank of a Ray Train run. Constructed inside `train_loop_per_worker`."""

    def __init__(self, run: RunConfig, monitor: Any, *, operations: float | None = None) -> None:
        context = ray.train.get_context()
        rank, size, device = context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()
        super().__init__(run, rank=rank, world_size=size, device=device, operations=operations)
        self._monitor, self._answer, self._stop = monitor, None, False
        self._notice: Any = None
        if self.rank == 0:
            ray.get(monitor.begin.remote(size))

    def warn(self, message: str) -> None:
        """See `Worker`; the driver does it."""
        self._monitor.warn.remote(message)

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float], *, keep: int, records: Path | None
    ) -> None:
        """See `Worker`. Ray hears of validated ones; it does not keep them."""
        super().save(name, write, metrics, keep=keep, records=records)
        if metrics:
            ray.train.report(dict(metrics))

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
