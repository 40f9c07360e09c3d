"""Packing: a folder of videos and its annotations -> a packed set on any storage, one Ray task a shard.

Comes in: a `Source`, the folder (which every worker can see) and a URL. Goes out: shards, their records, the indices,
`quarantine.json`, and `manifest.json` last: its presence says that the set is finished, and nothing writes over it.

What goes into which shard is decided first (`data.planning`). A shard's record is written after its tar; packing again after a
crash keeps the shards that are what their records say. Packing again over a finished set writes what is missing or of another size,
if it comes out as the manifest names it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs as pafs

from vidfuse.config import TranscodeConfig
from vidfuse.data import shards
from vidfuse.data.annotations.source import Source, shown
from vidfuse.data.planning import SHARD_BYTES, Plan, ShardPlan, make_plan
from vidfuse.data.shards import DataError, Manifest, Quarantine, ShardInfo, ShardRecord, SplitInfo
from vidfuse.data.transcode import check_encoder
from vidfuse.on_ray import storage
from vidfuse.on_ray.shard_writing import ROOM, ShardJob, complete_shard
from vidfuse.on_ray.tasks import Progress, Teller, run_tasks

_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_SHARD_FILE = re.compile(r".+-\d{5}\.(tar|json)")


class OtherSetError(DataError):
    """The place holds a packed set of another source, of other options or of another version's packing."""


@dataclass(frozen=True)
class Packed:
    """What packing did."""

    manifest: Manifest
    written: int
    """Shards written now."""
    kept: int
    """Shards that were there from an earlier, interrupted run; all of them if nothing was left to do."""

    already: bool = False
    """Whether the set was finished before, and is whole."""
    repaired: tuple[str, ...] = ()
    """Files of a finished set that were lost, and are what they were again."""
    copies: tuple[tuple[str, str], ...] = ()
    """Videos of different splits that have the same bytes, as `split/key` of one and of the other; known when a set is finished."""

    def lines(self, url: str) -> Iterator[str]:
        """In words."""
        if self.already:
            yield f"{url} was finished already with the same videos: nothing written"
        elif self.repaired:
            yield f"repaired: {shown(self.repaired)} written again, as the manifest names them"
        elif self.kept:
            yield f"continued: {self.kept} shards were there, {self.written} written"
        for split, info in self.manifest.splits.items():
            yield f"{split}: {info.samples} videos in {len(info.shards)} shards, {info.bytes / 1e6:.1f} MB"
        if self.manifest.quarantined:
            yield f"{self.manifest.quarantined} videos left out, see {storage.join(url, shards.QUARANTINE)}"
        if self.copies:
            yield (
                f"{len(self.copies)} videos are in two splits with the same bytes, under two names: {' = '.join(self.copies[0])}"
                f"{', ...' if len(self.copies) > 1 else ''}; python -m jobs.quality lists these, and those that only look alike"
            )
        yield f"version {self.manifest.version}"


@dataclass(frozen=True)
class Packing:
    """What is to be packed, and what of it is there already."""

    plan: Plan
    folder: Path
    place: str
    """URL or absolute folder of the set."""
    records: dict[str, ShardRecord]
    """Of shards that are there, by names and sizes."""
    manifest: Manifest | None
    """Of a set that was finished."""
    lost: tuple[str, ...]
    """What is missing of it, or is not what it was."""

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: Ray is not needed."""
        return self.manifest is not None and not self.lost


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
        DataError: too small a bound, a missing file, no encoder, no room, or a place that holds a damaged record.
        OtherSetError: a place that holds another set.
        StorageError: a place that cannot be written.
    """
    fs, root = storage.open_storage(url)
    local = isinstance(fs, pafs.LocalFileSystem)
    if not local:
        storage.check_storage(url)
    if transcode:
        check_encoder()
    plan = make_plan(source, folder, shard_bytes, transcode)
    manifest = _manifest(fs, root, plan)
    found = storage.list_files(fs, root)
    if not manifest:
        _check_names(root, plan, found)
    records = _records(fs, root, plan, found, manifest)
    lost = tuple(_lost(fs, root, plan, found, records, manifest)) if manifest else ()
    # A worker's working directory is not this process's.
    packing = Packing(plan, Path(folder).absolute(), root if local else url, records, manifest, lost)
    if not packing.finished:
        storage.check_storage(url, write=True)
        if local:
            _check_room(root, plan, records)
    return packing


def source_folder(source: str) -> str:
    """Return a source if it can be a folder of this machine, before its files are looked for.

    Raises:
        DataError: it is empty, or a URL.
    """
    if not source.strip():
        raise DataError("SOURCE is empty; give the folder of the data set (. is the current one)")
    if _URL.match(source):
        raise DataError(
            f"{storage.shown(source)}: SOURCE has to be a folder; mount the bucket under one path on every machine of the cluster, or"
            f" copy the videos, and give that folder"
        )
    return source


