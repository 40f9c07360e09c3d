"""Packing: a folder of videos and its annotations -> a packed set on any storage, one Ray task a shard.

Comes in: a `Source`, the folder (which every worker can see) and a URL. Goes out: shards, their records, the indices,
`quarantine.json`, and `manifest.json` last: its presence says that the set is finished, and nothing writes over it.

What goes into which shard is decided first (`data.planning`). A shard's record is written after its tar; packing again after a
crash skips the shards that have one.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pyarrow import fs as pafs
from ray.exceptions import RayError

from vidfuse.config import TranscodeConfig
from vidfuse.data import shards
from vidfuse.data.annotations.source import Source
from vidfuse.data.planning import SHARD_BYTES, Plan, ShardPlan, make_plan
from vidfuse.data.shards import DataError, Manifest, ShardInfo, ShardRecord, SplitInfo
from vidfuse.data.transcode import check_encoder
from vidfuse.on_ray import storage
from vidfuse.on_ray.shard_writing import ROOM, ShardJob, write_shard
from vidfuse.on_ray.tasks import Board, Progress, run_tasks

BOARD_SECONDS = 5.0
"""How long the board of what is under way is waited for."""
_SHARD_FILE = re.compile(r".+-\d{5}\.(tar|json)")


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
        yield f"version {self.manifest.version}"


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


def prepare(
    source: Source, folder: str | Path, url: str, shard_bytes: int = SHARD_BYTES, transcode: TranscodeConfig | None = None
) -> Packing:
    """Plan a set and look at where it goes; needs no Ray and writes nothing.

    Args:
        source: What `data.layouts.read_layout` gave for `folder`.
        folder: Of the videos; every machine of the cluster sees it under this path.
        url: Where the set goes: a folder (seen by every machine) or `s3://bucket/prefix`.
        shard_bytes: Bound of a tar, bytes; of the videos before they are transcoded.
        transcode: Form that videos are brought into; `None`: they stay as they are.

    Raises:
        DataError: too small a bound, a missing file, no encoder, no room, or a place that holds another set.
        StorageError: a place that cannot be written.
    """
    fs, root = storage.open_storage(url)
    local = isinstance(fs, pafs.LocalFileSystem)
    if not local:
        storage.check_storage(url)
    if transcode:
        check_encoder()
    plan = make_plan(source, folder, shard_bytes, transcode)
    finished = _finished(fs, root, plan)
    if not finished:
        storage.check_storage(url, write=True)
    records = {} if finished else _leftovers(fs, root, plan)
    if local and not finished:
        _check_room(root, plan, records)
    # A worker's working directory is not this process's.
    return Packing(plan, Path(folder).absolute(), root if local else url, records, finished)


def pack(packing: Packing, *, on_progress: Callable[[Progress], None] | None = None) -> Packed:
    """Write what is not there yet; Ray is running (unless the set is finished).

    Args:
        packing: What `prepare` gave.
        on_progress: Called after each shard, and every ten seconds between.

    Raises:
        DataError: a source that changes meanwhile or that a worker cannot see, a split of which no video decodes.
        StorageError: no room is left; what is written stays.
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
    board: Any = Board.remote() if todo else None  # type: ignore[attr-defined]
    job = ShardJob(packing.place, str(packing.folder), plan.digest, plan.recipe.transcode, board)

    def tell(ended: ShardPlan | None = None) -> None:
        if ended is not None:
            board.forget.remote(ended.name)
        more = (0, 0)
        with contextlib.suppress(RayError):  # its node may die: then there is less to tell
            more = ray.get(board.total.remote(), timeout=BOARD_SECONDS)
        if on_progress:
            on_progress(progress.with_more(*more))

    for number, record in run_tasks(write_shard, [(job, shard) for shard in todo], on_wait=tell):
        records[record.name] = record
        _count(progress, todo[number], record)
        tell(todo[number])
    fs, root = storage.open_storage(packing.place)
    with storage.told_when_full(packing.place, ROOM):
        return Packed(_finish(fs, root, plan, records), len(todo), len(packing.records))


def _count(progress: Progress, plan: ShardPlan, record: ShardRecord) -> None:
    progress.bytes += plan.bytes
    progress.videos += len(plan.videos)
    progress.quarantined += len(record.quarantined)


# --- what is there already ---


def _finished(fs: Any, root: str, plan: Plan) -> Manifest | None:
    if not storage.exists(fs, storage.join(root, shards.MANIFEST)):
        return None
    manifest = shards.read_manifest(fs, root)
    if manifest.plan != plan.digest:
        raise DataError(
            f"{root} holds another packed set ({manifest.dataset}, version {manifest.version},"
            f" {sum(s.samples for s in manifest.splits.values())} samples), of another source or other options; a packed set is never"
            f" changed: give another URL, or remove that set first"
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


def _check_room(root: str, plan: Plan, records: dict[str, ShardRecord]) -> None:
    """Refuse a disk that cannot hold what is to be written; what transcoding will make is not known."""
    free = shutil.disk_usage(root).free
    needed = sum(part.bytes for part in plan.shards if part.name not in records)
    if plan.recipe.transcode is None and needed > free:
        raise DataError(
            f"{root}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; free some, or give another URL"
        )


# --- the end ---


def _finish(fs: Any, root: str, plan: Plan, records: dict[str, ShardRecord]) -> Manifest:
    ordered = [records[part.name] for part in plan.shards]
    _check_written(fs, root, ordered)
    quarantined = tuple(video for record in ordered for video in record.quarantined)
    quarantine = shards.Quarantine(videos=quarantined + plan.source.absent)
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
        quarantined=len(quarantine.videos),
        plan=plan.digest,
        recipe=plan.recipe,
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
