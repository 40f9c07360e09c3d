"""The plan of a packed set: which video goes into which shard, before anything is read or written.

Comes in: a `Source` and its folder. Goes out: a `Plan`, a pure function of names, annotations, file sizes and options, so a
shard is the same bytes whoever writes it and whenever.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import chain
from operator import attrgetter
from pathlib import Path

import numpy as np

from vidfuse.config import PackConfig, TranscodeConfig
from vidfuse.data import shards
from vidfuse.data.annotations.source import Entry, Source, SourceVideo, refuse_repeats, shown
from vidfuse.data.shards import DataError, Recipe

SHARD_BYTES = int(PackConfig().shard_bytes)
"""Default bound of a shard, bytes."""
LEAST_SHARD_BYTES = 64_000
_VERSION = 3
"""Of the packing: changed when the same source would give other bytes."""
_MEMBER_OVERHEAD = 3 * 1024
"""Most bytes that two tar headers, padding and the meta member add to a video (its text and placeholders are counted besides)."""
_END_OVERHEAD = 10 * 1024
_STATS_AT_ONCE = 16
"""Files whose sizes are asked for at the same time: on network storage each answer is waited for."""
_STATS_A_TASK = 256
_FIELDS = attrgetter(*(field.name for field in fields(SourceVideo) if field.compare))
"""`dataclasses.astuple` copies deeply, and takes longer than all else."""


@dataclass(frozen=True, slots=True)
class PlannedVideo:
    """A video and the bytes of its file."""

    video: SourceVideo
    bytes: int


@dataclass(frozen=True)
class ShardPlan:
    """What goes into a shard."""

    name: str
    split: str
    videos: tuple[PlannedVideo, ...]

    @property
    def bytes(self) -> int:
        """Of its videos."""
        return sum(video.bytes for video in self.videos)


@dataclass(frozen=True)
class Plan:
    """A packed set before it is written."""

    source: Source
    recipe: Recipe
    shards: tuple[ShardPlan, ...]
    digest: str
    """Hash of everything that decides the set's bytes."""


def make_plan(
    source: Source, folder: str | Path, shard_bytes: int = SHARD_BYTES, transcode: TranscodeConfig | None = None
) -> Plan:
    """Decide which video goes into which shard.

    Videos of a split are ordered by a hash of their key, so that each shard is a mixture of classes, and cut where the next
    one would make the shard larger than `shard_bytes`. A video larger than that has a shard of its own.

    Args:
        source: The data set.
        folder: Its folder.
        shard_bytes: Bound of a tar, bytes; of the videos before they are transcoded.
        transcode: Form that they are brought into; `None`: they stay as they are.

    Raises:
        DataError: too small a bound, or videos that are gone, no files, or there twice.
    """
    if shard_bytes < LEAST_SHARD_BYTES:
        raise DataError(f"--shard-bytes {shard_bytes}: at least {LEAST_SHARD_BYTES} (64KB); 256MB suits object storage")
    parts = []
    inodes = array("Q")
    for split, videos in source.splits.items():
        planned = sorted(_measured(videos, str(folder), inodes), key=lambda p: _order(split, p.video.key))
        for number, group in enumerate(_cut(planned, shard_bytes)):
            parts.append(ShardPlan(shards.shard_name(split, number), split, tuple(group)))
    _check_files(source, str(folder), inodes)
    recipe = Recipe(layout=source.layout, options=source.options, shard_bytes=shard_bytes, transcode=transcode)
    return Plan(source, recipe, tuple(parts), _digest(source, recipe, parts))


def _measured(videos: Sequence[SourceVideo], folder: str, inodes: array[int]) -> list[PlannedVideo]:
    """Videos with the sizes of their files, whose numbers are put behind `inodes`."""
    pieces = [videos[start : start + _STATS_A_TASK] for start in range(0, len(videos), _STATS_A_TASK)]
    planned: list[PlannedVideo] = []
    faults: list[str] = []
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        answers = pool.map(lambda piece: [_measure(_path(folder, video)) for video in piece], pieces)
        for video, facts in zip(videos, chain.from_iterable(answers), strict=True):
            if isinstance(facts, str):
                faults.append(facts)
            else:
                planned.append(PlannedVideo(video, facts[0]))
                inodes.append(facts[1])
    if faults:
        raise DataError(
            f"{len(faults)} of {len(videos)} videos cannot be packed: {shown(faults)}; put files there, or unlist them"
        )
    return planned


def _path(folder: str, video: SourceVideo) -> str:
    return os.path.join(folder, video.path)  # noqa: PTH118  (a Path for each of 200,000 videos takes seconds)


def _measure(path: str) -> tuple[int, int] | str:
    """Size and inode of a file, or what is wrong with it."""
    try:
        facts = os.stat(path)  # noqa: PTH116
    except OSError as error:
        return f"{path} ({error.strerror})"
    return (facts.st_size, facts.st_ino) if stat.S_ISREG(facts.st_mode) else f"{path} (not a file)"


def _check_files(source: Source, folder: str, inodes: array[int]) -> None:
    """Refuse a file that is there twice, by links or by another spelling of its path. A hard link counts as another file."""
    numbers, counts = np.unique(np.asarray(inodes), return_counts=True)
    shared = set(numbers[counts > 1].tolist())
    entries = ((split, video) for split, videos in source.splits.items() for video in videos)
    seen: dict[str, Entry] = {}
    repeats: list[tuple[Entry, Entry]] = []
    for entry in (entry for entry, inode in zip(entries, inodes, strict=True) if inode in shared):
        real = os.path.realpath(_path(folder, entry[1]))
        if real in seen:
            repeats.append((seen[real], entry))
        seen[real] = entry
    refuse_repeats(source.classes, repeats)


def _order(split: str, key: str) -> bytes:
    return hashlib.sha256(f"{split}/{key}".encode()).digest()


def _cut(videos: Iterable[PlannedVideo], shard_bytes: int) -> Iterator[list[PlannedVideo]]:
    group: list[PlannedVideo] = []
    total = _END_OVERHEAD
    for video in videos:
        size = (
            video.bytes
            + _MEMBER_OVERHEAD
            + sum(2 * len(text.encode()) + 3 for text in (video.video.text, *video.video.placeholders))
        )
        if group and total + size > shard_bytes:
            yield group
            group, total = [], _END_OVERHEAD
        group.append(video)
        total += size
    if group:
        yield group


def _digest(source: Source, recipe: Recipe, parts: Sequence[ShardPlan]) -> str:
    """A shard at a time, so that no text of the whole set is ever in memory."""
    head = {
        "version": _VERSION,
        "dataset": source.dataset,
        "classes": source.classes,
        "recipe": recipe.model_dump(mode="json"),
        "absent": [video.model_dump(mode="json") for video in source.absent],
    }
    hashed = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for part in parts:
        videos = [[*_FIELDS(planned.video), planned.bytes] for planned in part.videos]
        hashed.update(json.dumps([part.name, part.split, videos]).encode())
    return hashed.hexdigest()
