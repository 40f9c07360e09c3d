"""Something-Something-V2 (Goyal et al. 2017, arXiv:1706.04261), as it is distributed.

`labels/{labels,train,validation,test}.json`, the same files in the folder itself, or `something-something-v2-*.json` of older
releases; videos `<id>.webm` beside them or in `20bn-something-something-v2/`. Templates have [brackets], those of `labels.json`
none. The test split is unlabelled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vidfuse.config import LayoutConfig
from vidfuse.data.annotations.files import by_stem, find, read_entries, read_json, videos_below
from vidfuse.data.annotations.source import Listed, Source, SourceVideo, label_of, leave_out
from vidfuse.data.shards import DataError, Quarantined

USES = frozenset({"allow_missing"})
"""Options that the layout has a use for."""
_ANNOTATIONS = ("labels/{}.json", "{}.json", "something-something-v2-{}.json", "labels/something-something-v2-{}.json")
_VIDEOS = ("20bn-something-something-v2", "videos", ".")


def detect(folder: Path) -> bool:
    """Whether the folder has this layout's list of classes."""
    return _file(folder, "labels") is not None


def read(folder: Path, options: LayoutConfig) -> Source:
    """Read the annotations.

    Raises:
        DataError: see `data.layouts.read_layout`.
    """
    labels_file = _file(folder, "labels")
    if labels_file is None:
        raise DataError(f"{folder}: no {_ANNOTATIONS[0].format('labels')}; unpack the labels of Something-Something-V2 there")
    classes = _classes(labels_file)
    place = next(place for place in _VIDEOS if (folder / place).is_dir())
    videos = by_stem(folder, place, videos_below(folder, place, depth=0))
    numbers = {name: number for number, name in enumerate(classes)}
    splits: dict[str, tuple[SourceVideo, ...]] = {}
    absent: tuple[Quarantined, ...] = ()
    for split in ("train", "validation", "test"):
        file = _file(folder, split)
        if file is None:
            continue
        entries = _entries(file)
        missing = [(key, key) for _, entry in entries if (key := str(entry["id"])) not in videos]
        absent += leave_out(file, split, missing, listed=len(entries), share=options.allow_missing)
        name = str(file)
        splits[split] = tuple(
            _video(Listed(name, line), split, entry, numbers, videos[str(entry["id"])])
            for line, entry in entries
            if str(entry["id"]) in videos
        )
    if "train" not in splits:
        raise DataError(f"{folder}: no train.json beside {labels_file.name}; unpack all annotations")
    unlisted = len(videos) - len({v.key for s in splits.values() for v in s})
    return Source("something-something-v2", classes, splits, unlisted, absent)


def _file(folder: Path, name: str) -> Path | None:
    return find(folder, (place.format(name) for place in _ANNOTATIONS))


def _classes(file: Path) -> tuple[str, ...]:
    content = read_json(file)
    try:
        numbered = {int(number): _plain(name) for name, number in content.items()}
    except (AttributeError, TypeError, ValueError):
        raise DataError(f'{file}: an object {{"class": "number", ...}} is needed; give the file as it is distributed') from None
    if len(numbered) != len(content) or sorted(numbered) != list(range(len(content))) or len(content) < 2:
        raise DataError(f"{file}: the classes' numbers are 0 to {len(content) - 1}, each once, and at least two; correct them")
    return tuple(numbered[number] for number in range(len(content)))


def _entries(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """With their lines."""
    entries = list(read_entries(file))
    for line, entry in entries:
        if not isinstance(entry, dict) or "id" not in entry:
            raise DataError(f'{Listed(str(file), line)}: an object with "id" is needed; give the file as it is distributed')
    return entries


def _video(listed: Listed, split: str, entry: dict[str, Any], numbers: dict[str, int], path: str) -> SourceVideo:
    key, template = str(entry["id"]), entry.get("template")
    if template is None:
        if split != "test":
            raise DataError(f'{listed}: video {key} has no "template"; add it: only the test split is without labels')
        return SourceVideo(key, path, None, "", listed=listed)
    name = _plain(str(template))
    return SourceVideo(
        key,
        path,
        label_of(name, numbers, f"{listed}: video {key}"),
        name if (sentence := entry.get("label")) is None else str(sentence),
        _placeholders(entry.get("placeholders"), f"{listed}: video {key}"),
        listed,
    )


def _placeholders(names: Any, where: str) -> tuple[str, ...]:
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f'{where}: "placeholders" is {names!r}; a list of what the sentence names is needed, or no such entry')
    return tuple(names)


def _plain(template: str) -> str:
    return template.replace("[", "").replace("]", "")
