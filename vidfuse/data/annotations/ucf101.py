"""UCF101 (Soomro, Zamir, Shah 2012, arXiv:1212.0402), as it is distributed.

Class folders, here or in `UCF-101/`; `classInd.txt`, `trainlist0N.txt`, `testlist0N.txt` beside them or in `ucfTrainTestlist/`.
The official test list is the split `validation`.
"""

from __future__ import annotations

from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import SUFFIXES, archive_advice, find, read_lines, videos_below
from vidfuse.data.annotations.source import Source, SourceVideo, leave_out
from vidfuse.data.shards import DataError, Quarantined

_LISTS = (".", "ucfTrainTestlist", "../ucfTrainTestlist")
_VIDEOS = ("UCF-101", ".")


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
    place = next(place for place in _VIDEOS if (folder / place).is_dir())
    prefix = "" if place == "." else f"{place}/"
    videos = {
        path.removeprefix(prefix): path
        for name in classes
        if (folder / place / name).is_dir()
        for path in videos_below(folder, f"{prefix}{name}", depth=0)
    }
    if not videos:
        advice = archive_advice(folder)
        raise DataError(
            f"{folder / place}: no class folder of classInd.txt is here with a video in it ({SUFFIXES})"
            f"{'; ' + advice if advice else ''}"
        )
    numbers = {name: index for index, name in enumerate(classes)}
    files = {"train": f"trainlist{options.split_number:02d}.txt", "validation": f"testlist{options.split_number:02d}.txt"}
    splits: dict[str, tuple[SourceVideo, ...]] = {}
    absent: tuple[Quarantined, ...] = ()
    for split, name in files.items():
        file = lists.parent / name
        paths = _paths(file, numbers)
        missing = [(Path(path).stem, path) for path in paths if path not in videos]
        absent += leave_out(file, split, missing, listed=len(paths), share=options.allow_missing)
        splits[split] = tuple(_video(path, numbers, videos[path]) for path in paths if path in videos)
    unlisted = len(videos) - len({v.path for s in splits.values() for v in s})
    return Source("ucf101", classes, splits, unlisted, absent, options={"split_number": options.split_number})


def _class_list(folder: Path) -> Path | None:
    return find(folder, (f"{place}/classInd.txt" for place in _LISTS))


def _classes(file: Path) -> tuple[str, ...]:
    classes: list[str] = []
    for number, line in read_lines(file):
        index, _, name = line.partition(" ")
        if index != str(len(classes) + 1) or not name.strip():
            raise DataError(f"{file}: line {number}: {line!r}; '{len(classes) + 1} ClassName' is needed")
        classes.append(name.strip())
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{file}: at least two classes are needed, each once")
    return tuple(classes)


def _paths(file: Path, numbers: dict[str, int]) -> list[str]:
    if not file.is_file():
        raise DataError(f"{file}: there is no such list; choose a split number whose lists are there, or add it")
    paths = []
    for number, line in read_lines(file):
        path, _, label = line.partition(" ")
        name = path.partition("/")[0]
        if name not in numbers:
            raise DataError(f"{file}: line {number}: class {name!r} is not in classInd.txt")
        if label.strip() and label.strip() != str(numbers[name] + 1):
            raise DataError(f"{file}: line {number}: label {label.strip()}, but {name} is {numbers[name] + 1} in classInd.txt")
        paths.append(path)
    return paths


def _video(listed: str, numbers: dict[str, int], path: str) -> SourceVideo:
    name = listed.partition("/")[0]
    return SourceVideo(Path(listed).stem, path, numbers[name], name)
