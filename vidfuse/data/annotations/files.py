"""Files and folders of a data set as distributed: text with the place of its faults, lists of classes, videos, archives."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vidfuse.data.annotations.source import shown
from vidfuse.data.shards import VIDEO_SUFFIXES, DataError

CLASS_FILES = ("classes.txt", "labels.txt", "label_map.txt")
"""Files of class names, besides `label_map_*.txt`."""
PLACES = (".", "annotations", "labels", "lists")
"""Where lists are looked for, below a source's folder."""
NEEDED = (
    "labels/labels.json (Something-Something-V2), classInd.txt (UCF101), <class>_test_split1.txt"
    " (HMDB51), a CSV with youtube_id (Kinetics), train*.txt or"
    " train*.csv (lists; there, in annotations/, labels/ or lists/)"
)
"""What annotations are called."""
SUFFIXES = ", ".join(f".{suffix}" for suffix in VIDEO_SUFFIXES)
_OF_CLASS = re.compile(r"(?P<name>.+)_test_split(?P<number>\d)\.txt")
_BEYOND_SPACE = re.compile(r"[^ \t\n\r]")
_DEPTH = 4
"""Folders in folders in which videos are looked for."""
_ARCHIVE_DEPTH = 2
_UNPACK = {
    r"(?P<stem>.*)\.zip": "unzip {name}",
    r"(?P<stem>.*)\.(tar|tar\.\w+|tgz|tbz2?|txz)": "tar -xf {name}",
    r"(?P<stem>.*)\.rar": "unrar x {name}",
    r"(?P<stem>.*)\.7z": "7z x {name}",
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
        raise _unreadable(file, error) from None
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise DataError(
            f"{file}: line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read: {error.strerror or error}; give the account that packs the right to read it")


def _listing(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _unreadable(folder, error) from None


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, stripped, with their numbers from 1.

    Raises:
        DataError: what `read_text` raises.
    """
    text = read_text(file)
    return ((number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip())


def csv_header(file: Path) -> list[str]:
    """Names of a CSV's columns, in lower case, as far as its first line has some.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(file, "rb") as content:
            line = content.readline(4096).decode("utf-8-sig", "replace")
    except OSError as error:
        raise _unreadable(file, error) from None
    return [name.strip().lower() for name in next(csv.reader(line.splitlines()[:1]), [])]


def csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows of a CSV, each of one line, with the numbers of the lines from 1; the header is the first.

    Raises:
        DataError: what `read_text` raises, or quotes that are not in order; the message has line and column.
    """
    for number, line in read_lines(file):
        try:
            yield number, [value.strip() for value in next(csv.reader([line], strict=True))]
        except csv.Error as error:
            column = _open_quote(line)
            where = f"{file}: line {number}" + (f", column {column}" if column else "")
            raise DataError(f"{where}: {'a quote is opened and not closed' if column else error}; correct the line") from None


def _open_quote(line: str) -> int:
    """Column of the quote that a line does not close; 0: it closes all."""
    quotes = [column for column, letter in enumerate(line, start=1) if letter == '"']
    return quotes[-1] if len(quotes) % 2 else 0


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: what `read_text` raises, no JSON (the message has line and column), or JSON that Python does not read.
    """
    text = read_text(file)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}; correct it there, or unpack the file anew"
        ) from None
    except RecursionError:
        raise DataError(f"{file}: JSON nested too deep to be annotations; give the file as it is distributed") from None
    except ValueError:
        raise DataError(f"{file}: a number of thousands of digits; give the file as it is distributed") from None


