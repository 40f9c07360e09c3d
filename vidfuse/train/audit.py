"""Was every sample of every epoch used exactly once, or as often as a weighted epoch plans it? Judged from the journal of a run,
not from what the run believes.

Comes in: the journal's entries (`journal`), the manifest's shards and the names of its samples. Goes out: an `Audit`.

What counts is the history of the weights: a try that begins at step s has undone what earlier tries did after s, so their entries
after s fall away; what is left is added up, sample by sample, and held against the manifest. What was undone is counted as
work done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from vidfuse.train.ledger import unpack

Entry = Mapping[str, Any]
Planned = Callable[[int], npt.NDArray[np.uint8]]
SHOWN = 10
"""Names of one kind that are written out for people; all are in the `Audit`."""


@dataclass(frozen=True)
class EpochAudit:
    """What the history of the weights used of an epoch."""

    epoch: int
    closed: bool
    """Whether the epoch has ended; one that still runs may lack samples."""
    samples: int
    """Of the manifest."""
    once: int
    """Samples used exactly as often as planned: once, if nothing is weighted; the unreadable among them."""
    repeated: tuple[tuple[str, int], ...]
    """Samples used more often: name and count."""
    missing: tuple[str, ...]
    """Names of samples used more rarely: of a plain epoch, not at all."""
    unreadable: tuple[tuple[str, str], ...]
    """Videos that could not be read, so that they weighed nothing: name and reason."""
    weighted: bool = False
    """Whether some are planned more or less often than once."""

    @property
    def exact(self) -> bool:
        """Nothing is repeated; nothing is missing either, if the epoch has ended."""
        return not self.repeated and (not self.missing or not self.closed)

    def lines(self) -> Iterator[str]:
        """In words."""
        missing = f"{len(self.missing)} {'missing' if self.closed else 'to come'}"
        planned = "as planned" if self.weighted else "once"
        counts = f"{self.once} used {planned}, {len(self.repeated)} repeated, {missing}, {len(self.unreadable)} unreadable"
        verdict = (f"exactly {planned}" if self.exact else f"NOT exactly {planned}") if self.closed else "not finished"
        yield f"epoch {self.epoch}: {verdict}; of {self.samples} samples {counts}"
        yield from _named("repeated", [f"{name} {count} times" for name, count in self.repeated])
        yield from _named("missing", self.missing if self.closed else ())
        yield from _named("unreadable", [f"{name}: {reason}" for name, reason in self.unreadable])


@dataclass(frozen=True)
class Span:
    """Steps that the history of the weights made at one world size."""

    first: int
    last: int
    workers: int


@dataclass(frozen=True)
class Interruption:
    """Between two tries."""

    step: int
    """Last step that was heard of before it."""
    resumed: int
    """Step of the checkpoint that the run went on from."""
    before: int
    after: int
    """Workers before and after it."""
    planned: bool
    """Whether the run was asked to stop and ended in order."""
    down_seconds: float | None
    """From the last sign of life to the end of the next step; `None`: there has been none yet, or it was planned."""
    lost_seconds: float | None
    """To the end of the first step that had not been done before: `down_seconds` and the steps done twice."""
    parts: Mapping[str, float]
    """What `down_seconds` is made of: seconds until the new workers' processes started, until they began, had restored, stepped."""

    @property
    def redone(self) -> int:
        """Steps whose work was undone."""
        return max(self.step - self.resumed, 0)

    def line(self) -> str:
        """In words."""
        if self.planned:
            return f"stopped in order at step {self.step}, continued with {self.after} workers ({self.before} before)"
        if self.down_seconds is None:
            return f"interrupted after step {self.step}, resumed from step {self.resumed}; no step since"
        lost = f", {self.lost_seconds:.1f} s until a new one" if self.lost_seconds is not None and self.redone else ""
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return (
            f"interrupted after step {self.step}, resumed from step {self.resumed} ({self.redone} steps done twice), workers "
            f"{self.before} -> {self.after}; {self.down_seconds:.1f} s until the next step ({parts}){lost}"
        )


