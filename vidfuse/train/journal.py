"""What a run did, kept for good: the evidence that `audit` judges.

    journal/00002-000000-start.json    try 2 began: world size, checkpoint's step, what was last heard of the try before
    journal/00002-000001-first.json    its first step is done
    journal/00002-000002-new.json      its first step is done that no try before had done
    journal/00002-000003-used.json     which samples all ranks used since the entry before; at each checkpoint and epoch's end
    journal/00002-000004-end.json      it ended in order

Records of metrics are rolled back with the weights; these are not, so that work that was done twice can be counted. An entry
is written before its checkpoint counts: of a checkpoint that never came to be, the entry lies after the step at which the next
try begins, and falls away with it.

Comes in: counts of uses, steps, times. Goes out: one small JSON file an entry, through `Worker.keep`. Rank 0 writes it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import psutil

from vidfuse.data.batch import SampleError
from vidfuse.train.ledger import Counts, pack
from vidfuse.train.worker import Worker

JOURNAL = "journal"
"""Folder of a run."""


class Journal:
    """The journal of one try: from a start of the workers to their end, whichever it is.

    Args:
        worker: keeps the entries.
        shards: samples of each shard, as the ledger has them.
    """

    def __init__(self, worker: Worker, shards: Mapping[str, int]) -> None:
        self._worker, self._shards = worker, shards
        self._number = next_try(worker.kept(JOURNAL))
        self._entries = 0
        self._begun = self._ahead = False
        self._before = 0

    def start(self, *, step: int, epoch: int, manifest: str, began: float) -> None:
        """The workers have restored step `step`; `began`: when they started to."""
        worker, before = self._worker, self._worker.last_heard()
        self._before = int(before["step"]) if before else step
        facts = {"step": step, "epoch": epoch, "manifest": manifest, "began": began, "process": psutil.Process().create_time()}
        self._write("start", {**facts, "workers": worker.world_size, "before": before})

    def stepped(self, step: int) -> None:
        """A step is done: note the first one since the start, and the first one that no try before had done."""
        if not self._begun:
            self._begun = True
            self._write("first", {"step": step})
        if not self._ahead and step > self._before:
            self._ahead = True
            self._write("new", {"step": step})

    def used(self, *, step: int, epoch: int, uses: Counts, errors: Iterable[SampleError], closed: bool) -> None:
        """What all ranks used of an epoch since the last such entry; `closed`: the epoch has ended."""
        named = sorted([error.shard, error.key, error.reason] for error in errors)
        facts = {"step": step, "epoch": epoch, "closed": closed, "unreadable": named}
        self._write("used", {**facts, **pack(self._shards, uses)})

    def end(self, *, step: int, how: str) -> None:
        """The try ended in order."""
        self._write("end", {"step": step, "how": how})

    def _write(self, kind: str, facts: Mapping[str, Any]) -> None:
        entry = {"kind": kind, "try": self._number, "time": round(time.time(), 3), **facts}
        self._worker.keep(f"{JOURNAL}/{self._number:05d}-{self._entries:06d}-{kind}.json", entry)
        self._entries += 1


def next_try(names: Sequence[str]) -> int:
    """The number of a run's next try, from the names in its journal."""
    return max((int(name.split("-")[0]) for name in names), default=0) + 1
