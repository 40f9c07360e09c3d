"""HMDB51 (Kuehne et al. 2011, doi:10.1109/ICCV.2011.6126543), as it is distributed and as mmaction2 lays it out.

A list a class and split, `<class>_test_split<N>.txt`, in `testTrainMulti_7030_splits/` or in one of `files.PLACES`: lines
`<video> 1` (train), `<video> 2` (test) or `<video> 0` (in neither). Class folders with the videos here or in `videos/`. The official
test list is the split `validation`; classes are numbered in alphabetical order. Lists of videos that were made from these
(`hmdb51_train_split_1_videos.txt`) are read instead where they are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import lists_of_classes, read_lines, text_files, videos_of_classes
from vidfuse.data.annotations.source import Listed, Source, SourceVideo, keys_of, leave_out, shown, split_of
from vidfuse.data.shards import DataError, Quarantined

USES = frozenset({"split_number", "allow_missing"})
"""Options that the layout has a use for."""
_VIDEOS = ("videos", ".")
_SPLITS = {"0": None, "1": "train", "2": "validation"}
_LINE = re.compile(r"(?P<video>.+?)\s+(?P<use>[012])")


def detect(folder: Path) -> bool:
    """Whether the folder has lists of this kind, and no list of training videos."""
    found = {file for files in lists_of_classes(folder).values() for file in files.values()}
    others = (file for file in text_files(folder, ".txt", ".csv") if file not in found)
    return bool(found) and not any(split_of(file.stem) == "train" for file in others)


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the annotations.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    numbered = lists_of_classes(folder)
    files = numbered.get(options.split_number)
    if files is None:
        there = f"; there are lists of {shown([*map(str, sorted(numbered))])}" if numbered else ""
        raise DataError(
            f"{folder}: no <class>_test_split{options.split_number}.txt of two classes{there}; choose --split-number"
        )
    classes = tuple(sorted(files))
    prefix, paths = videos_of_classes(folder, _VIDEOS, classes, f"<class>_test_split{options.split_number}.txt")
    videos = set(paths)
    found: dict[str, list[tuple[str, int, Listed]]] = {"train": [], "validation": []}
    absent: tuple[Quarantined, ...] = ()
    named: set[str] = set()
    for label, name in enumerate(classes):
        entries = [(f"{prefix}{name}/{video}", split, listed) for video, split, listed in _entries(files[name])]
        named.update(path for path, _, _ in entries)
        for split, chosen in found.items():
            mine = [(path, listed) for path, meant, listed in entries if meant == split]
            missing = [(Path(path).stem, path) for path, _ in mine if path not in videos]
            if mine:
                absent += leave_out(files[name], split, missing, listed=len(mine), share=options.allow_missing)
            chosen += [(path, label, listed) for path, listed in mine if path in videos]
    keys = keys_of(dict.fromkeys(path for chosen in found.values() for path, _, _ in chosen))
    splits = {
        split: tuple(SourceVideo(keys[path], path, label, classes[label], listed=listed) for path, label, listed in chosen)
        for split, chosen in found.items()
    }
    return Source("hmdb51", classes, splits, len(videos - named), absent, options={"split_number": options.split_number})


def _entries(file: Path) -> Iterator[tuple[str, str | None, Listed]]:
    """Name of the video, its split (`None`: it is in none), and where that is said."""
    name = str(file)
    for number, line in read_lines(file):
        match = _LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{file}: line {number}: {line[:120]!r}; '<video> 0', '<video> 1' or '<video> 2' is needed")
        yield match["video"], _SPLITS[match["use"]], Listed(name, number)
