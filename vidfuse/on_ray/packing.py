"""Packing: a folder of videos and its annotations -> a packed set on any storage, one Ray task a shard.

Comes in: a `data.layouts.Source`, the folder (which every worker can see) and a URL. Goes out: shards, their records,
the indices, `quarantine.json`, and `manifest.json` last: its presence says that the set is finished.

What goes into which shard is decided before anything is read, from names, annotations and file sizes (`make_plan`), so a shard
is the same bytes whoever writes it and whenever. A shard's record is written after its tar; packing again after a crash skips
the shards that have one. A task holds one video in memory and one shard on its disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
from pyarrow import fs as pafs
from ray.exceptions import RayError, RayTaskError

from vidfuse.data import decode, shards
from vidfuse.data.layouts import Source, SourceVideo
from vidfuse.data.shards import DataError, Manifest, Quarantined, SampleMeta, ShardInfo, ShardRecord, SplitInfo
from vidfuse.on_ray import storage

SHARD_BYTES = 256_000_000
"""Default bound of a shard, bytes."""
LEAST_SHARD_BYTES = 64_000
_UNITS = {"": 1, "B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1024, "MIB": 1024**2, "GIB": 1024**3}
_VERSION = 1
"""Of the packing: changed when the same source would give other bytes."""
_MEMBER_OVERHEAD = 3 * 1024
"""Most bytes that two tar headers, padding and the meta member add to a video (its text is counted besides)."""
_END_OVERHEAD = 10 * 1024
_CANCEL_SECONDS = 10.0
_SHARD_FILE = re.compile(r".+-\d{5}\.(tar|json)")


@dataclass(frozen=True)
class PlannedVideo:
    """A video and the bytes of its file."""

    video: SourceVideo
    bytes: int


@dataclass(frozen=True)
class ShardPlan:
    """What goes into a shard."""

    name: str
    split: str
    videos: tuple[PlannedVideo, ...]

    @property
    def bytes(self) -> int:
        """Of its videos."""
        return sum(video.bytes for video in self.videos)


@dataclass(frozen=True)
class Plan:
    """A packed set before it is written."""

    source: Source
    shards: tuple[ShardPlan, ...]
    digest: str
    """Hash of everything that decides the set's bytes."""


@dataclass
class Progress:
    """How far packing or checking is."""

    bytes_total: int
    videos_total: int
    bytes: int = 0
    videos: int = 0
    quarantined: int = 0
    bytes_before: int = 0
    """Done by an earlier run."""
    started: float = field(default_factory=time.monotonic)

    def line(self) -> str:
        """In words: share, rate, time left."""
        seconds = max(time.monotonic() - self.started, 1e-6)
        rate = (self.bytes - self.bytes_before) / seconds
        eta = f"{(self.bytes_total - self.bytes) / rate:.0f} s" if rate else "unknown"
        share = 100 * self.bytes / max(1, self.bytes_total)
        left_out = f", {self.quarantined} left out" if self.quarantined else ""
        return f"{self.videos}/{self.videos_total} videos ({share:.0f} %), {rate / 1e6:.1f} MB/s{left_out}, eta {eta}"


@dataclass(frozen=True)
class Packed:
    """What packing did."""

    manifest: Manifest
    written: int
    """Shards written now."""
    kept: int
    """Shards that were there from an earlier, interrupted run; all of them if nothing was left to do."""

    already: bool = False
    """Whether the set was finished before."""

    def lines(self, url: str) -> Iterator[str]:
        """In words."""
        if self.already:
            yield f"{url} was finished already with the same videos: nothing written"
        elif self.kept:
            yield f"continued: {self.kept} shards were there, {self.written} written"
        for split, info in self.manifest.splits.items():
            yield f"{split}: {info.samples} videos in {len(info.shards)} shards, {info.bytes / 1e6:.1f} MB"
        if self.manifest.quarantined:
            yield f"{self.manifest.quarantined} videos left out, see {storage.join(url, shards.QUARANTINE)}"


@dataclass(frozen=True)
class Packing:
    """What is to be packed, and what of it is there already."""

    plan: Plan
    folder: Path
    place: str
    """URL or absolute folder of the set."""
    records: dict[str, ShardRecord]
    """Of shards that an interrupted run completed."""
    finished: Manifest | None
    """Of a set that is there whole: nothing is left to do."""


