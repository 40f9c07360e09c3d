"""Annotation layouts: a folder of videos as its data set is distributed -> which videos, in which split, of which class.

Comes in: a folder, and its layout where that is not told by the files. Goes out: a `Source`, or a `DataError` that names the
file, what is wrong and what to do. Only names and annotations are read, no video is opened.

`ssv2`: Something-Something-V2 (Goyal et al. 2017, arXiv:1706.04261). `labels/{labels,train,validation,test}.json`, the same
    files in the folder itself, or `something-something-v2-*.json` of older releases; videos `<id>.webm` beside them or in
    `20bn-something-something-v2/`. Templates have [brackets], those of `labels.json` none. The test split is unlabelled.
`ucf101`: UCF101 (Soomro, Zamir, Shah 2012, arXiv:1212.0402). Class folders, here or in `UCF-101/`; `classInd.txt`,
    `trainlist0N.txt`, `testlist0N.txt` beside them or in `ucfTrainTestlist/`. The official test list is the split `validation`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vidfuse.data.shards import VIDEO_SUFFIXES, DataError, check_key

LAYOUTS = ("ssv2", "ucf101")
_SSV2_ANNOTATIONS = ("labels/{}.json", "{}.json", "something-something-v2-{}.json", "labels/something-something-v2-{}.json")
_SSV2_VIDEOS = ("20bn-something-something-v2", "videos", ".")
_UCF101_LISTS = (".", "ucfTrainTestlist", "../ucfTrainTestlist")
_UCF101_VIDEOS = ("UCF-101", ".")
_SHOWN = 10


@dataclass(frozen=True)
class SourceVideo:
    """A video as its data set lists it."""

    key: str
    """Name of the sample: the file's name without its suffix."""
    path: str
    """Below the source's folder, with forward slashes."""
    label: int | None
    """Class; `None` where the split has no labels."""
    text: str
    """SSv2: the sentence (empty without labels); UCF101: the class name."""


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


