"""A data set before it is packed: its videos, classes and splits, as its annotations tell them."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vidfuse.data.shards import DataError, Quarantined, check_key

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What files and folders call a split, and what it is called here."""
SHOWN = 10
"""Names of a long list that a message has."""


class Listed(NamedTuple):
    """The line that lists a video."""

    file: str
    line: int
    """From 1; 0: not known."""

    def __str__(self) -> str:
        return f"{self.file}: line {self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class SourceVideo:
    """A video as its data set lists it."""

    key: str
    """Name of the sample: the file's name without its suffix, where that is unique and allowed."""
    path: str
    """Below the source's folder, with forward slashes; an absolute one where a list has it."""
    label: int | None
    """Class; `None` where the split has no labels."""
    text: str
    """SSv2: the sentence (empty without labels); else: the class name."""
    placeholders: tuple[str, ...] = ()
    """SSv2: what the sentence puts into its template, as annotated."""
    listed: Listed | None = field(default=None, compare=False)
    """Where annotations name it; no part of what is packed."""


@dataclass(frozen=True)
class Source:
    """A data set before it is packed."""

    dataset: str
    classes: tuple[str, ...]
    """Names, in the order of their numbers."""
    splits: dict[str, tuple[SourceVideo, ...]]
    """Videos in the order of the lists."""
    unlisted: int
    """Videos in the folder that no list names; they are not packed."""
    absent: tuple[Quarantined, ...] = ()
    """Videos that a list names and that are not there, as far as that was allowed."""
    layout: str = ""
    """Which layout it was read as."""
    options: dict[str, int | float] = field(default_factory=dict)
    """Options that decided which video is in which split."""

    def line(self) -> str:
        """As what it was read, in words."""
        counts = ", ".join(f"{len(videos)} {split}" for split, videos in self.splits.items())
        return f"read as {self.layout}: {counts} videos of {len(self.classes)} classes ({shown(self.classes)})"


Entry = tuple[str, SourceVideo]
"""A split and a video that is in it."""


def split_of(name: str) -> str | None:
    """The split that the name of a file or folder tells (`kinetics400_val_list.txt`: validation); `None`: none.

    The first of its words that begins like the name of a split counts.
    """
    for word in re.split(r"[^a-z0-9]+", name.lower()):
        for start, split in sorted(SPLIT_NAMES.items(), key=lambda item: -len(item[0])):
            if re.fullmatch(rf"{start}(list|split|set)?\d*", word):
                return split
    return None


def leave_out(
    file: Path, split: str, absent: Sequence[tuple[str, str]], *, listed: int, share: float
) -> tuple[Quarantined, ...]:
    """Records of videos that a list names and that are not there.

    Args:
        file: The list.
        split: Its split.
        absent: Key and name as listed, each.
        listed: Videos of the list.
        share: Of a list that may be absent.

    Raises:
        DataError: more are.
    """
    if len(absent) > share * listed:
        enough = min(0.99, len(absent) / listed + 0.005)
        raise DataError(
            f"{file} names {len(absent)} of {listed} videos that are not there: {shown([name for _, name in absent])};"
            f" unpack all parts of the data set"
            + (
                f", remove them from the list, or leave them out with --allow-missing {enough:.2f}"
                if len(absent) < listed
                else ""
            )
        )
    return tuple(Quarantined(split=split, key=key, path=name, reason="not in the source folder") for key, name in absent)


def shown(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are; bytes that are no UTF-8 are written as such."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(os.fsencode(name).decode(errors='backslashreplace') for name in names[:SHOWN])}{more}"


def label_of(name: str, numbers: dict[str, int], where: str) -> int:
    """The number of a class.

    Raises:
        DataError: the class list has no such name; the message starts with `where`.
    """
    if name not in numbers:
        raise DataError(
            f"{where}: class {name!r} is not in the list of {len(numbers)} classes ({shown(list(numbers))}); correct it, or"
            f" the list of classes"
        )
    return numbers[name]


def keys_of(paths: Iterable[str]) -> dict[str, str]:
    """A sample's key for each path: the name without its suffix, or where that is not unique or not allowed, made from the path."""
    stems = {path: Path(path).stem for path in paths}
    counts = Counter(stems.values())
    return {path: stem if counts[stem] == 1 and _allowed(stem) else _made_key(path) for path, stem in stems.items()}


def _allowed(key: str) -> bool:
    try:
        check_key(key)
    except DataError:
        return False
    return True


def _made_key(path: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "_", str(Path(path).with_suffix("")))
    return f"{words[-60:]}-{hashlib.sha256(path.encode()).hexdigest()[:12]}"


def check_videos(source: Source) -> None:
    """Check that each split has videos, and each video one split.

    Raises:
        DataError: it is not so.
    """
    seen: dict[str, Entry] = {}
    repeats: list[tuple[Entry, Entry]] = []
    for split, videos in source.splits.items():
        if not videos:
            raise DataError(f"split {split!r} of {source.dataset} lists no videos; remove its file, or fill it")
        for video in videos:
            if check_key(video.key) in seen:
                repeats.append((seen[video.key], (split, video)))
            seen[video.key] = split, video
    refuse_repeats(source.classes, repeats)


def refuse_repeats(classes: Sequence[str], repeats: Sequence[tuple[Entry, Entry]]) -> None:
    """Tell which videos are listed twice; first those of two labels.

    Raises:
        DataError: there are some.
    """
    if not repeats:
        return
    relabelled = [pair for pair in repeats if _differ(pair)]
    chosen = relabelled or repeats
    (first_split, first), (split, video) = chosen[0]
    where = f"twice in {split}" if split == first_split else f"in {first_split} and in {split}"
    labels = " and ".join(repr(classes[v.label]) for v in (first, video) if v.label is not None)
    rule = f" with different labels, {labels}" if relabelled else "; a video is in one split, once"
    names = [f"{a.key} ({a.listed or a.path}, {b.listed or b.path})" for (_, a), (_, b) in chosen]
    raise DataError(f"video {first.key} is listed {where}{rule}; keep one of each two: {shown(names)}")


def _differ(pair: tuple[Entry, Entry]) -> bool:
    labels = [video.label for _, video in pair]
    return None not in labels and labels[0] != labels[1]