def parse_bytes(text: str) -> int:
    """Read `1000000`, `256MB` or `1GiB` as bytes.

    Raises:
        DataError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise DataError(f"--shard-bytes {text!r}: a number of bytes is needed, such as 256000000, 256MB or 1GiB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def make_plan(source: Source, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Decide which video goes into which shard.

    Videos of a split are ordered by a hash of their key, so that each shard is a mixture of classes, and cut where the next
    one would make the shard larger than `shard_bytes`. A video larger than that has a shard of its own.

    Args:
        source: The data set.
        folder: Its folder.
        shard_bytes: Bound of a tar, bytes.

    Raises:
        DataError: too small a bound, or a file that is gone or empty.
    """
    if shard_bytes < LEAST_SHARD_BYTES:
        raise DataError(f"--shard-bytes {shard_bytes}: at least {LEAST_SHARD_BYTES} (64KB); 256MB suits object storage")
    parts = []
    for split, videos in source.splits.items():
        planned = sorted((_measure(video, Path(folder)) for video in videos), key=lambda p: _order(split, p.video.key))
        for number, group in enumerate(_cut(planned, shard_bytes)):
            parts.append(ShardPlan(shards.shard_name(split, number), split, tuple(group)))
    facts = {
        "version": _VERSION,
        "dataset": source.dataset,
        "classes": source.classes,
        "shards": [asdict(part) for part in parts],
    }
    return Plan(source, tuple(parts), hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest())


def prepare(source: Source, folder: str | Path, url: str, shard_bytes: int = SHARD_BYTES) -> Packing:
    """Plan a set and look at where it goes; needs no Ray and writes nothing.

    Args:
        source: What `data.layouts.read_layout` gave for `folder`.
        folder: Of the videos; every machine of the cluster sees it under this path.
        url: Where the set goes: a folder (seen by every machine) or `s3://bucket/prefix`.
        shard_bytes: Bound of a tar, bytes.

    Raises:
        DataError: too small a bound, a missing file, or a place that holds another set.
        StorageError: a place that cannot be written.
    """
    fs, root = storage.open_storage(url)
    local = isinstance(fs, pafs.LocalFileSystem)
    if not local:
        storage.check_storage(url)
    plan = make_plan(source, folder, shard_bytes)
    finished = _finished(fs, root, plan)
    if not finished:
        storage.check_storage(url, write=True)
    records = {} if finished else _leftovers(fs, root, plan)
    # A worker's working directory is not this process's.
    return Packing(plan, Path(folder).absolute(), root if local else url, records, finished)


def pack(packing: Packing, *, on_progress: Callable[[Progress], None] | None = None) -> Packed:
    """Write what is not there yet; Ray is running (unless the set is finished).

    Args:
        packing: What `prepare` gave.
        on_progress: Called after each shard.

    Raises:
        DataError: a source that changes meanwhile or that a worker cannot see, a split of which no video decodes.
    """
    plan, records = packing.plan, dict(packing.records)
    if packing.finished:
        return Packed(packing.finished, 0, len(plan.shards), already=True)
    progress = Progress(sum(shard.bytes for shard in plan.shards), sum(len(shard.videos) for shard in plan.shards))
    for shard in plan.shards:
        if shard.name in records:
            _count(progress, shard, records[shard.name])
    progress.bytes_before = progress.bytes
    todo = [shard for shard in plan.shards if shard.name not in records]
    units = [(packing.place, str(packing.folder), shard, plan.digest) for shard in todo]
    for number, record in run_tasks(_pack_shard, units):
        records[record.name] = record
        _count(progress, todo[number], record)
        if on_progress:
            on_progress(progress)
    fs, root = storage.open_storage(packing.place)
    return Packed(_finish(fs, root, plan, records), len(todo), len(packing.records))


