"""What the loop knows of where it runs.

Comes in: nothing, or a torchrun environment. Goes out: rank, device, a place for checkpoints. `LocalWorker` is one process on
this machine (or one of torchrun's); `vidfuse.on_ray.worker.RayWorker` is the same for Ray Train.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from vidfuse.train.errors import CheckpointError

CHECKPOINTS = "checkpoints.json"
"""File of a run: `{"last": name, "best": name, "scores": {name: top1}}`."""
CHECKPOINT_PREFIX = "step-"
PROGRESS = "progress.json"
"""File of a local run: its newest progress event."""

Progress = Callable[[Mapping[str, Any]], None]
"""Takes a progress event: epoch, epochs, step, steps, loss, clips_per_second, data_wait_fraction, eta_seconds ..."""


class Worker(Protocol):
    """One rank of a run."""

    rank: int
    world_size: int
    machine: str
    """Name of the machine that the rank is on: ranks with the same one share its disk."""
    device: torch.device

    def latest_checkpoint(self) -> contextlib.AbstractContextManager[Path | None]:
        """The newest checkpoint as a local folder, for as long as the context is open; `None`: start afresh."""
        ...

    def save(self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float]) -> None:
        """Have every rank `write` its part of checkpoint `name` into a folder, and make it the newest. All ranks call it.

        Raises:
            CheckpointError: it could not be written or stored; the one before is as good as it was.
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

    def should_stop(self) -> bool:
        """Whether the run has been asked to end with a checkpoint (the same answer on all ranks)."""
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
        local_rank = dist.get_node_local_rank(fallback_rank=0)
        os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it; torchrun and Ray Train set it
        self.device = device or (torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu"))
        self._on_progress = on_progress

    @contextlib.contextmanager
    def latest_checkpoint(self) -> Iterator[Path | None]:
        """See `Worker`."""
        record = read_checkpoints(self.folder)
        yield self.folder / record["last"] if record["last"] else None

    def save(self, name: str, write: Callable[[Path], None], metrics: Mapping[str, float]) -> None:
        """See `Worker`. Written beside its final place and moved there when every rank has written its part."""
        part = self.folder / f".{name}.part"
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        dist.barrier()
        try:
            write(part)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise CheckpointError(f"checkpoint {name} was not written: {error}; the one before is unharmed") from error
        dist.barrier()
        if self.rank == 0:
            self._keep(name, part, metrics)
        dist.barrier()

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

    def should_stop(self) -> bool:
        """See `Worker`; a local run is not asked."""
        return False

    def _keep(self, name: str, part: Path, metrics: Mapping[str, float]) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        part.rename(self.folder / name)
        record = note_checkpoint(read_checkpoints(self.folder), name, metrics)
        write_json(self.folder / CHECKPOINTS, record)
        for old in self.folder.glob(f"{CHECKPOINT_PREFIX}*"):
            if old.name not in (record["last"], record["best"]):
                shutil.rmtree(old, ignore_errors=True)


def init_process_group() -> None:
    """Join torchrun's process group, or make one of a single process."""
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if dist.is_torchelastic_launched():
        dist.init_process_group(backend)
    else:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def note_checkpoint(record: dict[str, Any], name: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The record of checkpoints after one more: the last is `name`; the best has the highest validation top-1."""
    scores = dict(record["scores"])
    if "top1" in metrics:
        scores[name] = metrics["top1"]
    best = max(scores, key=lambda n: (scores[n], list(scores).index(n)), default=None)  # of equals the later, as Ray keeps it
    return {"last": name, "best": best, "scores": scores}


def read_checkpoints(folder: Path) -> dict[str, Any]:
    """The record of a run's checkpoints; empty for a fresh run."""
    path = folder / CHECKPOINTS
    return json.loads(path.read_text()) if path.exists() else {"last": None, "best": None, "scores": {}}


def write_json(path: Path, content: object) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)
