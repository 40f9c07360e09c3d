"""Plain folders: `<split>/<class>/<video>`, or `<class>/<video>` with a hold-out.

Split folders are called as in `source.SPLIT_NAMES`, and no class is; videos directly in a test folder are unlabelled. Classes are
numbered in alphabetical order of their folders, or by a list of classes. A class's videos may lie in folders of groups, whose
names have a number (`<class>/v_shooting_01/<video>` of UCF11): other folders in class folders are refused, since they may be the
classes themselves, unless a list of classes says which are.

Without split folders a share of each class's videos is held out for validation: those first in the order of a hash of (seed,
path), so a video stays where it is when others are added to its class, but for the ones at the border. A group is held out whole;
clips of one recording that are in no group folder are not kept together: give split folders where that matters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import (
    NEEDED,
    PLACES,
    SUFFIXES,
    archive_advice,
    class_file,
    folders,
    packed_beside,
    read_classes,
    unread,
    videos_below,
)
from vidfuse.data.annotations.source import SPLIT_NAMES, Source, SourceVideo, keys_of, label_of, shown
from vidfuse.data.shards import DataError

USES = frozenset({"holdout", "seed", "classes"})
"""Options that the layout has a use for."""
Paths = dict[str, list[str]]


def detect(folder: Path) -> bool:
    """Whether there are videos in folders."""
    return any("/" in path for path in videos_below(folder))


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the folders' names.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    paths = videos_below(folder)
    tops = sorted({path.partition("/")[0] for path in paths if "/" in path})
    if not tops:
        raise DataError(f"{folder}: no videos ({SUFFIXES}) in folders of classes; {archive_advice(folder) or 'put them there'}")
    level = int(any(_split(top) for top in tops))
    splits = _split_folders(folder, paths) if level else {"train": [path for path in paths if "/" in path]}
    classes = _classes(folder, splits["train"], level, options)
    _check_whole(folder, splits, level)
    used: dict[str, int | float] = {}
    if level:
        if options.holdout is not None:
            raise DataError(f"{folder} has folders of splits; --holdout is for one without")
    else:
        if options.holdout is None:
            raise DataError(
                f"{folder} has folders of classes and none of splits; give --holdout 0.1 to validate on a tenth of each class, or"
                f" put them into train/ and val/{unread(folder)}"
            )
        splits = _held_out(splits["train"], options.holdout, options.seed)
        used = {"holdout": options.holdout, "seed": options.seed}
    numbers = {name: number for number, name in enumerate(classes)}
    keys = keys_of(path for split in splits.values() for path in split)
    videos = {
        split: tuple(_video(folder, path, level, numbers, keys[path]) for path in found) for split, found in splits.items()
    }
    return Source(folder.resolve().name, classes, videos, len(paths) - len(keys), options=used)


def _split(name: str) -> str | None:
    return SPLIT_NAMES.get(name.lower())


def _split_folders(folder: Path, paths: list[str]) -> Paths:
    splits: Paths = {}
    names: dict[str, str] = {}
    flat: dict[str, str] = {}
    for path in paths:
        top, _, rest = path.partition("/")
        split = _split(top) if rest else None
        if split is None:
            continue
        if "/" not in rest and split != "test":
            flat[split] = top
            continue
        if names.setdefault(split, top) != top:
            raise DataError(f"{folder}: {names[split]}/ and {top}/ are both the split {split!r}; keep one")
        splits.setdefault(split, []).append(path)
    unlabelled = [f"{top}/" for split, top in flat.items() if split not in splits]
    if unlabelled:
        raise DataError(
            f"{folder}: videos are directly in {', '.join(unlabelled)}, and no annotations tell their classes: put them into"
            f" folders of classes there, or give a folder that holds {NEEDED}{unread(folder)}"
        )
    if "train" not in splits:
        raise DataError(
            f"{folder}: no training videos: {', '.join(f'{name}/' for name in names.values())} has some, and no train/<class>/;"
            f" {archive_advice(folder) or 'put them there'}"
        )
    return splits


def _held_out(paths: list[str], share: float, seed: int) -> Paths:
    groups: Paths = {}
    for path in paths:
        groups.setdefault(path.partition("/")[0], []).append(path)
    splits: Paths = {"train": [], "validation": []}
    for group in groups.values():
        held = _held(group, share, seed)
        for path in group:
            splits["validation" if _unit(path) in held else "train"].append(path)
    return splits


def _held(paths: list[str], share: float, seed: int) -> set[str]:
    """Which units of a class are held out: until there are enough videos, and never all of them."""
    sizes: dict[str, int] = {}
    for path in paths:
        sizes[_unit(path)] = sizes.get(_unit(path), 0) + 1
    order = sorted(sizes, key=lambda unit: hashlib.sha256(f"{seed}/{unit}".encode()).digest())
    held: set[str] = set()
    missing = max(1, round(share * len(paths)))
    for unit in order[:-1]:
        if missing <= 0:
            break
        held.add(unit)
        missing -= sizes[unit]
    return held


def _unit(path: str) -> str:
    """What is not cut: a video in a class folder, or a group."""
    return "/".join(path.split("/")[:2])


def _video(folder: Path, path: str, level: int, numbers: dict[str, int], key: str) -> SourceVideo:
    parts = path.split("/")
    if len(parts) == level + 1:
        return SourceVideo(key, path, None, "")
    name = parts[level]
    return SourceVideo(key, path, label_of(name, numbers, str(folder / path)), name)


# --- whether the folders are what they are taken for ---


def _classes(folder: Path, train: Sequence[str], level: int, options: LayoutConfig) -> tuple[str, ...]:
    split = [path.split("/") for path in train]
    found = sorted({parts[level] for parts in split})
    place = folder / split[0][0] if level else folder
    names = class_file(folder, options.classes)
    named = read_classes(names) if names else ()
    if set(found) <= set(named):
        return named
    if len(found) < 2:
        deeper = all(len(parts) > level + 2 for parts in split)
        raise DataError(
            f"{place}: the folder of one class alone, {found[0]!r}; at least two classes are needed"
            + (f": videos are a level deeper; {_deeper(place / found[0], level)}" if deeper else "")
            + unread(folder)
        )
    within = sorted({parts[level + 1] for parts in split if len(parts) > level + 2})
    unnumbered = [name for name in within if not any(letter.isdigit() for letter in name)]
    if unnumbered:
        raise DataError(
            f"{place}: which folders are the classes, {shown(found)} or those in them, {shown(unnumbered)}? Give the folder of"
            f" the classes, or a list of them with --classes; groups of a class's videos need a number in their folders' names"
        )
    return named or tuple(found)


def _deeper(inner: Path, level: int) -> str:
    return f"move what is in {inner} up" if level else f"give {inner}"


def _check_whole(folder: Path, splits: Paths, level: int) -> None:
    """Refuse classes without a video and archives that are not unpacked: a set would lack them without a word."""
    paths = [path for found in splits.values() for path in found]
    unreadable = [path for path in paths if not path.isascii() and not _is_text(path)]
    if unreadable:
        raise DataError(f"{folder}: names that are not UTF-8 ({len(unreadable)}): {shown(unreadable)}; rename them")
    places = sorted({path.partition("/")[0] for path in paths}) if level else ["."]
    filled = {"/".join(path.split("/")[: level + 1]) for path in paths}
    there = [f"{place}/{name}" if level else name for place in places for name in folders(folder / place)]
    empty = [name for name in there if name not in filled and name not in PLACES]
    packed = packed_beside(folder, [".", *places] if level else places)
    if empty:
        raise DataError(
            f"{folder}: no video ({SUFFIXES}) is in the class folders {shown(empty)};"
            f" {packed or 'put their videos there, or remove these folders'}{unread(folder)}"
        )
    if packed:
        raise DataError(f"{folder} has folders of classes; {packed}")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