def run_tasks(function: Callable[..., Any], units: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Call a function once for each unit in Ray tasks of one CPU, a bounded number at a time.

    Yields:
        The unit's number and the function's result, as they come.

    Raises:
        ValueError: raised by the function, as it was raised there.
        DataError: an error of a file or of the network, in words.
    """
    task = ray.remote(num_cpus=1, max_retries=3)(function)
    limit = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    pending: dict[Any, int] = {}
    rest = iter(enumerate(units))
    try:
        while True:
            while len(pending) < limit and (unit := next(rest, None)) is not None:
                pending[task.remote(*unit[1])] = unit[0]
            if not pending:
                return
            for ref in ray.wait(list(pending), num_returns=1)[0]:
                yield pending.pop(ref), _result(ref)
    finally:
        _cancel(list(pending))


def _cancel(refs: list[Any]) -> None:
    """Stop tasks and fetch how they ended: Ray prints errors that nobody fetches."""
    for ref in refs:
        ray.cancel(ref)
    for ref in ray.wait(refs, num_returns=len(refs), timeout=_CANCEL_SECONDS)[0] if refs else ():
        with contextlib.suppress(RayError, ValueError, OSError):
            ray.get(ref)


def _result(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):
            raise cause from None
        if isinstance(cause, OSError):
            raise DataError(
                f"a Ray task failed: {' '.join(str(cause).split())}; give the same command again to continue"
            ) from None
        raise


# --- the plan ---


def _measure(video: SourceVideo, folder: Path) -> PlannedVideo:
    try:
        return PlannedVideo(video, (folder / video.path).stat().st_size)
    except OSError as error:
        raise DataError(f"{folder / video.path}: {error.strerror}") from None


def _order(split: str, key: str) -> bytes:
    return hashlib.sha256(f"{split}/{key}".encode()).digest()


def _cut(videos: Sequence[PlannedVideo], shard_bytes: int) -> Iterator[list[PlannedVideo]]:
    group: list[PlannedVideo] = []
    total = _END_OVERHEAD
    for video in videos:
        size = video.bytes + _MEMBER_OVERHEAD + 2 * len(video.video.text.encode())
        if group and total + size > shard_bytes:
            yield group
            group, total = [], _END_OVERHEAD
        group.append(video)
        total += size
    if group:
        yield group


# --- what is there already ---


def _finished(fs: Any, root: str, plan: Plan) -> Manifest | None:
    if not storage.exists(fs, storage.join(root, shards.MANIFEST)):
        return None
    manifest = shards.read_manifest(fs, root)
    if manifest.plan != plan.digest:
        raise DataError(
            f"{root} holds another packed set ({manifest.dataset}, {sum(s.samples for s in manifest.splits.values())} samples),"
            f" of another source or other options; give another URL, or remove that set first"
        )
    return manifest


def _leftovers(fs: Any, root: str, plan: Plan) -> dict[str, ShardRecord]:
    """Records of the plan's shards that are complete."""
    found = storage.list_files(fs, root)
    names = {name for part in plan.shards for name in (part.name, shards.record_name(part.name))}
    for name in found:
        if _SHARD_FILE.fullmatch(name) and name not in names:
            raise DataError(f"{root} holds {name}, part of another packed set; give another URL, or remove that set first")
    records: dict[str, ShardRecord] = {}
    for part in plan.shards:
        name = shards.record_name(part.name)
        if name not in found:
            continue
        record = shards.parse_record(ShardRecord, storage.read_bytes(fs, storage.join(root, name)), f"{root}/{name}")
        if record.plan != plan.digest:
            raise DataError(
                f"{root} holds {name} of an interrupted run over another source or with other options; give that command"
                f" again, give another URL, or remove the files first"
            )
        if not record.samples or found.get(part.name) == record.bytes:
            records[part.name] = record
    return records


# --- one shard ---


def _pack_shard(url: str, folder: str, plan: ShardPlan, digest: str) -> ShardRecord:
    """Write a shard and then its record; runs in a Ray task."""
    fs, root = storage.open_storage(url, write=True)
    quarantined: list[Quarantined] = []
    with tempfile.TemporaryDirectory(prefix="vidfuse-pack-") as scratch:
        tar = Path(scratch) / plan.name
        with open(tar, "wb") as out:
            shards.write_shard(out, _readable(Path(folder), plan, quarantined))
        with open(tar, "rb") as written:
            rows = shards.index_rows(written)
            written.seek(0)
            digest_of_tar = hashlib.file_digest(written, "sha256").hexdigest()
        if rows:
            storage.upload(fs, storage.join(root, plan.name), str(tar))
        record = ShardRecord(
            name=plan.name,
            plan=digest,
            bytes=tar.stat().st_size if rows else 0,
            sha256=digest_of_tar if rows else "",
            samples=rows,
            quarantined=tuple(quarantined),
        )
    storage.write_bytes(fs, storage.join(root, shards.record_name(plan.name)), shards.dump_record(record))
    return record


def _readable(folder: Path, plan: ShardPlan, quarantined: list[Quarantined]) -> Iterator[tuple[SampleMeta, str, bytes]]:
    """Samples of a shard; a video that does not decode whole is put into `quarantined` instead."""
    for planned in plan.videos:
        content = _read_video(folder, planned)
        try:
            yield _describe(planned.video, content), Path(planned.video.path).suffix.lower().lstrip("."), content
        except decode.DecodeError as error:
            video = planned.video
            quarantined.append(Quarantined(split=plan.split, key=video.key, path=video.path, reason=str(error)))


def _read_video(folder: Path, planned: PlannedVideo) -> bytes:
    path = folder / planned.video.path
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if folder.is_dir():
            raise DataError(f"{path} was there when packing began, and is gone") from None
        raise DataError(
            f"the worker on {socket.gethostname()} cannot see the source folder {folder}; put the videos on storage that every"
            f" machine of the cluster mounts under this path, or pack on a cluster of one machine"
        ) from None
    if len(content) != planned.bytes:
        raise DataError(f"{path} had {planned.bytes} bytes when packing began and has {len(content)} now; let the source rest")
    return content


def _describe(video: SourceVideo, content: bytes) -> SampleMeta:
    info = decode.probe(content)
    return SampleMeta(
        key=video.key,
        label=video.label,
        text=video.text,
        duration=round(info.duration, 6),
        frames=info.frames,
        fps=round(info.fps, 6),
        width=info.width,
        height=info.height,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _count(progress: Progress, plan: ShardPlan, record: ShardRecord) -> None:
    progress.bytes += plan.bytes
    progress.videos += len(plan.videos)
    progress.quarantined += len(record.quarantined)


# --- the end ---


def _finish(fs: Any, root: str, plan: Plan, records: dict[str, ShardRecord]) -> Manifest:
    ordered = [records[part.name] for part in plan.shards]
    _check_written(fs, root, ordered)
    quarantined = tuple(video for record in ordered for video in record.quarantined)
    quarantine = shards.Quarantine(videos=quarantined)
    storage.write_bytes(fs, storage.join(root, shards.QUARANTINE), shards.dump_record(quarantine))
    splits = {}
    for split in plan.source.splits:
        mine = [record for part, record in zip(plan.shards, ordered, strict=True) if part.split == split and record.samples]
        if not mine:
            first = next(video for video in quarantined if video.split == split)
            raise DataError(f"no video of split {split!r} decodes; the first one, {first.path}: {first.reason}")
        splits[split] = _write_split(fs, root, split, mine)
    manifest = Manifest(
        dataset=plan.source.dataset,
        classes=plan.source.classes,
        splits=splits,
        quarantined=len(quarantined),
        plan=plan.digest,
    )
    storage.write_bytes(fs, storage.join(root, shards.MANIFEST), shards.dump_record(manifest))
    return manifest


def _write_split(fs: Any, root: str, split: str, records: Sequence[ShardRecord]) -> SplitInfo:
    index = shards.encode_index(records)
    name = shards.index_name(split)
    storage.write_bytes(fs, storage.join(root, name), index)
    return SplitInfo(
        samples=sum(len(record.samples) for record in records),
        bytes=sum(record.bytes for record in records),
        index=name,
        index_sha256=hashlib.sha256(index).hexdigest(),
        shards=tuple(ShardInfo(name=r.name, samples=len(r.samples), bytes=r.bytes, sha256=r.sha256) for r in records),
    )


def _check_written(fs: Any, root: str, records: Sequence[ShardRecord]) -> None:
    found = storage.list_files(fs, root)
    lost = [record.name for record in records if record.samples and found.get(record.name) != record.bytes]
    if lost:
        raise DataError(
            f"{root}: {lost[0]} was written by a worker and is not there as seen from here; every machine of the cluster has to"
            f" see the same folder: give an s3:// URL or a shared folder"
        )
