"""Lists of videos, a file a split: those of mmaction2, VideoMAE and the many repositories that came from them.

A line is `path label` or `path total_frames label`, apart by spaces, commas or tabs, and a path may have spaces in it and quotes
around it; the number of frames is not used, since frames are counted. Files are called `train*`, `val*`, `test*` (`.txt` or
`.csv`, also with words before: `kinetics400_train_list_videos.txt`), in one of `files.PLACES`; of `..._split_N_...` those of the
wanted number are read, and of `..._videos` and `..._rawframes` the former. A test list may be without labels.

Paths are taken below the folder, below `videos/`, `videos_<split>/` or `<split>/`, or as they are where they are absolute; where
lists name folders of frames (`path total_frames label`), the videos of those names are taken. Names of classes come from a list
of classes; else they are their numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import (
    PLACES,
    SUFFIXES,
    archive_advice,
    class_file,
    csv_header,
    is_video,
    lists_of_classes,
    read_classes,
    read_lines,
    text_files,
    unread,
    videos_below,
)
from vidfuse.data.annotations.source import SPLIT_NAMES, Listed, Source, SourceVideo, keys_of, leave_out, shown, split_of
from vidfuse.data.shards import VIDEO_SUFFIXES, DataError, Quarantined

USES = frozenset({"split_number", "classes", "allow_missing"})
"""Options that the layout has a use for."""
MOST_CLASSES = 100_000
"""A larger label is taken for a mistake where no list of classes is given."""
_NUMBER = re.compile(r"split_?0*(\d+)")
_TRIED = 20
"""Entries of a list that are looked for to find the folder of its videos."""
_UCF101 = re.compile(r"(train|test)list0[123]\.txt")
_QUOTED = re.compile(r'"(?P<text>(?:[^"]|"")*)"')
_LINE = re.compile(rf'(?P<path>{_QUOTED.pattern}|.*?)(?:[\s,]+"?(?P<frames>\d+)"?)?[\s,]+"?(?P<label>-?\d+)"?')


class _Entry(NamedTuple):
    line: int
    path: str
    columns: int
    label: int | None


def detect(folder: Path) -> bool:
    """Whether the folder has a list of training videos."""
    return any(split_of(file.stem) == "train" for file in _candidates(folder))


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the lists.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    files = _files(folder, options.split_number)
    if "train" not in files:
        raise DataError(f"{folder}: {_no_list(folder, options.split_number)}")
    entries = {split: list(_entries(file, split)) for split, file in files.items()}
    names = class_file(folder, options.classes)
    classes = read_classes(names) if names else _numbers(files, entries)
    for split, listed in entries.items():
        _check_labels(files[split], listed, len(classes), names)
    there = videos_below(folder)
    if not there and (advice := archive_advice(folder)):
        raise DataError(f"{folder}: no videos ({SUFFIXES}); {advice}")
    known = set(there)
    found: dict[str, list[tuple[_Entry, str]]] = {}
    absent: tuple[Quarantined, ...] = ()
    for split, listed in entries.items():
        place = _place(folder, split, listed, known)
        paths = [(entry, _path(folder, place, entry, known)) for entry in listed]
        missing = [(Path(entry.path).stem, entry.path) for entry, path in paths if path is None]
        absent += leave_out(files[split], split, missing, listed=len(listed), share=options.allow_missing)
        found[split] = [(entry, path) for entry, path in paths if path is not None]
    keys = keys_of(dict.fromkeys(path for pairs in found.values() for _, path in pairs))
    splits = {
        split: tuple(
            SourceVideo(keys[path], path, e.label, "" if e.label is None else classes[e.label], listed=Listed(name, e.line))
            for name in (str(files[split]),)
            for e, path in pairs
        )
        for split, pairs in found.items()
    }
    used: dict[str, int | float] = (
        {"split_number": options.split_number} if any("split_" in file.stem for file in files.values()) else {}
    )
    return Source(folder.resolve().name, classes, splits, _unlisted(folder, known, keys), absent, options=used)


# --- files ---


def _candidates(folder: Path) -> Iterator[Path]:
    """Without the lists of UCF101 and HMDB51 and the CSV files of Kinetics, which are called alike."""
    others = {file for files in lists_of_classes(folder).values() for file in files.values()}
    files = (file for file in text_files(folder, ".txt", ".csv") if file not in others and not _UCF101.fullmatch(file.name))
    return (file for file in files if "youtube_id" not in csv_header(file))


def _numbered(file: Path) -> tuple[str | None, int | None]:
    """The split that a list's name tells, and the number of the official split."""
    number = _NUMBER.search(file.stem)
    return split_of(_NUMBER.sub("", file.stem)), int(number[1]) if number else None


def _no_list(folder: Path, wanted: int) -> str:
    others = sorted(
        {number for file in _candidates(folder) for split, number in (_numbered(file),) if split == "train" and number}
    )
    if others:
        return f"no training list of split {wanted}; give --split-number {others[0]} (there are lists of {shown([*map(str, others)])})"
    return f"no list called train*.txt or train*.csv here, in {', '.join(f'{place}/' for place in PLACES[1:])}{unread(folder)}"


