"""Plain folders: `<split>/<class>/<video>`, or `<class>/<video>` with a hold-out.

Split folders are called as in `source.SPLIT_NAMES`; videos directly in a test folder are unlabelled. Classes are numbered in
alphabetical order of their folders, or by a list of classes. Without split folders a share of each class's videos is held out
for validation: those first in the order of a hash of (seed, path), so a video stays where it is when others are added to its
class, but for the ones at the border. Clips cut from one recording are not kept together; give split folders where that matters.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import SUFFIXES, archive_advice, class_file, read_classes, videos_below
from vidfuse.data.annotations.source import SPLIT_NAMES, Source, SourceVideo, keys_of, label_of
from vidfuse.data.shards import DataError

Paths = dict[str, list[str]]


def detect(folder: Path) -> bool:
    """Whether there are videos in folders, or in folders of split folders."""
    return any("/" in path for path in videos_below(folder, depth=2))


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the folders' names.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    paths = videos_below(folder, depth=2)
    if not paths:
        raise DataError(f"{folder}: no videos ({SUFFIXES}) in folders of classes; {archive_advice(folder) or 'put them there'}")
    has_splits = any(path.count("/") == 2 and SPLIT_NAMES.get(path.partition("/")[0].lower()) == "train" for path in paths)
    used: dict[str, int | float] = {}
    if has_splits:
        if options.holdout is not None:
            raise DataError(f"{folder} has folders of splits; --holdout is for one without")
        splits = _split_folders(folder, paths)
    else:
        if options.holdout is None:
            raise DataError(
                f"{folder} has folders of classes and none of splits; give --holdout 0.1 to validate on a tenth of each class, or"
                f" put them into train/ and val/"
            )
        splits = _held_out(paths, options.holdout, options.seed)
        used = {"holdout": options.holdout, "seed": options.seed}
    level = 1 if has_splits else 0
    classes = _classes(folder, splits, level, options)
    numbers = {name: number for number, name in enumerate(classes)}
    keys = keys_of(path for split in splits.values() for path in split)
    videos = {
        split: tuple(_video(folder, path, level, numbers, keys[path]) for path in found) for split, found in splits.items()
    }
    return Source(folder.resolve().name, classes, videos, len(paths) - len(keys), options=used)


def _split_folders(folder: Path, paths: list[str]) -> Paths:
    splits: Paths = {}
    names: dict[str, str] = {}
    for path in paths:
        top, _, rest = path.partition("/")
        split = SPLIT_NAMES.get(top.lower()) if rest else None
        if split is None or ("/" not in rest and split != "test"):
            continue
        if names.setdefault(split, top) != top:
            raise DataError(f"{folder}: {names[split]}/ and {top}/ are both the split {split!r}; keep one")
        splits.setdefault(split, []).append(path)
    return splits


def _held_out(paths: list[str], share: float, seed: int) -> Paths:
    groups: Paths = {}
    for path in paths:
        if path.count("/") == 1:
            groups.setdefault(path.partition("/")[0], []).append(path)
    splits: Paths = {"train": [], "validation": []}
    for group in groups.values():
        held = min(len(group) - 1, max(1, round(share * len(group))))
        first = set(sorted(group, key=lambda path: hashlib.sha256(f"{seed}/{path}".encode()).digest())[:held])
        for path in group:
            splits["validation" if path in first else "train"].append(path)
    return splits


def _classes(folder: Path, splits: Paths, level: int, options: LayoutConfig) -> tuple[str, ...]:
    names = class_file(folder, options.classes)
    if names:
        return read_classes(names)
    classes = tuple(sorted({path.split("/")[level] for path in splits["train"]}))
    if len(classes) < 2:
        raise DataError(f"{folder}: the folder of one class alone, {classes[0]!r}; at least two classes are needed")
    return classes


def _video(folder: Path, path: str, level: int, numbers: dict[str, int], key: str) -> SourceVideo:
    parts = path.split("/")
    if len(parts) == level + 1:
        return SourceVideo(key, path, None, "")
    name = parts[level]
    return SourceVideo(key, path, label_of(name, numbers, str(folder / path)), name)
