"""Checkpoints in the background: written to this machine's disk while training waits, stored while it goes on.

Comes in: what a rank writes. Goes out: a whole checkpoint on the run's storage, or an error at the next `save` or `settle`. All
ranks call everything here alike, and always come to the same answer.

Ray Train has this too (`CheckpointUploadMode.ASYNC`), but each rank's files are then uploaded on their own and registered by the
controller, so that nothing can be written last, and a checkpoint that Ray has registered cannot be passed over when it is damaged.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from vidfuse.train.errors import CheckpointError, Damage, DamageError
from vidfuse.train.shelf import Files, Found, Shelf, merged, newest_good, number_of

UPLOAD_HOURS = 12
"""How long a rank waits for the others to have stored their part."""

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Flight:
    """A checkpoint that is being stored."""

    name: str
    folder: Path
    """Where this rank has written its part."""
    metrics: Mapping[str, float]
    keep: int
    records: Path | None
    """Rank 0: the run's records as they were then."""
    fault: str | None = None
    thread: threading.Thread | None = None
    began: float = field(default_factory=time.time)


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is whole on the storage."""

    began: float
    """Unix time: the weights are those of then."""
    seconds: float
    """From then until it was whole."""
    size: int
    """Bytes."""


class Keeper:
    """One rank's part in saving checkpoints and finding them again. All ranks make one at the same time.

    Args:
        shelf: of the run.
        machine: name of the rank's machine.
        in_place: whether the shelf is a folder that all ranks see; checkpoints are then written where they stay.
        publish: puts the run's records on its storage (rank 0).
        on_stored: is told of each checkpoint that is whole (rank 0), by the thread that stores it.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        machine: str,
        in_place: bool,
        publish: Callable[[Path], None],
        on_stored: Callable[[Stored], None] = lambda _: None,
    ) -> None:
        self._shelf, self._machine, self._in_place, self._publish = shelf, machine, in_place, publish
        self._on_stored = on_stored
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._number: int | None = None
        self._token = ""
        self._bad: tuple[str, ...] = ()
        self._flight: Flight | None = None
        self._group: Any = None

    # Finding.

    @contextlib.contextmanager
    def find(self) -> Iterator[Found]:
        """The newest good checkpoint, verified on every machine; a local copy of it for as long as the context is open.

        Raises:
            CheckpointError: there are checkpoints and none is good, or the storage cannot be read.
        """
        names, ever_whole = self._look()
        scratch = Path(tempfile.mkdtemp(prefix="vidfuse-restore-"))
        places: dict[str, Path] = {}

        def attempt(name: str) -> Damage | None:
            place, damage = self._fetch(name, scratch)
            places[name] = place
            return damage

        try:
            name, damaged = newest_good(names[::-1], attempt, ever_whole=ever_whole)
            self._bad = tuple(damage.checkpoint for damage in damaged)
            if self._rank == 0:
                for damage in damaged:
                    log.error("%s; continuing from %s", damage, name or "the beginning")
            yield Found(places[name] if name else None, name, damaged)
            dist.barrier()  # another rank of this machine may still be reading
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _look(self) -> tuple[list[str], bool]:
        """Rank 0's view of the shelf, for all: the names in order, and whether there ever was a whole checkpoint."""
        seen: list[Any] = [None]
        if self._rank == 0:
            try:
                seen = [(self._shelf.names(), self._shelf.record()["last"] is not None, uuid.uuid4().hex[:4])]
            except OSError as error:
                seen = [str(error)]
        dist.broadcast_object_list(seen)
        if isinstance(seen[0], str):
            raise CheckpointError(f"the run's checkpoints cannot be read: {seen[0]}")
        names, ever_whole, self._token = seen[0]
        self._number = 1 + max(map(number_of, names), default=0)
        return names, ever_whole

    def _fetch(self, name: str, scratch: Path) -> tuple[Path, Damage | None]:
        """Have the first rank of every machine bring a checkpoint there; where it is on this one."""
        first = _gather(self._machine).index(self._machine) == self._rank
        place, damage, fault = Path(self._shelf.root) / name, None, None
        if first:
            try:
                if self._in_place:
                    self._shelf.verify(name)
                else:
                    place = self._shelf.fetch(name, scratch)
            except DamageError as error:
                damage = error.damage
            except OSError as error:
                fault = str(error)
        told = _gather((self._machine, place, damage, fault))
        faults = [fault for *_, fault in told if fault]
        if faults:
            raise CheckpointError(f"checkpoint {name} cannot be read: {faults[0]}")
        damages = [damage for _, _, damage, _ in told if damage]
        if damages and first:
            shutil.rmtree(scratch / name, ignore_errors=True)
        mine = next(place for machine, place, *_ in told if machine == self._machine)
        return mine, damages[0] if damages else None

    # Saving.

    def save(
        self,
        step: str,
        write: Callable[[Path], None],
        metrics: Mapping[str, float],
        *,
        keep: int,
        records: Path | None = None,
    ) -> str:
        """Have every rank `write` its part, then store it in the background; the name that it gets.

        Args:
            step: first part of the name.
            write: writes this rank's part into a folder.
            metrics: `top1` if the weights were validated.
            keep: how many of the newest checkpoints stay.
            records: folder of the run's records, on rank 0: on the storage before the checkpoint counts, so that they reach at
                least as far as it does.

        Raises:
            CheckpointError: it could not be written, or the one before could not be stored.
        """
        self.settle()
        if self._number is None:
            self._look()
        assert self._number is not None
        name = f"{step}-{self._number:04d}-{self._token}"
        self._number += 1
        folder = Path(self._shelf.root) / name if self._in_place else Path(tempfile.mkdtemp(prefix="vidfuse-checkpoint-"))
        flight = Flight(name, folder, metrics, keep, None)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
            flight.records = _snapshot(records)
        except OSError as error:
            flight.fault = str(error)
        faults = [fault for fault in _gather(flight.fault) if fault]
        if faults:
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(f"checkpoint {name} was not written: {faults[0]}; the one before is unharmed")
        self._begin(flight)
        return name

    def settle(self, *, at_most_seconds: float | None = None) -> None:
        """Wait until the checkpoint that was saved last is stored.

        Raises:
            CheckpointError: it could not be, or took longer than `at_most_seconds`.
        """
        flight, self._flight = self._flight, None
        if flight is None or flight.thread is None:
            return
        flight.thread.join(at_most_seconds)
        if flight.thread.is_alive():
            raise CheckpointError(f"checkpoint {flight.name} was given up: it was not stored after {at_most_seconds:g} s")
        if flight.fault:
            raise CheckpointError(f"checkpoint {flight.name} was not stored: {flight.fault}; the one before is unharmed")

    def close(self, *, at_most_seconds: float) -> None:
        """Give the background's process group back, once it is idle: its threads would wake up for ever.

        Raises:
            CheckpointError: as `settle`.
        """
        thread = self._flight.thread if self._flight is not None else None
        try:
            self.settle(at_most_seconds=at_most_seconds)
        finally:
            if self._group is not None and not (thread is not None and thread.is_alive()):
                dist.destroy_process_group(self._group)
                self._group = None

    def _begin(self, flight: Flight) -> None:
        if self._group is None:
            # The background speaks over a group of its own: the training's must see its calls in one order on all ranks.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=UPLOAD_HOURS))
        flight.thread = threading.Thread(target=self._store, args=(flight,), name="vidfuse-checkpoint", daemon=True)
        self._flight = flight
        flight.thread.start()

    def _store(self, flight: Flight) -> None:
        """What the background does: this rank's files, then (rank 0) records, list, checkpoints.json and what must go."""
        try:
            files, fault = _try(lambda: self._files(flight))
            everyone = _gather((files, fault), self._group)
            faults = [fault for _, fault in everyone if fault]
            if not faults and self._rank == 0:
                fault = _try(lambda: self._finish(flight, [files or {} for files, _ in everyone]))[1]
            told = _gather(faults[0] if faults else fault, self._group)
            flight.fault = next((fault for fault in told if fault), None)
        except Exception as error:
            flight.fault = f"another worker is gone: {error}"
        finally:
            if not self._in_place:
                shutil.rmtree(flight.folder, ignore_errors=True)
            if flight.records is not None:
                shutil.rmtree(flight.records, ignore_errors=True)

    def _files(self, flight: Flight) -> Files:
        if not self._in_place:
            return self._shelf.store(flight.name, flight.folder)
        return self._shelf.listed_in_place(flight.name) if self._rank == 0 else {}

    def _finish(self, flight: Flight, parts: list[Files]) -> None:
        if flight.records is not None:
            self._publish(flight.records)
        files = merged(parts)
        self._shelf.close(flight.name, files, flight.metrics)
        size = sum(listed.size for listed in files.values())
        self._on_stored(Stored(flight.began, time.time() - flight.began, size))
        self._shelf.note(flight.name, flight.metrics, keep=flight.keep, bad=self._bad)


def _gather(mine: T, group: Any = None) -> list[T]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _try(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """What an action gives, and its fault: whatever it is, the main thread must hear of it."""
    try:
        return action(), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)


def _snapshot(records: Path | None) -> Path | None:
    """A copy of the records: training writes on while they are stored."""
    if records is None:
        return None
    return Path(shutil.copytree(records, tempfile.mkdtemp(prefix="vidfuse-records-"), dirs_exist_ok=True))