def pack(packing: Packing, *, on_progress: Callable[[Progress], None] | None = None) -> Packed:
    """Write what is not there yet; Ray is running (unless the set is finished).

    Args:
        packing: What `prepare` gave.
        on_progress: Called after each shard, and every ten seconds between.

    Raises:
        DataError: a source that changes meanwhile or that a worker cannot see, a split of which no video decodes, or a file of a
            finished set that does not come out as it was.
        StorageError: no room is left; what is written stays.
    """
    plan, manifest = packing.plan, packing.manifest
    if manifest and packing.finished:
        return Packed(manifest, 0, len(plan.shards), already=True)
    progress = Progress(sum(shard.bytes for shard in plan.shards), sum(len(shard.videos) for shard in plan.shards))
    records = dict(packing.records) if manifest else {}
    for shard in plan.shards:
        if shard.name in records:
            _count(progress, shard, records[shard.name], kept=True)
    units = _units(packing)
    fs, root = storage.open_storage(packing.place)
    names = _names(plan)
    storage.remove_partials(fs, root, names)
    tell = Teller(progress, on_progress)
    job = ShardJob(packing.place, str(packing.folder), plan.digest, plan.recipe.transcode, tell.board)
    written = 0
    for number, (record, kept) in run_tasks(
        complete_shard, [(job, *unit) for unit in units], names=[shard.name for shard, *_ in units], on_wait=tell
    ):
        shard = units[number][0]
        records[record.name] = record
        written += not kept
        _count(progress, shard, record, kept=kept)
        tell(shard.name)
    storage.remove_partials(fs, root, names)  # of tasks that were killed and tried again
    with storage.told_when_full(packing.place, ROOM):
        if manifest:
            _repair(fs, root, plan, records, manifest, packing.lost)
            return Packed(manifest, written, len(plan.shards) - written, repaired=packing.lost)
        finished = _finish(fs, root, plan, records)
    return Packed(finished, written, len(plan.shards) - written, copies=tuple(_copies(plan, records)))


def _units(packing: Packing) -> list[tuple[ShardPlan, ShardRecord | None, str | None]]:
    """What tasks are to complete: of a finished set the shards that are lost, with what they have to be; else all shards."""
    manifest, plan = packing.manifest, packing.plan
    if not manifest:
        return [(shard, packing.records.get(shard.name), None) for shard in plan.shards]
    due = {shard.name: shard.sha256 for shard in _listed(manifest).values()}
    return [(shard, None, due.get(shard.name, "")) for shard in plan.shards if shard.name not in packing.records]


def _count(progress: Progress, plan: ShardPlan, record: ShardRecord, *, kept: bool) -> None:
    progress.add(len(plan.videos), plan.bytes, before=kept)
    progress.quarantined += len(record.quarantined)


# --- what is there already ---


def _manifest(fs: Any, root: str, plan: Plan) -> Manifest | None:
    if not storage.exists(fs, storage.join(root, shards.MANIFEST)):
        return None
    manifest = shards.read_manifest(fs, root)
    if manifest.plan != plan.digest:
        raise OtherSetError(
            f"{root} holds another packed set ({manifest.dataset}, version {manifest.version},"
            f" {sum(s.samples for s in manifest.splits.values())} samples), of another source or other options, or packed by another"
            f" version of vidfuse; a packed set is never changed: give another URL, or remove that set first"
        )
    return manifest


def _names(plan: Plan) -> set[str]:
    """Of all files of a set."""
    names = {name for part in plan.shards for name in (part.name, shards.record_name(part.name))}
    return names | {shards.index_name(split) for split in plan.source.splits} | {shards.QUARANTINE, shards.MANIFEST}


def _check_names(root: str, plan: Plan, found: Iterable[str]) -> None:
    names = _names(plan)
    for name in found:
        if _SHARD_FILE.fullmatch(name) and name not in names:
            raise OtherSetError(f"{root} holds {name}, part of another packed set; give another URL, or remove that set first")


def _records(fs: Any, root: str, plan: Plan, found: Mapping[str, int], manifest: Manifest | None) -> dict[str, ShardRecord]:
    """Records of the plan's shards that are complete, and are the manifest's where there is one."""
    records: dict[str, ShardRecord] = {}
    listed = _listed(manifest) if manifest else {}
    for part in plan.shards:
        name = shards.record_name(part.name)
        if name not in found:
            continue
        try:
            record = shards.parse_record(ShardRecord, storage.read_bytes(fs, storage.join(root, name)), f"{root}/{name}")
        except DataError as error:
            raise DataError(f"{error}; remove the file, and give the same command again: it writes it anew") from None
        if record.plan != plan.digest:
            raise DataError(
                f"{root} holds {name} of an interrupted run over another source or with other options; give that command"
                f" again, give another URL, or remove the files first"
            )
        whole = not record.samples or found.get(part.name) == record.bytes
        same = manifest is None or record.sha256 == (listed[part.name].sha256 if part.name in listed else "")
        if whole and same:
            records[part.name] = record
    return records


