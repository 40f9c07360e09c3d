"""Files and folders of a data set as distributed: text with the place of its faults, lists of classes, videos, archives."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vidfuse.data.annotations.source import shown
from vidfuse.data.shards import VIDEO_SUFFIXES, DataError

CLASS_FILES = ("classes.txt", "labels.txt", "label_map.txt")
"""Files of class names, besides `label_map_*.txt`."""
PLACES = (".", "annotations", "labels")
"""Where lists are looked for, below a source's folder."""
SUFFIXES = ", ".join(f".{suffix}" for suffix in VIDEO_SUFFIXES)
_DEPTH = 4
"""Folders in folders in which videos are looked for."""
_UNPACK = {
    r".*\.zip": "unzip {name}",
    r".*\.(tar|tar\.\w+|tgz|tbz2?|txz)": "tar -xf {name}",
    r".*\.rar": "unrar x {name}",
    r".*\.7z": "7z x {name}",
    r"(?P<stem>20bn-something-something-v2)-\d\d": "cat {stem}-?? | tar -xz",
}


# --- text ---


def read_text(file: Path) -> str:
    """The text of an annotation file.

    Raises:
        DataError: it cannot be read, or is not UTF-8; the message has line and column.
    """
    try:
        content = file.read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise DataError(
            f"{file}: line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, stripped, with their numbers from 1.

    Raises:
        DataError: what `read_text` raises.
    """
    text = read_text(file)
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: what `read_text` raises, or no JSON; the message has line and column.
    """
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None


def read_classes(file: Path) -> tuple[str, ...]:
    """Class names, one a line in the order of their numbers.

    Raises:
        DataError: what `read_text` raises, fewer than two, or one twice.
    """
    lines: dict[str, int] = {}
    for number, name in read_lines(file):
        if name in lines:
            raise DataError(f"{file}: line {number}: class {name!r} is there twice, first in line {lines[name]}")
        lines[name] = number
    if len(lines) < 2:
        raise DataError(f"{file}: {len(lines)} classes; at least two are needed, one name a line in the order of their numbers")
    return tuple(lines)


def class_file(folder: Path, given: str | None) -> Path | None:
    """The file of class names that was given, or the one that the folder has; `None`: none.

    Raises:
        DataError: the folder has several.
    """
    if given is not None:
        return Path(given)
    files = [file for file in text_files(folder, ".txt") if file.name in CLASS_FILES or file.name.startswith("label_map_")]
    if len(files) > 1:
        raise DataError(f"{folder}: {', '.join(map(str, files))} are all lists of classes; name the right one with --classes")
    return files[0] if files else None


def text_files(folder: Path, *suffixes: str) -> list[Path]:
    """Files with these suffixes in the folder and in the other `PLACES`, sorted; the folder may hold very many videos besides."""
    found = []
    for place in PLACES:
        if (folder / place).is_dir():
            with os.scandir(folder / place) as entries:
                names = sorted(entry.name for entry in entries if entry.name.endswith(suffixes) and entry.is_file())
            found += [folder / place / name for name in names]
    return found


def find(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of some files that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


# --- videos ---


def is_video(name: str) -> bool:
    """Whether a file's name has the suffix of a video."""
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


def videos_below(folder: Path, place: str = ".", depth: int = _DEPTH) -> list[str]:
    """Paths below `folder` of the videos in a place of it and in its folders, sorted.

    Hidden ones are left out, and what is called like a video and is no file: a folder, a link to nothing.
    """
    found: list[str] = []
    prefix = "" if place == "." else f"{place.rstrip('/')}/"
    with os.scandir(folder / place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_video(entry.name) and entry.is_file():
                found.append(f"{prefix}{entry.name}")
            elif depth and entry.is_dir():
                found += videos_below(folder, f"{prefix}{entry.name}", depth - 1)
    return sorted(found)


def by_stem(folder: Path, place: str, videos: Iterable[str]) -> dict[str, str]:
    """Paths of videos by their names without suffix.

    Raises:
        DataError: none at all, or two of one name.
    """
    found: dict[str, str] = {}
    for path in videos:
        stem = path.rpartition("/")[2].rpartition(".")[0]
        if stem in found:
            names = (
                (found[stem], path)
                if Path(found[stem]).parent != Path(path).parent
                else (Path(found[stem]).name, Path(path).name)
            )
            raise DataError(f"{folder / place}: {names[0]} and {names[1]} have the same id; remove one")
        found[stem] = path
    if not found:
        raise DataError(f"{folder / place}: no videos ({SUFFIXES}); {archive_advice(folder) or 'unpack them there'}")
    return found


# --- archives ---


def archive_advice(folder: Path) -> str | None:
    """How to unpack the archives that lie in a folder; `None`: none do."""
    names = sorted(entry.name for entry in os.scandir(folder) if unpack_command(entry.name) and entry.is_file())
    return f"archives are there ({shown(names)}): unpack them first, {unpack_command(names[0])}" if names else None


def unpack_command(name: str) -> str | None:
    """The command that unpacks a file of this name; `None`: it is no archive."""
    for pattern, command in _UNPACK.items():
        if match := re.fullmatch(pattern, name, flags=re.IGNORECASE):
            return command.format(name=name, **match.groupdict())
    return None
