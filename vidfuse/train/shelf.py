"""The checkpoints of a run on its storage: which are whole, which are good, which stay.

    checkpoints.json               `{"last", "best", "scores"}`, for people and for evaluation
    step-00000012-0003-9f2c/       a checkpoint: its step, its number in the order of writing, a token of the try that wrote it
        files.json                 its files with size and sha256; written last, so that a folder without it is half-written
        ...

A name is never used twice, and nothing is moved: object storage cannot. What is whole is told by the folders themselves, not by
checkpoints.json, which a crash can leave one checkpoint behind.

Comes in: a pyarrow file system and the run's folder on it. Goes out: checkpoints that are what was written, or a `Damage` that
names the file, what was expected and what was found.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow.fs as pafs

from vidfuse.train.errors import CheckpointError, Damage, DamageError

CHECKPOINTS, FILES, PREFIX = "checkpoints.json", "files.json", "step-"
UNFINISHED = "nothing: it was not written to its end"
"""What is found of the list of a checkpoint that was not finished."""
RETRY_SECONDS = 120.0
"""How long a file is tried again while the storage does not answer, beyond the file system's own retries."""
PAUSE_SECONDS = 1.0
"""Before the first new try; twice as long before each further one, 15 at most."""
FILES_AT_ONCE = 4
"""Files that are read at the same time."""
_CHUNK = 8 * 1024**2
_HOPELESS = ("ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "UNRECOGNIZED_CLIENT")

log = logging.getLogger(__name__)
T = TypeVar("T")


class Listed(NamedTuple):
    """A file as the list has it."""

    size: int
    sha256: str

    def __str__(self) -> str:
        return f"{self.size} bytes with sha256 {self.sha256[:16]}"


Files = dict[str, Listed]
"""Files of a checkpoint by their path in its folder."""


@dataclass(frozen=True)
class Found:
    """The newest good checkpoint."""

    folder: Path | None
    """Local copy of it (or the checkpoint itself); `None`: there is none, start afresh."""
    name: str | None = None
    damaged: tuple[Damage, ...] = ()
    """Newer ones that could not be used, newest first."""


@dataclass(frozen=True)
class Shelf:
    """A run's folder, as far as checkpoints go."""

    filesystem: Any
    root: str

    def names(self) -> list[str]:
        """All checkpoints, whole or not, in the order of writing. A folder without files, which some storage leaves, is none."""
        infos = self.filesystem.get_file_info(pafs.FileSelector(self.root, recursive=True, allow_not_found=True))
        files = (i.path[len(self.root) + 1 :] for i in infos if i.type == pafs.FileType.File)
        found = {path.split("/")[0] for path in files if path.startswith(PREFIX) and "/" in path}
        return sorted(found, key=lambda name: (number_of(name), name))

    def contents(self, name: str) -> tuple[Files, dict[str, float]]:
        """The files of a checkpoint, and the metrics that it was saved with.

        Raises:
            DamageError: it was not finished, or its list is damaged.
            OSError: the storage cannot be read.
        """
        try:
            text = patiently(lambda: self._read(f"{name}/{FILES}"))
        except FileNotFoundError:
            raise DamageError(name, FILES, expected="the list of its files", found=UNFINISHED) from None
        return _parse(name, text)

    def verify(self, name: str, only: Collection[str] | None = None) -> None:
        """Read a checkpoint where it is (or `only` some of its files) and compare it with its list.

        Raises:
            DamageError: it is not what was written.
            OSError: the storage cannot be read.
        """
        self._read_files(name, None, only)

    def fetch(self, name: str, to: Path, only: Collection[str] | None = None) -> Path:
        """Copy a checkpoint (or `only` some of its files) into a folder, comparing it with its list; where it is now.

        Raises:
            DamageError: it is not what was written.
            OSError: the storage cannot be read, or the folder cannot be written.
        """
        self._read_files(name, to / name, only)
        return to / name

    def store(self, name: str, folder: Path) -> Files:
        """Copy the files of a local folder into a checkpoint; what the list is to say of them.

        Raises:
            OSError: the storage cannot be written.
        """

        def put(path: str) -> Listed:
            return patiently(lambda: self._put(f"{name}/{path}", folder / path))

        return {path: put(path) for path in _paths_in(folder)}

    def listed_in_place(self, name: str) -> Files:
        """What the list is to say of a checkpoint that was written where it stays; its bytes are on the disk then."""
        folder = Path(self.root) / name
        return {path: _listed_on_disk(folder / path) for path in _paths_in(folder)}

    def close(self, name: str, files: Files, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint's list: from now on it is whole.

        Raises:
            OSError: the storage cannot be written, or does not have what it was given.
        """
        there = patiently(lambda: self._sizes(name))
        short = [path for path, listed in files.items() if there.get(path) != listed.size]
        if short:
            raise OSError(f"the storage has {there.get(short[0])} bytes of {short[0]}, {files[short[0]].size} were written")
        body = {"files": {path: list(listed) for path, listed in sorted(files.items())}, "metrics": dict(metrics)}
        content = json.dumps({**body, "sha256": _digest(body)}, indent=1).encode()
        patiently(lambda: self._write(f"{name}/{FILES}", content))

    def record(self) -> dict[str, Any]:
        """`{"last", "best", "scores"}`, empty for a fresh run; made anew from the checkpoints if it is damaged."""
        try:
            record: dict[str, Any] = json.loads(patiently(lambda: self._read(CHECKPOINTS)))
            if {"last", "best", "scores"} <= set(record):
                return record
        except FileNotFoundError:
            return {"last": None, "best": None, "scores": {}}
        except (ValueError, TypeError):
            pass
        log.warning("%s is damaged; it is made anew from the checkpoints", CHECKPOINTS)
        return self._rebuilt()

    def note(self, name: str, metrics: Mapping[str, float], *, keep: int, bad: Collection[str] = ()) -> None:
        """Write into checkpoints.json that a whole checkpoint is the newest, then remove those that need not stay.

        Args:
            name: of the checkpoint.
            metrics: `top1` if it was validated.
            keep: how many of the newest stay, besides the best.
            bad: damaged ones; they count for nothing and go.
        """
        record = self.record()
        scores = {n: score for n, score in record["scores"].items() if n not in bad}
        record = noted({**record, "scores": scores}, name, metrics)
        patiently(lambda: self._write(CHECKPOINTS, json.dumps(record, indent=1).encode()))
        older = [n for n in self.names() if number_of(n) <= number_of(name)]
        whole = [n for n in older if n not in bad and self._is_whole(n)]
        stay = {*whole[-keep:], name, record["best"]}
        for old in older:
            if old not in stay:
                self.remove(old)

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its list first: killed in between, it is one that was not finished."""
        for delete, path in (
            (self.filesystem.delete_file, f"{self.root}/{name}/{FILES}"),
            (self.filesystem.delete_dir, f"{self.root}/{name}"),
        ):
            try:
                delete(path)
            except FileNotFoundError:
                pass
            except OSError as error:  # it goes with the next one
                log.warning("checkpoint %s, which is no longer needed, could not be removed: %s", name, error)
                return

    # How.

    def _read_files(self, name: str, to: Path | None, only: Collection[str] | None) -> None:
        files, _ = self.contents(name)
        lacking = sorted(set(only or ()) - set(files))
        if lacking:
            raise DamageError(name, lacking[0], expected="a file of the checkpoint", found="none in its list")
        wanted = {path: listed for path, listed in files.items() if only is None or path in only}
        with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
            list(pool.map(lambda path: self._get(name, path, wanted[path], to), wanted))

    def _get(self, name: str, path: str, listed: Listed, to: Path | None) -> None:
        try:
            found = patiently(lambda: self._copy(f"{name}/{path}", to / path if to is not None else None))
        except FileNotFoundError:
            raise DamageError(name, path, expected=listed, found="no such file") from None
        if found != listed:
            raise DamageError(name, path, expected=listed, found=found)

    def _copy(self, path: str, to: Path | None) -> Listed:
        with self.filesystem.open_input_stream(f"{self.root}/{path}") as source:
            if to is None:
                return _through(source, None)
            to.parent.mkdir(parents=True, exist_ok=True)
            with open(to, "wb") as sink:
                return _through(source, sink)

    def _put(self, path: str, source: Path) -> Listed:
        target = f"{self.root}/{path}"
        local = isinstance(self.filesystem, pafs.LocalFileSystem)
        if local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as content, self.filesystem.open_output_stream(target) as sink:
            listed = _through(content, sink)
        if local:
            _sync(Path(target))
        return listed

    def _read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(f"{self.root}/{path}") as file:
            return bytes(file.read())

    def _write(self, path: str, content: bytes) -> None:
        """Whole or not at all: object storage does so by itself, on a disk the file is moved into its place."""
        target = f"{self.root}/{path}"
        if not isinstance(self.filesystem, pafs.LocalFileSystem):
            with self.filesystem.open_output_stream(target) as file:
                file.write(content)
            return
        partial = Path(target).with_name(f".{Path(target).name}.part")
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        _sync(partial)
        partial.replace(target)

    def _sizes(self, name: str) -> dict[str, int]:
        folder = f"{self.root}/{name}"
        infos = self.filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
        return {i.path[len(folder) + 1 :]: i.size for i in infos if i.type == pafs.FileType.File}

    def _is_whole(self, name: str) -> bool:
        return bool(self.filesystem.get_file_info(f"{self.root}/{name}/{FILES}").type == pafs.FileType.File)

    def _rebuilt(self) -> dict[str, Any]:
        record: dict[str, Any] = {"last": None, "best": None, "scores": {}}
        for name in self.names():
            try:
                record = noted(record, name, self.contents(name)[1])
            except DamageError:
                continue
        return record


def newest_good(
    names: Sequence[str], attempt: Callable[[str], Damage | None], *, ever_whole: bool
) -> tuple[str | None, tuple[Damage, ...]]:
    """The first checkpoint that can be used; the rule of training (all ranks follow it together) and of evaluation.

    Args:
        names: of checkpoints, the wanted one first.
        attempt: try one; tells why it cannot be used.
        ever_whole: whether the run is known to have had a whole checkpoint.

    Returns:
        Its name (`None`: the run never finished one, so it starts afresh), and what was passed over.

    Raises:
        CheckpointError: there are checkpoints, and none of them is good.
    """
    damaged: list[Damage] = []
    for name in names:
        damage = attempt(name)
        if damage is None:
            return name, tuple(damaged)
        damaged.append(damage)
    if ever_whole or any(damage.found != UNFINISHED for damage in damaged):
        said = "; ".join(map(str, damaged)) or f"{CHECKPOINTS} names some, but there are none"
        raise CheckpointError(
            f"no checkpoint of the run is good: {said}. Bring one back from a backup, or give another --set run.name=... to start "
            "afresh"
        )
    return None, tuple(damaged)


def noted(record: Mapping[str, Any], name: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The record of checkpoints after one more: the last is `name`; the best has the highest validation top-1."""
    scores = dict(record["scores"])
    if "top1" in metrics:
        scores[name] = metrics["top1"]
    best = max(scores, key=lambda n: (scores[n], list(scores).index(n)), default=None)  # of equals the later
    return {**record, "last": name, "best": best, "scores": scores}


def number_of(name: str) -> int:
    """A checkpoint's number in the order of writing; -1 if the name has none."""
    parts = name.split("-")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdigit() else -1


def step_of(name: str) -> int:
    """A checkpoint's step."""
    return int(name.split("-")[1])


def patiently(action: Callable[[], T]) -> T:
    """Do something with the storage, again and again while it does not answer, for `RETRY_SECONDS` at most.

    Raises:
        OSError: it did not answer in time, or refused.
    """
    end, pause = time.monotonic() + RETRY_SECONDS, PAUSE_SECONDS
    while True:
        try:
            return action()
        except OSError as error:
            # A local disk's fault has a number, and asking again does not mend it.
            hopeless = error.errno is not None or any(word in str(error) for word in _HOPELESS)
            if hopeless or time.monotonic() + pause > end:
                raise
            log.warning("the storage does not answer, trying again in %.0f s: %s", pause, str(error).splitlines()[0])
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def _parse(name: str, text: bytes) -> tuple[Files, dict[str, float]]:
    try:
        tree = json.loads(text)
        told = tree.pop("sha256")
        found = _digest(tree)
        files = {path: Listed(int(size), str(sha256)) for path, (size, sha256) in tree["files"].items()}
        metrics = {key: float(value) for key, value in tree["metrics"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamageError(name, FILES, expected="a list of files", found=f"{type(error).__name__}: {error}") from None
    if told != found:
        raise DamageError(name, FILES, expected=f"content with sha256 {told[:16]}", found=f"sha256 {found[:16]}")
    return files, metrics


def _digest(tree: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _paths_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != FILES)


def _through(source: Any, sink: Any) -> Listed:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
        if sink is not None:
            sink.write(chunk)
    return Listed(size, digest.hexdigest())


def _listed_on_disk(path: Path) -> Listed:
    _sync(path)
    with open(path, "rb") as file:
        return _through(file, None)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def merged(parts: Iterable[Files]) -> Files:
    """The files of all ranks.

    Raises:
        OSError: two ranks wrote different content under the same path.
    """
    files: Files = {}
    for part in parts:
        for path, listed in part.items():
            if files.setdefault(path, listed) != listed:
                raise OSError(f"two workers wrote {path}, and not the same")
    return files