@dataclass(frozen=True)
class Audit:
    """A run, as its journal shows it."""

    epochs: tuple[EpochAudit, ...]
    spans: tuple[Span, ...]
    interruptions: tuple[Interruption, ...]

    @property
    def exact(self) -> bool:
        """Whether every epoch so far is exactly once."""
        return all(epoch.exact for epoch in self.epochs)

    def lines(self) -> Iterator[str]:
        """In words."""
        for epoch in self.epochs:
            yield from epoch.lines()
        for span in self.spans:
            yield f"steps {span.first} to {span.last}: {span.workers} workers"
        for interruption in self.interruptions:
            yield interruption.line()
        faults = [i for i in self.interruptions if not i.planned]
        lost = sum(i.lost_seconds or i.down_seconds or 0.0 for i in faults)
        yield f"{len(faults)} interruptions, {lost:.1f} s lost, {sum(i.redone for i in faults)} steps done twice"


def audit(entries: Sequence[Entry], shards: Mapping[str, int], names: Sequence[str], planned: Planned | None = None) -> Audit:
    """Judge a run.

    Args:
        entries: of its journal, in order.
        shards: samples of each shard of the training split.
        names: `shard/key` of each sample, in the order of the split's index.
        planned: uses of each sample in an epoch. `None`: once.

    Raises:
        ValueError: the journal is of another packed set.
    """
    tries = [list(group) for _, group in groupby(entries, key=lambda entry: entry["try"])]
    history = _history(tries)
    epochs = sorted({entry["epoch"] for entry in history})
    return Audit(
        tuple(_epoch(epoch, [e for e in history if e["epoch"] == epoch], shards, names, planned) for epoch in epochs),
        tuple(_spans(tries)),
        tuple(_interruption(a, b) for a, b in pairwise(tries)),
    )


def _history(tries: Sequence[Sequence[Entry]]) -> list[Entry]:
    """The `used` entries that no later try undid."""
    history: list[Entry] = []
    for entries in tries:
        history = [entry for entry in history if entry["step"] <= entries[0]["step"]]
        history += [entry for entry in entries if entry["kind"] == "used"]
    return history


def _epoch(
    epoch: int, entries: Sequence[Entry], shards: Mapping[str, int], names: Sequence[str], planned: Planned | None
) -> EpochAudit:
    wanted = np.ones(len(names), np.int64) if planned is None else planned(epoch).astype(np.int64)
    uses: npt.NDArray[np.int64] = np.zeros(len(names), np.int64)
    for entry in entries:
        uses += unpack(shards, entry)
    return EpochAudit(
        epoch=epoch,
        closed=any(entry["closed"] for entry in entries),
        samples=len(names),
        once=int((uses == wanted).sum()),
        repeated=tuple((names[int(sample)], int(uses[sample])) for sample in np.flatnonzero(uses > wanted)),
        missing=tuple(names[int(sample)] for sample in np.flatnonzero(uses < wanted)),
        unreadable=tuple((f"{shard}/{key}", reason) for shard, key, reason in entries[-1]["unreadable"]),
        weighted=bool((wanted != 1).any()),
    )


def _spans(tries: Sequence[Sequence[Entry]]) -> Iterator[Span]:
    for number, entries in enumerate(tries):
        undone = min((later[0]["step"] for later in tries[number + 1 :]), default=None)
        first, last = entries[0]["step"] + 1, max(entry["step"] for entry in entries)
        last = last if undone is None else min(last, undone)
        if first <= last:
            yield Span(first, last, entries[0]["workers"])


def _interruption(old: Sequence[Entry], new: Sequence[Entry]) -> Interruption:
    start, ended = new[0], old[-1]
    heard = max(ended, start["before"] or ended, key=lambda entry: entry["time"])
    times = {entry["kind"]: entry["time"] for entry in reversed(new) if entry["kind"] in ("first", "new")}
    planned = ended["kind"] == "end"
    marks = {
        "new processes": start["process"],
        "imports": start["began"],
        "restore": start["time"],
        "first step": times.get("first"),
    }
    return Interruption(
        step=max(entry["step"] for entry in (heard, ended)),
        resumed=start["step"],
        before=old[0]["workers"],
        after=start["workers"],
        planned=planned,
        down_seconds=None if planned or "first" not in times else times["first"] - heard["time"],
        lost_seconds=None if planned or "new" not in times else times["new"] - heard["time"],
        parts={} if planned or "first" not in times else _parts(heard["time"], marks),
    )


def _parts(since: float, marks: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each stage; a process that had been started beforehand takes none."""
    parts, past = {}, since
    for name, mark in marks.items():
        at = max(mark or past, past)
        parts[name], past = round(at - past, 2), at
    return parts


def _named(what: str, names: Sequence[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"  {what}: {', '.join(names[:SHOWN])}{more}"