def read_layout(folder: str | Path, layout: Literal["ssv2", "ucf101"] | str | None = None, *, split_number: int = 1) -> Source:
    """Read the annotations of a folder of videos.

    Args:
        folder: Where the data set was unpacked.
        layout: One of `LAYOUTS`; `None`: told from the files.
        split_number: Which of the three official splits of UCF101.

    Raises:
        DataError: no such folder, no videos or annotations in it, annotations that are broken, name missing videos or unknown
            classes, or put a video in two splits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; give the folder in which the data set was unpacked")
    layout = layout or detect_layout(folder)
    if layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if split_number not in (1, 2, 3):
        raise DataError(f"UCF101 has the official splits 1, 2 and 3, given {split_number}")
    source = _read_ssv2(folder) if layout == "ssv2" else _read_ucf101(folder, split_number)
    _check_keys(source)
    return source


def detect_layout(folder: Path) -> str:
    """The layout that a folder's annotation files tell.

    Raises:
        DataError: none of the layouts.
    """
    if _find(folder, (name.format("labels") for name in _SSV2_ANNOTATIONS)):
        return "ssv2"
    if _find(folder, (f"{place}/classInd.txt" for place in _UCF101_LISTS)):
        return "ucf101"
    raise DataError(
        f"{folder}: no annotations; a folder is needed that holds labels/labels.json (Something-Something-V2) or classInd.txt"
        f" (UCF101) as those data sets are distributed"
    )


# --- Something-Something-V2 ---


def _read_ssv2(folder: Path) -> Source:
    labels_file = _find(folder, (name.format("labels") for name in _SSV2_ANNOTATIONS))
    if labels_file is None:
        raise DataError(
            f"{folder}: no {_SSV2_ANNOTATIONS[0].format('labels')}; unpack the labels of Something-Something-V2 there"
        )
    classes = _ssv2_classes(labels_file)
    videos = _videos_by_stem(folder, next(place for place in _SSV2_VIDEOS if (folder / place).is_dir()))
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, tuple[SourceVideo, ...]] = {}
    for split in ("train", "validation", "test"):
        file = _find(folder, (name.format(split) for name in _SSV2_ANNOTATIONS))
        if file is not None:
            splits[split] = _ssv2_split(file, numbers, videos)
    if "train" not in splits:
        raise DataError(f"{folder}: no train.json beside {labels_file.name}; unpack all annotations")
    return Source("something-something-v2", classes, splits, len(videos) - len({v.key for s in splits.values() for v in s}))


def _ssv2_classes(file: Path) -> tuple[str, ...]:
    content = _read_json(file)
    try:
        numbered = {int(number): _plain(name) for name, number in content.items()}
    except (AttributeError, TypeError, ValueError):
        raise DataError(f'{file}: an object {{"class": "number", ...}} is needed') from None
    if len(numbered) != len(content) or sorted(numbered) != list(range(len(content))) or len(content) < 2:
        raise DataError(f"{file}: the classes' numbers are 0 to {len(content) - 1}, each once, and at least two")
    return tuple(numbered[number] for number in range(len(content)))


def _ssv2_split(file: Path, numbers: dict[str, int], videos: dict[str, str]) -> tuple[SourceVideo, ...]:
    content = _read_json(file)
    if not isinstance(content, list) or not all(isinstance(entry, dict) and "id" in entry for entry in content):
        raise DataError(f'{file}: a list of objects with "id" is needed')
    _check_present(file, [str(entry["id"]) for entry in content], videos)
    return tuple(_ssv2_video(file, entry, numbers, videos[str(entry["id"])]) for entry in content)


def _ssv2_video(file: Path, entry: dict[str, Any], numbers: dict[str, int], path: str) -> SourceVideo:
    key, template = str(entry["id"]), entry.get("template")
    if template is None:
        if not file.stem.endswith("test"):
            raise DataError(f'{file}: video {key} has no "template"; only the test split is without labels')
        return SourceVideo(key, path, None, "")
    name = _plain(str(template))
    if name not in numbers:
        raise DataError(f"{file}: video {key} has the class {name!r}, which labels.json does not list")
    return SourceVideo(key, path, numbers[name], str(entry.get("label", name)))


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


# --- UCF101 ---


def _read_ucf101(folder: Path, number: int) -> Source:
    lists = _find(folder, (f"{place}/classInd.txt" for place in _UCF101_LISTS))
    if lists is None:
        raise DataError(f"{folder}: no classInd.txt; unpack UCF101TrainTestSplits-RecognitionTask.zip beside the class folders")
    classes = _ucf101_classes(lists)
    place = next(place for place in _UCF101_VIDEOS if (folder / place).is_dir())
    root = folder / place
    videos = {
        _below(path, folder).removeprefix(f"{place}/"): _below(path, folder)
        for name in classes
        for path in sorted((root / name).glob("*"))
        if _is_video(path)
    }
    if not videos:
        raise DataError(f"{root}: no class folder of classInd.txt is here with a video in it ({_suffixes()})")
    numbers = {name: index for index, name in enumerate(classes)}
    files = {"train": f"trainlist{number:02d}.txt", "validation": f"testlist{number:02d}.txt"}
    splits = {split: _ucf101_split(lists.parent / file, numbers, videos) for split, file in files.items()}
    return Source("ucf101", classes, splits, len(videos) - len({v.path for s in splits.values() for v in s}))


def _ucf101_classes(file: Path) -> tuple[str, ...]:
    classes: list[str] = []
    for number, line in _lines(file):
        index, _, name = line.partition(" ")
        if index != str(len(classes) + 1) or not name.strip():
            raise DataError(f"{file}: line {number}: {line!r}; '{len(classes) + 1} ClassName' is needed")
        classes.append(name.strip())
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise DataError(f"{file}: at least two classes are needed, each once")
    return tuple(classes)


def _ucf101_split(file: Path, numbers: dict[str, int], videos: dict[str, str]) -> tuple[SourceVideo, ...]:
    if not file.is_file():
        raise DataError(f"{file}: there is no such list; choose a split number whose lists are there, or add it")
    entries = [(number, *line.partition(" ")[::2]) for number, line in _lines(file)]
    for number, path, label in entries:
        name = path.partition("/")[0]
        if name not in numbers:
            raise DataError(f"{file}: line {number}: class {name!r} is not in classInd.txt")
        if label.strip() and label.strip() != str(numbers[name] + 1):
            raise DataError(f"{file}: line {number}: label {label.strip()}, but {name} is {numbers[name] + 1} in classInd.txt")
    _check_present(file, [path for _, path, _ in entries], videos)
    names = [(path, path.partition("/")[0]) for _, path, _ in entries]
    return tuple(SourceVideo(Path(path).stem, videos[path], numbers[name], name) for path, name in names)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


# --- both ---


def _find(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_video(path: Path) -> bool:
    return path.suffix.lower().lstrip(".") in VIDEO_SUFFIXES


def _suffixes() -> str:
    return ", ".join(f".{suffix}" for suffix in VIDEO_SUFFIXES)


def _videos_by_stem(folder: Path, place: str) -> dict[str, str]:
    videos: dict[str, str] = {}
    for path in sorted(path for path in (folder / place).iterdir() if _is_video(path)):
        if path.stem in videos:
            raise DataError(f"{folder / place}: {Path(videos[path.stem]).name} and {path.name} have the same id; remove one")
        videos[path.stem] = _below(path, folder)
    if not videos:
        raise DataError(f"{folder / place}: no videos ({_suffixes()}); unpack them there")
    return videos


def _check_present(file: Path, names: list[str], videos: dict[str, str]) -> None:
    missing = [name for name in names if name not in videos]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise DataError(
            f"{file} names {len(missing)} of {len(names)} videos that are not there: {', '.join(missing[:_SHOWN])}{more};"
            f" unpack all parts of the data set, or remove them from the list"
        )


def _check_keys(source: Source) -> None:
    seen: dict[str, str] = {}
    for split, videos in source.splits.items():
        if not videos:
            raise DataError(f"split {split!r} of {source.dataset} lists no videos; remove its file, or fill it")
        for video in videos:
            if check_key(video.key) in seen:
                where = f"twice in {split}" if seen[video.key] == split else f"in {seen[video.key]} and in {split}"
                raise DataError(f"video {video.key} is listed {where}; a video is in one split, once")
            seen[video.key] = split
