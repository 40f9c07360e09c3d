"""UCF101 (Soomro, Zamir, Shah 2012, arXiv:1212.0402), as it is distributed.

Class folders, here, in `UCF-101/` or in `videos/`; `classInd.txt`, `trainlist0N.txt`, `testlist0N.txt` beside them, in
`ucfTrainTestlist/`, or in one of `files.PLACES` as mmaction2 has them.
The official test list is the split `validation`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import PLACES, find, read_lines, videos_of_classes
from vidfuse.data.annotations.source import Listed, Source, SourceVideo, keys_of, leave_out
from vidfuse.data.shards import DataError, Quarantined

USES = frozenset({"split_number", "allow_missing"})
"""Options that the layout has a use for."""
_LISTS = (*PLACES, "ucfTrainTestlist", "../ucfTrainTestlist")
_VIDEOS = ("UCF-101", "videos", ".")
_CLASS = re.compile(r"(?P<index>\d+)\s+(?P<name>.+)")
_LINE = re.compile(r"(?P<path>.+?)(?:\s+(?P<label>\d+))?")


def detect(folder: Path) -> bool:
    """Whether the folder has this layout's list of classes."""
    return _class_list(folder) is not None


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the annotations.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    lists = _class_list(folder)
    if lists is None:
        raise DataError(f"{folder}: no classInd.txt; unpack UCF101TrainTestSplits-RecognitionTask.zip beside the class folders")
    classes = _classes(lists)
    prefix, paths = videos_of_classes(folder, _VIDEOS, classes, "classInd.txt")
    videos = {path.removeprefix(prefix): path for path in paths}
    numbers = {name: index for index, name in enumerate(classes)}
    files = {"train": f"trainlist{options.split_number:02d}.txt", "validation": f"testlist{options.split_number:02d}.txt"}
    found: dict[str, list[tuple[str, Listed]]] = {}
    absent: tuple[Quarantined, ...] = ()
    for split, name in files.items():
        file = lists.parent / name
        entries = list(_entries(file, numbers))
        missing = [(Path(path).stem, path) for path, _ in entries if path not in videos]
        absent += leave_out(file, split, missing, listed=len(entries), share=options.allow_missing)
        found[split] = [(path, listed) for path, listed in entries if path in videos]
    keys = keys_of(dict.fromkeys(path for entries in found.values() for path, _ in entries))
    splits = {
        split: tuple(_video(path, keys[path], numbers, videos[path], listed) for path, listed in entries)
        for split, entries in found.items()
    }
    unlisted = len(videos) - len({v.path for s in splits.values() for v in s})
    return Source("ucf101", classes, splits, unlisted, absent, options={"split_number": options.split_number})


def _class_list(folder: Path) -> Path | None:
    return find(folder, (f"{place}/classInd.txt" for place in _LISTS))


def _classes(file: Path) -> tuple[str, ...]:
    classes: list[str] = []
    for number, line in read_lines(file):
        match = _CLASS.fullmatch(line)
        if match is None or int(match["index"]) != len(classes) + 1:
            raise DataError(f"{file}: line {number}: {line!r}; '{len(classes) + 1} ClassName' is needed")
        classes.append(match["name"])
    twice = next((name for place, name in enumerate(classes) if name in classes[:place]), None)
    if twice is not None:
        raise DataError(f"{file}: class {twice!r} is there twice; each class has one line")
    if len(classes) < 2:
        raise DataError(f"{file}: {len(classes)} classes; at least two are needed, one a line: '1 ClassName'")
    return tuple(classes)


def _entries(file: Path, numbers: dict[str, int]) -> Iterator[tuple[str, Listed]]:
    """Paths as listed, each with its line."""
    if not file.is_file():
        raise DataError(f"{file}: there is no such list; choose a split number whose lists are there, or add it")
    listed = str(file)
    for number, line in read_lines(file):
        match = _LINE.fullmatch(line)
        assert match is not None  # any line is a path
        path, label = match["path"], match["label"]
        name = path.partition("/")[0]
        if name not in numbers:
            raise DataError(f"{file}: line {number}: class {name!r} is not in classInd.txt; add it there, or remove the line")
        if label and int(label) != numbers[name] + 1:
            raise DataError(
                f"{file}: line {number}: label {label}, but {name} is {numbers[name] + 1} in classInd.txt; correct one of them"
            )
        yield path, Listed(listed, number)


def _video(listed: str, key: str, numbers: dict[str, int], path: str, where: Listed) -> SourceVideo:
    name = listed.partition("/")[0]
    return SourceVideo(key, path, numbers[name], name, listed=where)