def read_entries(file: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a JSON file that is a list, with the numbers from 1 of the lines where they begin.

    Raises:
        DataError: what `read_json` raises, or JSON that is no list.
    """
    if not isinstance(read_json(file), list):
        raise DataError(f"{file}: a JSON list is needed, [entry, ...]; give the file as it is distributed")
    return _entries(read_text(file))


def _entries(text: str) -> Iterator[tuple[int, Any]]:
    """Of a list that is whole."""
    decoder, line, seen = json.JSONDecoder(), 1, 0
    start = _next(text, text.index("[") + 1)
    while text[start] != "]":
        entry, end = decoder.raw_decode(text, start)
        line, seen = line + text.count("\n", seen, start), start
        yield line, entry
        start = _next(text, end)
        start = _next(text, start + 1) if text[start] == "," else start


def _next(text: str, start: int) -> int:
    """Where the next character is that is no white space."""
    match = _BEYOND_SPACE.search(text, start)
    assert match is not None  # the list's end, at the latest
    return match.start()


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
    files = [file for file in text_files(folder, ".txt") if _names(file.name)]
    if len(files) > 1:
        raise DataError(f"{folder}: {', '.join(map(str, files))} are all lists of classes; name the right one with --classes")
    return files[0] if files else None


def lists_of_classes(folder: Path) -> dict[int, dict[str, Path]]:
    """The lists `<class>_test_split<N>.txt` of HMDB51 by N and class; one of a number alone is a list of another kind."""
    found: dict[int, dict[str, Path]] = {}
    for file in text_files(folder, ".txt", places=(*PLACES, "testTrainMulti_7030_splits")):
        if match := _OF_CLASS.fullmatch(file.name):
            found.setdefault(int(match["number"]), {})[match["name"]] = file
    return {number: files for number, files in found.items() if len(files) > 1}


def text_files(folder: Path, *suffixes: str, places: Iterable[str] = PLACES) -> list[Path]:
    """Files with these suffixes in some places of the folder, sorted; hidden ones (`._train.txt`) are left out.

    The folder may hold very many videos besides.
    """
    found = []
    for place in places:
        if (folder / place).is_dir():
            names = sorted(
                entry.name for entry in _listing(folder / place) if entry.name.endswith(suffixes) and entry.is_file()
            )
            found += [folder / place / name for name in names if not name.startswith(".")]
    return found


def unread(folder: Path) -> str:
    """Words on the files of a folder that may be annotations and were not taken for any; empty: there are none."""
    files = [
        path for path in files_below(folder, lambda name: name.lower().endswith((".csv", ".txt", ".json"))) if not _names(path)
    ]
    return f"; these were not taken for annotations: {shown(files)}" if files else ""


def _names(path: str) -> bool:
    """Whether a file is called like a list of classes."""
    name = path.rpartition("/")[2]
    return name in CLASS_FILES or (name.startswith("label_map_") and name.endswith(".txt"))


def find(folder: Path, names: Iterable[str]) -> Path | None:
    """The first of some files that is there."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


# --- videos ---


def is_video(name: str) -> bool:
    """Whether a file's name has the suffix of a video."""
    return name.rpartition(".")[2].lower() in VIDEO_SUFFIXES


def videos_below(folder: Path, place: str = ".", depth: int = _DEPTH) -> list[str]:
    """Paths below `folder` of the videos in a place of it and in its folders, sorted (see `files_below`)."""
    return files_below(folder, is_video, place, depth)


def files_below(folder: Path, wanted: Callable[[str], bool], place: str = ".", depth: int = _DEPTH) -> list[str]:
    """Paths below `folder` of the files of wanted names in a place of it and in its folders, sorted.

    Hidden ones are left out, and what is called like a file and is none: a folder, a link to nothing.
    """
    found: list[str] = []
    prefix = "" if place == "." else f"{place.rstrip('/')}/"
    for entry in _listing(folder / place):
        if entry.name.startswith("."):
            continue
        if wanted(entry.name) and entry.is_file():
            found.append(f"{prefix}{entry.name}")
        elif depth and entry.is_dir():
            found += files_below(folder, wanted, f"{prefix}{entry.name}", depth - 1)
    return sorted(found)


def folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    return sorted(entry.name for entry in _listing(folder) if not entry.name.startswith(".") and entry.is_dir())


def videos_of_classes(folder: Path, places: Iterable[str], classes: Sequence[str], named: str) -> tuple[str, list[str]]:
    """Videos directly in class folders, in the first of some places that is there.

    Args:
        folder: The source's folder.
        places: Where the class folders may be.
        classes: Names of the class folders.
        named: What tells them.

    Returns:
        What begins the paths (`videos/`, or nothing), and the paths.

    Raises:
        DataError: none at all.
    """
    place = next(place for place in places if (folder / place).is_dir())
    prefix = "" if place == "." else f"{place}/"
    there = [name for name in classes if (folder / place / name).is_dir()]
    videos = [path for name in there for path in videos_below(folder, f"{prefix}{name}", depth=0)]
    if not videos:
        advice = archive_advice(folder) or "unpack them there"
        raise DataError(f"{folder / place}: no class folder of {named} is here with a video in it ({SUFFIXES}); {advice}")
    return prefix, videos


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
    """How to unpack the archives that lie in a folder and in its folders; `None`: none do."""
    paths = files_below(folder, _is_archive, depth=_ARCHIVE_DEPTH)
    return _advice("archives are there", paths) if paths else None


def packed_beside(folder: Path, places: Iterable[str]) -> str | None:
    """How to unpack the archives in some places that are not unpacked beside themselves; `None`: there are none."""
    paths = [path for place in places for path in files_below(folder, _is_archive, place, depth=0)]
    packed = [path for path in paths if not (folder / path).with_name(_stem(path)).is_dir()]
    return f"{_advice('archives lie beside them', packed)}, or move them away if that is done" if packed else None


def unpack_command(name: str) -> str | None:
    """The command that unpacks a file of this name; `None`: it is no archive."""
    match, command = _unpacking(name)
    return command.format(name=name, **match.groupdict()) if match else None


def _advice(what: str, paths: list[str]) -> str:
    place, _, name = paths[0].rpartition("/")
    return f"{what} ({shown(paths)}): unpack them first, {f'cd {place}; ' if place else ''}{unpack_command(name)}"


def _is_archive(name: str) -> bool:
    return _unpacking(name)[0] is not None


def _stem(path: str) -> str:
    match, _ = _unpacking(path.rpartition("/")[2])
    return match["stem"] if match else ""


def _unpacking(name: str) -> tuple[re.Match[str] | None, str]:
    found = ((re.fullmatch(pattern, name, flags=re.IGNORECASE), command) for pattern, command in _UNPACK.items())
    return next((pair for pair in found if pair[0]), (None, ""))