def _lost(
    fs: Any, root: str, plan: Plan, found: Mapping[str, int], records: Mapping[str, ShardRecord], manifest: Manifest
) -> Iterator[str]:
    """Files of a finished set that are missing, of another size, or, where they are small, of other bytes."""
    listed = _listed(manifest)
    for part in plan.shards:
        if part.name in listed and found.get(part.name) != listed[part.name].bytes:
            yield part.name
        elif part.name not in records:
            yield shards.record_name(part.name)
    for info in manifest.splits.values():
        if info.index not in found or _sha256(storage.read_bytes(fs, storage.join(root, info.index))) != info.index_sha256:
            yield info.index
    complete = len(records) == len(plan.shards)
    if shards.QUARANTINE not in found or (
        complete
        and storage.read_bytes(fs, storage.join(root, shards.QUARANTINE)) != shards.dump_record(_left_out(plan, records))
    ):
        yield shards.QUARANTINE


def _listed(manifest: Manifest) -> dict[str, ShardInfo]:
    return {shard.name: shard for info in manifest.splits.values() for shard in info.shards}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_room(root: str, plan: Plan, records: dict[str, ShardRecord]) -> None:
    """Refuse a disk that cannot hold what is to be written; what transcoding will make is not known."""
    free = shutil.disk_usage(root).free
    needed = sum(part.bytes for part in plan.shards if part.name not in records)
    if plan.recipe.transcode is None and needed > free:
        raise DataError(
            f"{root}: {needed / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free; free some, or give another URL"
        )


# --- the end ---


def _finish(fs: Any, root: str, plan: Plan, records: Mapping[str, ShardRecord]) -> Manifest:
    _check_written(fs, root, plan, records)
    quarantine = _left_out(plan, records)
    storage.write_bytes(fs, storage.join(root, shards.QUARANTINE), shards.dump_record(quarantine))
    splits = {}
    for split in plan.source.splits:
        mine = _of_split(plan, records, split)
        if not mine:
            first = next(video for video in quarantine.videos if video.split == split)
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


def _repair(
    fs: Any, root: str, plan: Plan, records: Mapping[str, ShardRecord], manifest: Manifest, lost: Collection[str]
) -> None:
    """Write what is lost besides shards, which are there again."""
    _check_written(fs, root, plan, records)
    if shards.QUARANTINE in lost:
        storage.write_bytes(fs, storage.join(root, shards.QUARANTINE), shards.dump_record(_left_out(plan, records)))
    for split, info in manifest.splits.items():
        if info.index not in lost:
            continue
        index = shards.encode_index(_of_split(plan, records, split))
        if _sha256(index) != info.index_sha256:
            raise DataError(
                f"{root}/{info.index} would not be the one that the manifest names (its sha256 differs), and was not written: the"
                f" set was packed with another version of pyarrow; install that one, or pack to another URL"
            )
        storage.write_bytes(fs, storage.join(root, info.index), index)


def _of_split(plan: Plan, records: Mapping[str, ShardRecord], split: str) -> list[ShardRecord]:
    """Records of the shards in which a split has samples, in order."""
    return [records[part.name] for part in plan.shards if part.split == split and records[part.name].samples]


def _copies(plan: Plan, records: Mapping[str, ShardRecord]) -> Iterator[tuple[str, str]]:
    first: dict[bytes, tuple[str, str]] = {}
    for split in plan.source.splits:
        for record in _of_split(plan, records, split):
            for sample in record.samples:
                of, key = first.setdefault(bytes.fromhex(sample.sha256), (split, sample.key))
                if of != split:
                    yield f"{of}/{key}", f"{split}/{sample.key}"


def _left_out(plan: Plan, records: Mapping[str, ShardRecord]) -> Quarantine:
    videos = (video for part in plan.shards for video in records[part.name].quarantined)
    return Quarantine(videos=(*videos, *plan.source.absent))


def _write_split(fs: Any, root: str, split: str, records: Sequence[ShardRecord]) -> SplitInfo:
    index = shards.encode_index(records)
    name = shards.index_name(split)
    storage.write_bytes(fs, storage.join(root, name), index)
    return SplitInfo(
        samples=sum(len(record.samples) for record in records),
        bytes=sum(record.bytes for record in records),
        index=name,
        index_sha256=_sha256(index),
        shards=tuple(ShardInfo(name=r.name, samples=len(r.samples), bytes=r.bytes, sha256=r.sha256) for r in records),
    )


def _check_written(fs: Any, root: str, plan: Plan, records: Mapping[str, ShardRecord]) -> None:
    found = storage.list_files(fs, root)
    ordered = [records[part.name] for part in plan.shards]
    lost = [record.name for record in ordered if record.samples and found.get(record.name) != record.bytes]
    if lost:
        raise DataError(
            f"{root}: {lost[0]} was written by a worker and is not there as seen from here; every machine of the cluster has to"
            f" see the same folder: give an s3:// URL or a shared folder"
        )
