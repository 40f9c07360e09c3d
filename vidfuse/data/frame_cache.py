"""Decoded clips on a machine's local disk, shared by its reading processes.

    <folder>/clips/<2 hex>/<62 hex>.clip    a header (the key, CRC-32 of the pixels) and the pixels
    <folder>/clips/<2 hex>/*.part           one that is being written
    <folder>/clips/bytes                    what is held, as a number; who writes it locks it

Comes in: the key of a clip, which names its pixels whatever they are wanted for (`key_of`). Goes out: the clip, if it is there and
whole. An entry appears by renaming. When there is no room, within the bound or on the disk, the least recently used entries go, a tenth at
once.
Whatever fails costs the entry and a warning, never the reading. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vidfuse.data.opencv import cv2
from vidfuse.data.transforms import Box

FORMAT = 3
"""Part of each key: raised when a version of vidfuse makes other pixels. Entries of former ones are used no more, and go first."""
FREE_SHARE = 0.06
"""Of the disk that is left to others: Ray (2.60) writes nothing more to one that is 95 % full, and a training on it may stop."""
LOCK_SECONDS = 5.0
"""How long the lock is waited for. Then the clip is not kept."""
STALE_SECONDS = 3600.0
"""Age from which an entry that is being written was left by a process that died."""
_KEY_BYTES, _CHECK_BYTES, _NUMBER_BYTES = 32, 4, 20

log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()

Clip = npt.NDArray[np.uint8]
"""[T, H, W, 3], without gaps."""


def key_of(sha256: bytes, numbers: npt.NDArray[np.int64], box: Box, size: int, decoder: str) -> bytes:
    """Name of a clip, 32 bytes.

    Args:
        sha256: Of the encoded video.
        numbers: [T] of its frames.
        box: Part of a frame that is shown.
        size: Height and width that it is resized to.
        decoder: One of `decode.DECODERS`; its version counts, as does that of OpenCV.
    """
    what = [FORMAT, sha256.hex(), [int(n) for n in numbers], astuple(box), size, decoder, *versions(decoder).values()]
    return hashlib.sha256(json.dumps(what).encode()).digest()


@lru_cache(maxsize=8)
def versions(decoder: str) -> Mapping[str, str]:
    """Of what makes the pixels of a clip here, by name: the decoder, then OpenCV."""
    try:
        version = metadata.version({"pyav": "av"}.get(decoder, decoder))
    except metadata.PackageNotFoundError:
        version = ""
    return {decoder: version, "OpenCV": cv2.__version__}


@dataclass(frozen=True)
class FrameCache:
    """The cache in a folder."""

    folder: str
    most_bytes: int
    """Bound of all entries together, those that are being written included."""

    @property
    def root(self) -> Path:
        """The folder of the entries."""
        return Path(self.folder, "clips")

    def path(self, key: bytes) -> Path:
        """Where the entry of a key is."""
        name = key.hex()
        return self.root / name[:2] / f"{name[2:]}.clip"

    def load(self, key: bytes, clip: Clip) -> bool:
        """Fill `clip` [T, H, W, 3]; `False`: there is no whole entry, and what `clip` holds means nothing."""
        path = self.path(key)
        try:
            with path.open("rb") as file:
                header, pixels = file.read(_KEY_BYTES + _CHECK_BYTES), clip.data.cast("B")
                whole = file.readinto(pixels) == clip.nbytes and not file.read(1)
            if not whole or header != _header(key, clip):
                self._warn("damaged", f"{path} is damaged")
                path.unlink(missing_ok=True)
                return False
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn("load", f"{path} cannot be read: {error.strerror}")
            return False
        with contextlib.suppress(OSError):
            os.utime(path)  # times of access are seldom kept by the file system
        return True

    def store(self, key: bytes, clip: Clip) -> None:
        """Keep a clip [T, H, W, 3], if that can be done."""
        path, size = self.path(key), _KEY_BYTES + _CHECK_BYTES + clip.nbytes
        part = path.with_suffix(f".{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._reserve(part, size)
            with part.open("r+b") as file:
                file.write(_header(key, clip))
                file.write(clip.data.cast("B"))
            with _locked(self.root / "bytes"):  # who counts the entries would miss one that changes its name
                part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            self._warn("store", f"a clip cannot be kept in {self.folder}: {error.strerror or error}")

    def _reserve(self, part: Path, size: int) -> None:
        """Count an entry that will be written, after room was made for it; it is there at its size, for others that count.

        Raises:
            OSError: there is none.
        """
        with _locked(self.root / "bytes") as file:
            known = os.pread(file, _NUMBER_BYTES, 0)
            held = int(known) if known.isdigit() else self._shrunk(self.most_bytes)
            disk = shutil.disk_usage(self.root)
            room = disk.free - int(FREE_SHARE * disk.total)
            if size > min(room, self.most_bytes - held):
                held = self._shrunk(
                    self.most_bytes
                )  # the count is never too small, and too large after replacements and crashes
                bound = min(self.most_bytes, held + room)
                held = self._shrunk(min(bound * 9 // 10, bound - size)) if held + size > bound else held
                if held + size > bound:
                    given = f"data.frame_cache_bytes={self.most_bytes:,} with {FREE_SHARE:.0%} of the disk left free"
                    raise OSError(errno.ENOSPC, f"{size:,} bytes do not fit into {given}")
            with part.open("xb") as entry:
                entry.truncate(size)
            os.pwrite(file, b"%020d" % (held + size), 0)

    def _shrunk(self, bound: int) -> int:
        """Bytes that are left after the least recently used entries beyond the bound have gone."""
        entries, oldest = [], time.time() - STALE_SECONDS
        for folder in self.root.iterdir():
            for path in folder.iterdir() if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):
                    facts = path.stat()
                    alive = path.suffix == ".clip" or facts.st_mtime > oldest
                    entries.append((alive, facts.st_mtime_ns, facts.st_size, path))
        held = sum(size for _, _, size, _ in entries)
        for alive, _, size, path in sorted(entries):  # those of processes that died come first
            if not alive or (held > bound and path.suffix == ".clip"):
                with contextlib.suppress(OSError):
                    path.unlink()
                    held -= size
        return held

    def _warn(self, kind: str, words: str) -> None:
        """Once a process: what fails once fails for every clip."""
        if (self.folder, kind) not in _warned:
            _warned.add((self.folder, kind))
            log.warning("data.frame_cache: %s; such clips are decoded (this is said once)", words)


def _header(key: bytes, clip: Clip) -> bytes:
    return key + zlib.crc32(clip.data.cast("B")).to_bytes(_CHECK_BYTES)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """A descriptor of a file that no other process or thread has locked.

    Raises:
        OSError: it cannot be opened, or stays locked.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        end = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.005)
        yield file
    finally:
        os.close(file)  # and with it the lock goes