def _files(folder: Path, wanted: int) -> dict[str, Path]:
    groups: dict[str, list[Path]] = {}
    for file in _candidates(folder):
        split, number = _numbered(file)
        if split and number in (None, wanted):
            groups.setdefault(split, []).append(file)
    files = {}
    for split, group in groups.items():
        chosen = [file for file in group if not ("rawframes" in file.stem and len(group) > 1)]
        if len(chosen) != 1:
            raise DataError(
                f"{folder}: {', '.join(str(file) for file in group)} are all lists of the split {split!r}; keep one"
            )
        files[split] = chosen[0]
    return {split: files[split] for split in dict.fromkeys(SPLIT_NAMES.values()) if split in files}


# --- lines ---


def _entries(file: Path, split: str) -> Iterator[_Entry]:
    first: _Entry | None = None
    for number, line in read_lines(file):
        entry = _entry(file, number, line, split)
        first = first or entry
        if entry.columns != first.columns:
            raise DataError(
                f"{file}: line {number} has {entry.columns} columns, line {first.line} has {first.columns}; 'path label' or"
                f" 'path total_frames label' is needed throughout (one label a video)"
            )
        yield entry


def _entry(file: Path, number: int, line: str, split: str) -> _Entry:
    if split == "test" and is_video(_unquoted(line)):
        return _Entry(number, _unquoted(line), 1, None)
    match = _LINE.fullmatch(line)
    if match is None or not match["path"]:
        column = len(line) - len(re.split(r"[\s,]+", line)[-1]) + 1
        raise DataError(
            f"{file}: line {number}, column {column}: {line[:120]!r}; 'path label' or 'path total_frames label' is needed, with the"
            f" label a number from 0{'; remove the line if it names the columns' if number == 1 else ''}"
        )
    path, frames = _unquoted(match["path"]), match["frames"]
    if frames is not None and not is_video(path) and is_video(f"{path} {frames}"):
        path, frames = f"{path} {frames}", None
    return _Entry(number, path, 2 + (frames is not None), int(match["label"]))


def _unquoted(text: str) -> str:
    quoted = _QUOTED.fullmatch(text)
    return quoted["text"].replace('""', '"') if quoted else text


def _numbers(files: dict[str, Path], entries: dict[str, list[_Entry]]) -> tuple[str, ...]:
    """Names of classes where no list tells them: their numbers."""
    most = {split: max((e.label for e in listed if e.label is not None), default=-1) for split, listed in entries.items()}
    for split, label in most.items():
        if label >= MOST_CLASSES:
            raise DataError(f"{files[split]}: label {label}; at most {MOST_CLASSES} classes are read, so this is no label")
    if most["train"] < 1:
        raise DataError(
            f"{files['train']}: at least two classes are needed, labels 0 and 1; the largest label is {most['train']}"
        )
    return tuple(str(number) for number in range(most["train"] + 1))


def _check_labels(file: Path, entries: Sequence[_Entry], classes: int, names: Path | None) -> None:
    for entry in entries:
        if entry.label is not None and not 0 <= entry.label < classes:
            source = f"{names} has" if names else "the training list has"
            raise DataError(
                f"{file}: line {entry.line}: label {entry.label}, but {source} {classes} classes: 0 to {classes - 1} are allowed;"
                f" correct it, or give the right list of classes with --classes"
            )


# --- paths ---


def _place(folder: Path, split: str, entries: Sequence[_Entry], known: set[str]) -> str:
    """The folder below which a list's paths are: the first in which one of its first entries is there, else that of most."""
    aliases = [name for name, meant in SPLIT_NAMES.items() if meant == split]
    places = ["", "videos/", *(f"videos_{name}/" for name in aliases), *(f"{name}/" for name in aliases)]
    below = [entry for entry in entries if not entry.path.startswith("/")]
    found = next((p for p in places for entry in below[:_TRIED] if _path(folder, p, entry, known) is not None), None)
    if found is not None or len(below) <= _TRIED:
        return found or ""
    stems = {path.rpartition(".")[0] for path in known}
    names = [os.path.normpath(entry.path) for entry in below]
    return max(places, key=lambda p: sum(f"{p}{name}" in known or f"{p}{name}" in stems for name in names))


def _path(folder: Path, place: str, entry: _Entry, known: set[str]) -> str | None:
    path = entry.path if entry.path.startswith("/") else os.path.normpath(f"{place}{entry.path}")
    if is_video(path):
        return path if path in known or (folder / path).is_file() else None
    named = next((video for suffix in VIDEO_SUFFIXES if (video := f"{path}.{suffix}") in known), None)
    if named is None and (folder / path).is_dir():
        raise DataError(
            f"{folder / path} is a folder of frames; videos are packed: put {Path(path).name}.mp4 beside it, or encode it with"
            f" ffmpeg -framerate 25 -i img_%05d.jpg"
        )
    return named


def _unlisted(folder: Path, known: set[str], used: Iterable[str]) -> int:
    """How many videos of the folder no list names, whichever way it spells their paths."""
    real = cache(os.path.realpath)

    def place(path: str) -> str:
        below, _, name = path.rpartition("/")
        return f"{real(folder / below)}/{name}"

    return len({place(path) for path in known} - {place(path) for path in used})
