"""Weights on storage to weights on this machine: verified, whole or not at all, fetched once a machine.

Comes in: a source as a config has it (`model.motion.weights`, `model.weights`). Goes out: the same, if this machine can read it
itself; of an `s3://` object a local copy in a folder named by its content, below `TORCH_HOME`:

    blobs/<sha256>/<name>    the file
    seen/<hash>              sha256 of an object as it was: of its URL, size and time of change

An object that was replaced is fetched anew; one whose sha256 is stated is looked for by it, without asking the storage.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from vidfuse.models.hubs import cache_folder, locked, sha256_of
from vidfuse.models.weights import split
from vidfuse.on_ray.storage import StorageError, check_storage, open_storage

_COPY_BYTES = 8 * 1024**2


def local(source: str) -> str:
    """A weights source as this machine can read it.

    Args:
        source: `pretrained`, a path, a published file's name, or an `s3://` URL; each may end in `#sha256=HEX`.

    Returns:
        The source; of an `s3://` URL, `PATH#sha256=HEX` of the local copy.

    Raises:
        StorageError: the object is not there, cannot be read, or has another hash than is stated.
    """
    if not source.startswith("s3://"):
        return source
    url, stated = split(source)
    found = _blob(stated, url) if stated else None
    if found is None or not found.is_file():
        found = _fetched(url, stated)
    return f"{found}#sha256={found.parent.name}"


def _fetched(url: str, stated: str | None) -> Path:
    check_storage(url.rpartition("/")[0])  # answers within seconds and in words where pyarrow would try for minutes
    filesystem, path = open_storage(url)
    info = filesystem.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise StorageError(f"{url}: there is no such object; give the URL of a weights file")
    seen = cache_folder() / "seen" / hashlib.sha256(f"{url} {info.size} {info.mtime_ns}".encode()).hexdigest()[:32]
    with locked(seen):
        known = seen.read_text() if seen.is_file() else None
        if known and _blob(known, url).is_file() and stated in (None, known):
            return _blob(known, url)
        return _download(filesystem, path, url, info.size, stated, seen)


def _download(filesystem: Any, path: str, url: str, size: int, stated: str | None, seen: Path) -> Path:
    part = seen.with_name(f"{seen.name}.{uuid.uuid4().hex}.part")
    try:
        with filesystem.open_input_stream(path) as content, part.open("xb") as file:
            shutil.copyfileobj(content, file, _COPY_BYTES)
        if part.stat().st_size != size:
            raise StorageError(
                f"{url}: {part.stat().st_size:,} bytes came of {size:,}; it was replaced meanwhile, or the connection ended"
            )
        digest = sha256_of(part)
        if stated not in (None, digest):
            raise StorageError(f"{url}: the object has sha256 {digest}, stated is {stated}; it is another file or damaged")
        blob = _blob(digest, url)
        blob.parent.mkdir(parents=True, exist_ok=True)
        part.replace(blob)
        seen.write_text(digest)
        return blob
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{url}: cannot be copied to {seen.parent}: {error.strerror or type(error).__name__}") from error
    finally:
        part.unlink(missing_ok=True)


def _blob(digest: str, url: str) -> Path:
    return cache_folder() / "blobs" / digest / url.rpartition("/")[2]
