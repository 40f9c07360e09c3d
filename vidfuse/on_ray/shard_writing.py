"""One shard of a packed set, written by a Ray task.

Comes in: the shard's plan, the folder of the videos, the place of the set. Goes out: the tar and then its record, on the place. A
task holds one video in memory and one shard on its disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidfuse.config import TranscodeConfig
from vidfuse.data import shards, tars, transcode
from vidfuse.data.annotations.source import SourceVideo
from vidfuse.data.planning import PlannedVideo, ShardPlan
from vidfuse.data.shards import DataError, Quarantined, SampleMeta, ShardRecord
from vidfuse.data.video import DecodeError, VideoInfo
from vidfuse.on_ray import storage
from vidfuse.on_ray.checking import READ_BYTES, Hashed
from vidfuse.on_ray.tasks import Noting

SCRATCH = "vidfuse-packing-"
"""How names of scratch folders begin."""
ROOM = " or raise the quota"
"""What helps where a set's place is full."""


_UNREADABLE = "the file cannot be read"
"""How reasons begin that may be gone when packing continues."""
_OF_THE_FILE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENOENT, errno.EIO, errno.ENXIO, errno.EBADMSG)
)
"""Errors that concern one file; others (a server that does not answer, no memory) may pass, or concern them all."""


