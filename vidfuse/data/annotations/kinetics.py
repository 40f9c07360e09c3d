"""Kinetics-400, -600 and -700 (Kay et al. 2017, arXiv:1705.06950), as the public downloaders lay them out.

Annotations: CSV files with the columns `label,youtube_id,time_start,time_end,split` (and others, such as `is_cc`), in the folder
itself or in `annotations/`; a test split may be without labels. Videos: `<youtube_id>_<time_start>_<time_end>.mp4`, times in
seconds with six digits, anywhere below the folder: in `train/ val/ test/` (the mirror of CVDF), in class folders (the crawler of
ActivityNet) or both. One in a folder `replacement*` stands in for the damaged one of the same name. Classes are numbered in
alphabetical order, as mmaction2 and the Kinetics checkpoints have them, or by a list of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import by_stem, class_file, csv_header, csv_rows, read_classes, text_files, videos_below
from vidfuse.data.annotations.source import SPLIT_NAMES, Listed, Source, SourceVideo, label_of, leave_out, shown, split_of
from vidfuse.data.shards import DataError, Quarantined

USES = frozenset({"classes", "allow_missing"})
"""Options that the layout has a use for."""
_COLUMNS = ("youtube_id", "time_start", "time_end")
_NUMBERED = (400, 600, 700)


class _Row(NamedTuple):
    listed: Listed
    split: str
    label: str | None
    key: str


def detect(folder: Path) -> bool:
    """Whether the folder has CSV files of this kind."""
    return any(_lists(folder))


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the annotations.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    rows = {file: list(_rows(file)) for file in _lists(folder)}
    if not rows:
        raise DataError(
            f"{folder}: no CSV with the columns label,{','.join(_COLUMNS)},split here or in annotations/; put the annotations"
            f" of Kinetics there"
        )
    videos = by_stem(folder, ".", _preferred(videos_below(folder)))
    names = class_file(folder, options.classes)
    labels = {row.label for file in rows.values() for row in file if row.label is not None}
    classes = read_classes(names) if names else tuple(sorted(labels))
    if len(classes) < 2:
        raise DataError(f"{', '.join(map(str, rows))}: at least two classes are needed, found: {shown(classes) or 'none'}")
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, list[SourceVideo]] = {split: [] for split in dict.fromkeys(SPLIT_NAMES.values())}
    absent: tuple[Quarantined, ...] = ()
    for file, listed in rows.items():
        for split, found in splits.items():
            mine = [row for row in listed if row.split == split]
            missing = [(row.key, f"{row.key}.mp4") for row in mine if row.key not in videos]
            if mine:
                absent += leave_out(file, split, missing, listed=len(mine), share=options.allow_missing)
            found += [_video(row, numbers, videos[row.key]) for row in mine if row.key in videos]
    filled = {split: tuple(found) for split, found in splits.items() if found}
    unlisted = len(videos) - len({v.key for s in filled.values() for v in s})
    dataset = f"kinetics{len(classes) if len(classes) in _NUMBERED else ''}"
    return Source(dataset, classes, filled, unlisted, absent)


def _lists(folder: Path) -> Iterator[Path]:
    return (file for file in text_files(folder, ".csv") if set(_COLUMNS) <= set(csv_header(file)))


def _rows(file: Path) -> Iterator[_Row]:
    name, rows = str(file), csv_rows(file)
    header = [name.lower() for name in next(rows)[1]]
    for number, fields in rows:
        if not any(fields):
            continue
        where = Listed(name, number)
        if len(fields) != len(header):
            raise DataError(
                f"{where}: {len(fields)} columns, the first line names {len(header)}: {','.join(header)}; correct the line (text"
                f" with commas needs quotes)"
            )
        values = dict(zip(header, fields, strict=True))
        split = _split(values.get("split"), file, where)
        label = values.get("label") or None
        if label is None and split != "test":
            raise DataError(f"{where}: no label; add it or remove the line: only the test split is without labels")
        times = [_seconds(values[name], f"{where}, column {header.index(name) + 1} ({name})") for name in _COLUMNS[1:]]
        yield _Row(where, split, label, f"{values['youtube_id']}_{times[0]:06d}_{times[1]:06d}")


def _split(given: str | None, file: Path, where: Listed) -> str:
    split = SPLIT_NAMES.get(given.lower()) if given else split_of(file.stem)
    if split is None:
        raise DataError(
            f"{where}: split {given!r} is none of {', '.join(SPLIT_NAMES)}, and neither does the file's name tell it; correct it"
        )
    return split


def _seconds(text: str, where: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise DataError(f"{where}: {text!r} is not a number of seconds; correct it, or remove the line") from None


def _preferred(videos: list[str]) -> list[str]:
    """Without those for which a replacement is there."""
    replacements = {Path(path).stem for path in videos if _is_replacement(path)}
    return [path for path in videos if _is_replacement(path) or Path(path).stem not in replacements]


def _is_replacement(path: str) -> bool:
    return any(part.startswith("replacement") for part in path.split("/")[:-1])


def _video(row: _Row, numbers: dict[str, int], path: str) -> SourceVideo:
    label = None if row.label is None else label_of(row.label, numbers, str(row.listed))
    return SourceVideo(row.key, path, label, row.label or "", listed=row.listed)
