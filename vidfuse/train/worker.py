"""What the loop knows of where it runs.

Comes in: nothing, or a torchrun environment. Goes out: rank, device, a place for checkpoints. `LocalWorker` is one process on
this machine (or one of torchrun's); `vidfuse.on_ray.worker.RayWorker` is the same for Ray Train.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow.fs as pafs
import torch
import torch.distributed as dist

from vidfuse.train.keeper import Keeper
from vidfuse.train.shelf import Found, Shelf

PROGRESS = "progress.json"
"""File of a local run: its newest progress event."""

log = logging.getLogger(__name__)

Progress = Callable[[Mapping[str, Any]], None]
"""Takes a progress event: epoch, epochs, step, steps, loss, clips_per_second, data_wait_fraction, eta_seconds ..."""


class Worker(Protocol):
    """One rank of a run."""

    rank: int
    world_size: int
    machine: str
    """Name of the machine that the rank is on: ranks with the same one share its disk."""
    device: torch.device

    def latest_checkpoint(self) -> contextlib.AbstractContextManager[Found]:
        """The newest good checkpoint as a local folder, for as long as the context is open, and the damaged ones before it.

        Raises:
            CheckpointError: there are checkpoints and none is good.
        """
        ...

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float], *, keep: int, records: Path | None
    ) -> None:
        """Have every rank `write` its part of checkpoint `name` into a folder; it is stored while training goes on.

        All ranks call it. `keep` of the newest stay, and the best. `records`: the folder of the run's records on rank 0, which
        are stored with it.

        Raises:
            CheckpointError: it could not be written, or the one before it not stored; those before are as good as they were.
        """
        ...

    def settle(self) -> None:
        """Wait until the checkpoint that was saved last is stored. All ranks call it.

        Raises:
            CheckpointError: it could not be stored; those before are as good as they were.
        """
        ...

    def close(self, *, at_most_seconds: float) -> None:
        """Give back what saving has taken, once the last checkpoint is stored or after a time. All ranks call it.

        Raises:
            CheckpointError: it could not be stored, or is given up.
        """
        ...

    def local(self, source: str) -> str:
        """A weights source of the config as this machine can read it: objects on storage become local files.

        Raises:
            ValueError: it cannot be had.
        """
        ...

    def publish(self, folder: Path) -> None:
        """Put the files of a folder into the run's folder on its storage (rank 0 alone calls it)."""
        ...

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file into the run's folder on its storage; it is there when this returns (rank 0 alone calls it)."""
        ...

    def kept(self, folder: str) -> list[str]:
        """Names of what was kept in a folder of the run."""
        ...

    def last_heard(self) -> Mapping[str, Any] | None:
        """The newest progress event of the try before this one, told once; `None`: nothing is known (rank 0 alone calls it)."""
        ...

    def progress(self, event: Mapping[str, Any]) -> None:
        """Tell a person how far the run is (rank 0 alone calls it)."""
        ...

    def warn(self, message: str) -> None:
        """Tell a person at once of what is wrong, though the run goes on. It never waits; any thread may call it."""
        ...

    def tell(self, figures: Mapping[str, float]) -> None:
        """Show figures of this rank to those who watch: gauges, totals so far. It never waits. Any rank calls it, as it likes.

        Names are those of the README's table of metrics, without `ray_vidfuse_`; those of other ranks stay as they were.
        """
        ...

    def should_stop(self) -> bool:
        """Whether the run has been asked to end with a checkpoint (the same answer on all ranks)."""
        ...

    def told_to_save(self) -> bool:
        """Whether a machine of the run is about to be taken away, said once: a checkpoint is wanted now (any rank may say it)."""
        ...


class LocalWorker:
    """One process without Ray: alone, or one of those that torchrun started.

    Args:
        folder: the run's folder, on a file system that all ranks see.
        device: default: the rank's GPU, or the CPU.
        on_progress: is given every progress event.
    """

    def __init__(self, folder: Path, *, device: torch.device | None = None, on_progress: Progress | None = None) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        init_process_group()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.machine = platform.node()
        local_rank = int(os.environ["LOCAL_RANK"])
        self.device = device or (torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"))
        self._on_progress = on_progress
        shelf = Shelf(pafs.LocalFileSystem(), str(folder.absolute()))
        self._keeper = Keeper(shelf, machine=self.machine, in_place=True, publish=self.publish)

    def latest_checkpoint(self) -> contextlib.AbstractContextManager[Found]:
        """See `Worker`."""
        return self._keeper.find()

    def save(
        self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float], *, keep: int, records: Path | None
    ) -> None:
        """See `Worker`. Written where it stays; in the background it is put on the disk and hashed."""
        elsewhere = records is not None and records.resolve() != self.folder.resolve()
        self._keeper.save(name, write, metrics, keep=keep, records=records if elsewhere else None)

    def settle(self) -> None:
        """See `Worker`."""
        self._keeper.settle()

    def close(self, *, at_most_seconds: float) -> None:
        """See `Worker`."""
        self._keeper.close(at_most_seconds=at_most_seconds)

    def local(self, source: str) -> str:
        """See `Worker`; paths and published files are all it reads."""
        return source

    def publish(self, folder: Path) -> None:
        """See `Worker`."""
        if folder.resolve() != self.folder.resolve():
            shutil.copytree(folder, self.folder, dirs_exist_ok=True)

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """See `Worker`."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)

    def kept(self, folder: str) -> list[str]:
        """See `Worker`."""
        return sorted(path.name for path in (self.folder / folder).glob("[!.]*"))

    def last_heard(self) -> Mapping[str, Any] | None:
        """See `Worker`."""
        path = self.folder / PROGRESS
        event = json.loads(path.read_text()) if path.exists() else None
        path.unlink(missing_ok=True)
        return event

    def progress(self, event: Mapping[str, Any]) -> None:
        """See `Worker`."""
        write_json(self.folder / PROGRESS, event)
        if self._on_progress is not None:
            self._on_progress(event)

    def warn(self, message: str) -> None:
        """See `Worker`."""
        log.error("%s", message)

    def tell(self, figures: Mapping[str, float]) -> None:
        """See `Worker`; of a local run nobody is told but through its records."""

    def should_stop(self) -> bool:
        """See `Worker`; a local run is not asked."""
        return False

    def told_to_save(self) -> bool:
        """See `Worker`; a local run is not told."""
        return False


def init_process_group() -> None:
    """Join torchrun's process group, or make one of a single process."""
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if dist.is_torchelastic_launched():
            dist.init_process_group(backend)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    os.environ.setdefault("LOCAL_RANK", str(dist.get_node_local_rank(fallback_rank=0)))  # DeepSpeed insists on it


def read_checkpoints(folder: Path) -> dict[str, Any]:
    """The record of a local run's checkpoints; empty for a fresh run."""
    return Shelf(pafs.LocalFileSystem(), str(folder)).record()


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
