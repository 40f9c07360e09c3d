"""Duplicates of a set: leaks from split to split, and repeats inside a split.

Comes in: the columns of each split as `survey` has them. Goes out: pairs and groups, by name. Two videos are duplicates if their bytes
are the same, or if their hashes (`duplicates`) differ in few bits; groups are what hangs together by such pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vidfuse.config import QualityConfig
from vidfuse.data.duplicates import Hashes, groups, near_pairs
from vidfuse.data.shards import Frozen

_COMPARED = 4096
"""Videos of other splits with which a video of a crowd is compared at a time."""

Rows = npt.NDArray[np.int64]


class Place(Frozen):
    """Where a video is."""

    split: str
    shard: str
    key: str
    label: int
    """-1: none."""


class Pair(Frozen):
    """A video and its nearest duplicate in another split."""

    video: Place
    duplicate: Place
    same_bytes: bool
    bits: float
    """In which the hashes of their frames differ, of 64, mean over frames."""


class Repeats(Frozen):
    """Duplicates inside a split."""

    split: str
    keys: tuple[str, ...]
    shards: tuple[str, ...]
    """Of each key."""
    same_bytes: bool
    """Whether all of them are the same file."""


@dataclass(frozen=True)
class _Videos:
    """All videos of a set, one after the other; arrays of [N]."""

    splits: tuple[str, ...]
    split: Rows
    """Which of `splits`."""
    shard: npt.NDArray[np.object_]
    key: npt.NDArray[np.object_]
    label: npt.NDArray[np.int32]
    sha256: npt.NDArray[np.object_]
    telling: npt.NDArray[np.bool_]
    """Whether its hashes say something."""
    hashes: Hashes

    def place(self, row: int) -> Place:
        """A video by name."""
        where = {"shard": self.shard[row], "key": self.key[row], "label": int(self.label[row])}
        return Place(split=self.splits[self.split[row]], **where)


def find(
    columns: Mapping[str, Mapping[str, Any]], config: QualityConfig, frames: int
) -> tuple[tuple[Pair, ...], tuple[Repeats, ...]]:
    """Find all duplicates.

    Args:
        columns: Of each split; `train`, or else the first one, is what the others leak from.
        config: How near hashes must be.
        frames: Hashes of a video.

    Returns:
        Each video of a later split with its nearest duplicate in an earlier one, and groups inside a split.
    """
    videos = _joined(columns, config, frames)
    most_bits = int(config.duplicate_bits * frames)
    leaks: list[Pair] = []
    repeats: list[Repeats] = []
    for rows in _crowds(videos, most_bits):
        for number in np.unique(videos.split[rows]):
            here, earlier = rows[videos.split[rows] == number], rows[videos.split[rows] < number]
            pairs = (_nearest(videos, row, earlier, most_bits) for row in here.tolist()) if len(earlier) else ()
            leaks += [pair for pair in pairs if pair is not None]
            if len(here) > 1:
                repeats.append(_repeats(videos, here))
    return tuple(leaks), tuple(repeats)


def _joined(columns: Mapping[str, Mapping[str, Any]], config: QualityConfig, frames: int) -> _Videos:
    splits = tuple(sorted(columns, key=lambda split: split != "train"))
    names = ("shard", "key", "label", "sha256", "readable", "contrast")
    joined = {name: np.concatenate([columns[split][name] for split in splits]) for name in names}
    hashes = np.zeros((len(joined["key"]), frames), np.uint64)
    values = [columns[split]["hashes"].combine_chunks().flatten().to_numpy(zero_copy_only=False) for split in splits]
    hashes[joined["readable"]] = np.concatenate(values).astype(np.uint64).reshape(-1, frames)
    with np.errstate(invalid="ignore"):
        telling = joined["readable"] & (joined["contrast"] > config.flat_contrast)
    split = np.repeat(np.arange(len(splits)), [len(columns[name]["key"]) for name in splits])
    return _Videos(
        splits, split, joined["shard"], joined["key"], joined["label"].astype(np.int32), joined["sha256"], telling, hashes
    )


def _crowds(videos: _Videos, most_bits: int) -> Iterator[Rows]:
    """Rows of each group of two videos or more, in order."""
    same = _equal(np.unique(videos.sha256.astype(str), return_inverse=True)[1], videos.sha256 != "")
    telling = np.flatnonzero(videos.telling)
    distinct, which = np.unique(videos.hashes[telling], axis=0, return_inverse=True)
    which = which.reshape(-1)
    twins = tuple(telling[rows] for rows in _equal(which, np.ones(len(telling), bool)))
    one = telling[np.unique(which, return_index=True)[1]] if len(telling) else telling
    near = near_pairs(distinct, most_bits)
    links = [(one[near.first], one[near.second]), twins, same]
    group = groups(np.concatenate([a for a, _ in links]), np.concatenate([b for _, b in links]), len(videos.key))
    order = np.argsort(group, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(rows) > 1:
            yield rows


def _equal(values: npt.NDArray[Any], counts: npt.NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """Each row that counts, and the next one with the same value."""
    rows = np.flatnonzero(counts)
    order = rows[np.argsort(values[rows], kind="stable")]
    same = values[order[:-1]] == values[order[1:]]
    return order[:-1][same], order[1:][same]


def _nearest(videos: _Videos, row: int, others: Rows, most_bits: int) -> Pair | None:
    """The nearest of some videos, the first of several; `None`: all of them are only near to what is near to it."""
    best, least = -1, most_bits + 1
    for start in range(0, len(others), _COMPARED):
        some = others[start : start + _COMPARED]
        bits = np.bitwise_count(videos.hashes[some] ^ videos.hashes[row]).sum(axis=1, dtype=np.int64)
        bits[~(videos.telling[some] & videos.telling[row])] = most_bits + 1
        bits[videos.sha256[some] == videos.sha256[row]] = -1
        if bits.min() < least:
            best, least = int(some[np.argmin(bits)]), int(bits.min())
        if least < 0:
            break
    if best < 0:
        return None
    mean = max(least, 0) / videos.hashes.shape[1]
    return Pair(video=videos.place(row), duplicate=videos.place(best), same_bytes=least < 0, bits=mean)


def _repeats(videos: _Videos, rows: Rows) -> Repeats:
    return Repeats(
        split=videos.splits[videos.split[rows[0]]],
        keys=tuple(videos.key[rows].tolist()),
        shards=tuple(videos.shard[rows].tolist()),
        same_bytes=len(set(videos.sha256[rows].tolist())) == 1,
    )
