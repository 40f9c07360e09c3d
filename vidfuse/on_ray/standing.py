"""How runs stand, from what they leave on their storage: for `jobs.status`, without asking any cluster.

Comes in: a run's progress events (`Heartbeat`); a storage URL (`runs_below`). Goes out: heartbeat.json in the run's folder, every
`BEAT_SECONDS`; a `Standing` of each run below the URL.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from vidfuse.config import Config, ConfigError, RunConfig
from vidfuse.data.shards import DataError
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import check_storage, exists, join, list_folders, open_storage

HEARTBEAT = "heartbeat.json"
BEAT_SECONDS = 15.0
"""Between two heartbeats."""
SILENT_SECONDS = 120.0
"""A run that was not heard of for so long is not running: its driver is gone, or its workers are."""
DEPTH = 3
"""How far below a URL runs are looked for: those of a search are two folders below its own."""

State = Literal["finished", "stopped early", "stopped", "running", "silent", "begun"]
log = logging.getLogger(__name__)


class Heartbeat:
    """Writes down now and then that a run is alive, and where it is. It never waits and never fails: training goes on without it."""

    def __init__(self, run: RunConfig) -> None:
        self._run, self._last = run, -BEAT_SECONDS
        self._threads = ThreadPoolExecutor(1, "vidfuse-heartbeat")
        self._writing: Future[None] | None = None
        self._lock = threading.Lock()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Hear a progress event."""
        now = time.monotonic()
        with self._lock:
            if "step" not in event or now - self._last < BEAT_SECONDS or (self._writing and not self._writing.done()):
                return
            self._last = now
            self._writing = self._threads.submit(self._write, {"time": time.time(), **event})

    def close(self) -> None:
        """End; a heartbeat that is being written is not waited for."""
        self._threads.shutdown(wait=False)

    def _write(self, event: Mapping[str, Any]) -> None:
        try:
            RunFolder.of(self._run).keep(HEARTBEAT, event)
        except Exception as error:  # whatever a storage raises
            log.debug("no heartbeat: %s", error)


@dataclass(frozen=True)
class Standing:
    """How a run stands."""

    name: str
    """Below the URL that was asked for."""
    state: State
    """`silent`: neither ended in order nor heard of; `begun`: without a heartbeat yet, or of an older vidfuse."""
    epoch: int
    epochs: int
    step: int
    best_top1: float | None
    """Of the validations whose checkpoints are stored."""
    heard: float | None
    """When its last heartbeat was, seconds since 1970."""


def runs_below(url: str, *, now: float | None = None) -> Iterator[Standing]:
    """The runs at a URL and below it, by name.

    Raises:
        StorageError: the storage cannot be read.
    """
    check_storage(url)
    filesystem, root = open_storage(url)
    for path in _found(filesystem, root, DEPTH):
        name = path[len(root) :].strip("/")
        folder = RunFolder(filesystem, path, join(url, name) if name else url)
        try:
            yield _standing(folder, name or path.rsplit("/", 1)[-1], time.time() if now is None else now)
        except (ConfigError, DataError) as error:  # a config.yaml of another vidfuse, or of something else
            log.warning("%s is left out: %s", folder.url, error)


def _found(filesystem: Any, path: str, depth: int) -> Iterator[str]:
    if exists(filesystem, join(path, "config.yaml")) and exists(filesystem, join(path, "run.json")):
        yield path
        return
    if depth:
        for folder in list_folders(filesystem, path):
            yield from _found(filesystem, folder, depth - 1)


def _standing(folder: RunFolder, name: str, now: float) -> Standing:
    config: Config = folder.config()
    result, beat = folder.json("result.json"), folder.json(HEARTBEAT) or {}
    scores = [score for score in folder.checkpoints()["scores"].values() if score is not None]
    place = result if result is not None and result["steps"] >= beat.get("step", 0) else beat
    return Standing(
        name=name,
        state=_state(config, result, beat, now),
        epoch=int(place.get("epochs" if place is result else "epoch", 0)),
        epochs=config.train.epochs,
        step=int(place.get("steps" if place is result else "step", 0)),
        best_top1=max([*scores, *([result["best_top1"]] if result and result["best_top1"] is not None else [])], default=None),
        heard=beat.get("time"),
    )


def _state(config: Config, result: Mapping[str, Any] | None, beat: Mapping[str, Any], now: float) -> State:
    ended = result is not None and result["steps"] >= beat.get("step", 0)
    if result is not None and ended:
        return (
            "stopped early" if result["state"] == "stopped_early" else "stopped" if result["state"] == "stopped" else "finished"
        )
    if not beat:
        return "begun"
    return "running" if now - beat["time"] < SILENT_SECONDS else "silent"