class UnreadableError(ValueError):
    """A file that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class ShardJob:
    """What all shards of a set have in common."""

    place: str
    """URL or absolute folder of the set."""
    folder: str
    """Of the videos."""
    digest: str
    """Of the plan."""
    form: TranscodeConfig | None
    """What videos are brought into."""
    board: Any = None
    """Handle of a `tasks.Board`."""


def complete_shard(job: ShardJob, plan: ShardPlan, there: ShardRecord | None, sha256: str | None) -> tuple[ShardRecord, bool]:
    """Keep a shard that is what its record says and of which all files could be read, and write any other.

    Args:
        job: Of the set.
        plan: Of the shard.
        there: Its record from an interrupted run; `None`: there is none.
        sha256: As for `write_shard`.

    Returns:
        Its record, and whether it was kept.

    Raises:
        DataError, StorageError, OSError: as `write_shard`.
    """
    _remove_scratch()
    if there and _is_whole(job, there):
        return there, True
    return write_shard(job, plan, sha256), False


def _is_whole(job: ShardJob, record: ShardRecord) -> bool:
    if any(video.reason.startswith(_UNREADABLE) for video in record.quarantined):
        return False
    if not record.samples:
        return True
    fs, root = storage.open_storage(job.place)
    try:
        stream = fs.open_input_stream(storage.join(root, record.name), buffer_size=READ_BYTES)
    except FileNotFoundError:
        return False
    with contextlib.closing(stream):
        hashed = Hashed(stream)
        hashed.drain()
    return hashed.hash.hexdigest() == record.sha256


def write_shard(job: ShardJob, plan: ShardPlan, sha256: str | None = None) -> ShardRecord:
    """Write a shard and then its record.

    Args:
        job: Of the set.
        plan: Of the shard.
        sha256: What the shard has to be, or nothing is written; `""`: none of its videos is to decode; `None`: anything.

    Raises:
        DataError: the source folder is not there, or videos have changed.
        StorageError: there is no room left.
        OSError: they, or the place, cannot be read or written.
    """
    fs, root = storage.open_storage(job.place, write=True)
    quarantined: list[Quarantined] = []
    with _scratch() as scratch:
        tar = scratch / plan.name
        here = f"the scratch folder {scratch.parent} of {socket.gethostname()}"
        with storage.told_when_full(here, " (or set TMPDIR)"):
            rows, digest = _write_tar(tar, _samples(job, plan, quarantined))
        if sha256 is not None and sha256 != (digest if rows else ""):
            raise DataError(
                f"{job.place}: {plan.name} would not be the one that the manifest names (its sha256 differs), and was not written:"
                f" its videos, or the versions of PyAV and vidfuse, are not those that it was packed with; bring them back, or"
                f" pack to another URL"
            )
        record = ShardRecord(
            name=plan.name,
            plan=job.digest,
            bytes=tar.stat().st_size if rows else 0,
            sha256=digest if rows else "",
            samples=rows,
            quarantined=tuple(quarantined),
        )
        with storage.told_when_full(job.place, ROOM):
            if rows:
                storage.upload(fs, storage.join(root, plan.name), str(tar))
            storage.write_bytes(fs, storage.join(root, shards.record_name(plan.name)), shards.dump_record(record))
    return record


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on this machine's disk, locked while it is used."""
    with contextlib.ExitStack() as held:
        folder = _locked_folder(held)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_scratch() -> None:
    """Remove the folders of processes that were killed: nobody holds their locks."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError), storage.locked(left):
            shutil.rmtree(left, ignore_errors=True)


def _locked_folder(held: contextlib.ExitStack) -> Path:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=SCRATCH))
        try:
            held.enter_context(storage.locked(folder))
        except (BlockingIOError, FileNotFoundError):
            continue  # another task took it for one that was left, before it had its lock
        except OSError:
            return folder  # a file system without locks: nobody removes it, either
        if folder.exists():
            return folder


def _write_tar(tar: Path, samples: Iterator[tuple[SampleMeta, str, bytes]]) -> tuple[tuple[shards.IndexRow, ...], str]:
    with open(tar, "wb") as out:
        tars.write_shard(out, samples)
    with open(tar, "rb") as written:
        rows = tars.index_rows(written)
        written.seek(0)
        return rows, hashlib.file_digest(written, "sha256").hexdigest()


def _samples(job: ShardJob, plan: ShardPlan, quarantined: list[Quarantined]) -> Iterator[tuple[SampleMeta, str, bytes]]:
    """Samples of a shard; a video that cannot be read or does not decode whole is put into `quarantined` instead."""
    noting = Noting(job.board, plan.name)
    for planned in plan.videos:
        video = planned.video
        try:
            source = _read_video(Path(job.folder), planned)
            content, info = transcode.into_form_contained(source, job.form)
        except (UnreadableError, DecodeError) as error:
            quarantined.append(Quarantined(split=plan.split, key=video.key, path=video.path, reason=str(error)))
        else:
            suffix = Path(video.path).suffix.lower().lstrip(".") if content is source else transcode.SUFFIX
            yield _describe(video, info, content, source), suffix, content
        noting.add(planned.bytes)


def _read_video(folder: Path, planned: PlannedVideo) -> bytes:
    path = folder / planned.video.path
    try:
        content = path.read_bytes()
    except OSError as error:
        if error.errno == errno.ENOENT and not _has_files(folder):
            raise DataError(
                f"the worker on {socket.gethostname()} cannot see the source folder {folder}; put the videos on storage that every"
                f" machine of the cluster mounts under this path, or pack on a cluster of one machine"
            ) from None
        if error.errno not in _OF_THE_FILE:
            raise
        raise UnreadableError(f"{_UNREADABLE}: {error.strerror}") from None
    if len(content) != planned.bytes:
        raise DataError(f"{path} had {planned.bytes} bytes when packing began and has {len(content)} now; let the source rest")
    return content


def _has_files(folder: Path) -> bool:
    """Where a file system is not mounted there may be an empty folder."""
    return folder.is_dir() and any(True for _ in folder.iterdir())


def _describe(video: SourceVideo, info: VideoInfo, content: bytes, source: bytes) -> SampleMeta:
    return SampleMeta(
        key=video.key,
        label=video.label,
        text=video.text,
        placeholders=video.placeholders,
        duration=round(info.duration, 6),
        frames=info.frames,
        fps=round(info.fps, 6),
        width=info.width,
        height=info.height,
        sha256=hashlib.sha256(content).hexdigest(),
        source_sha256=None if content is source else hashlib.sha256(source).hexdigest(),
    )
