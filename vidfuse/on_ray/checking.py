"""Checking: a packed set against its manifest, to one of three depths.

Comes in: a URL. Goes out: one line for each fault, `shard/key: fault`, none where the set is whole.

`files`: each file is there and has its size; manifest, indices and quarantine agree. Nothing else is read, no Ray is needed.
`bytes`: every shard is streamed once in a Ray task: hashed, walked strictly, its samples held against the class list, the index
    and their own meta data, each by its sha256.
`frames`: every frame of every video is decoded too, and held against what was counted at packing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pyarrow import fs as pafs

from vidfuse.config import TranscodeConfig
from vidfuse.data import decode, shards, tars, transcode
from vidfuse.data.shards import DataError, IndexRow, Manifest, SampleMeta, ShardInfo, SplitIndex
from vidfuse.data.tars import Member
from vidfuse.data.video import DecodeError
from vidfuse.on_ray import storage
from vidfuse.on_ray.tasks import Noting, Progress, Teller, run_tasks

Depth = Literal["files", "bytes", "frames"]
READ_BYTES = 8 * 1024**2
"""Read of a shard at a time."""


@dataclass(frozen=True)
class Rules:
    """What holds for all samples of a set."""

    classes: int
    """Number of classes."""
    decoding: bool
    """Whether videos are decoded."""
    form: TranscodeConfig | None
    """What they were brought into."""


@dataclass
class ShardReport:
    """What a shard holds and what is wrong with it."""

    faults: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def open_set(url: str) -> Manifest:
    """The manifest of a set; needs no Ray.

    Raises:
        DataError: no packed set there.
        StorageError: a place that cannot be read.
    """
    storage.check_storage(url)
    return shards.read_manifest(*storage.open_storage(url))


def check(url: str, depth: Depth = "bytes", *, on_progress: Callable[[Progress], None] | None = None) -> list[str]:
    """Verify a packed set; Ray is running (but for `files`).

    Args:
        url: Of the set.
        depth: See above.
        on_progress: Called after each shard, and every ten seconds between.

    Returns:
        One line for each fault.

    Raises:
        DataError: no packed set there at all.
        StorageError: a place that cannot be read.
    """
    manifest = open_set(url)
    fs, root = storage.open_storage(url)
    place = root if isinstance(fs, pafs.LocalFileSystem) else url
    faults = _totals(manifest) + _files(fs, root, manifest, sizes=depth == "files")
    rules = Rules(len(manifest.classes), depth == "frames", manifest.recipe.transcode)
    units: list[tuple[Any, ...]] = []
    for split, info in manifest.splits.items():
        index = None
        try:
            index = shards.read_index(fs, root, split, manifest=manifest)
        except DataError as error:
            faults.append(f"{info.index}: {str(error).removeprefix(f'{root}/{info.index}: ')}")
        for number, shard in enumerate(info.shards):
            rows = _rows(index, number) if index is not None else None
            units.append((place, shard, rows, rules))
    return faults if depth == "files" else faults + _run(units, on_progress)


def _run(units: list[tuple[Any, ...]], on_progress: Callable[[Progress], None] | None) -> list[str]:
    progress = Progress(sum(unit[1].bytes for unit in units), sum(unit[1].samples for unit in units))
    tell = Teller(progress, on_progress)
    reports: dict[int, ShardReport] = {}
    for number, report in run_tasks(
        _check_shard, [(*unit, tell.board) for unit in units], names=[unit[1].name for unit in units], on_wait=tell
    ):
        reports[number], shard = report, units[number][1]
        progress.add(shard.samples, shard.bytes)
        tell(shard.name)
    places: dict[str, list[str]] = defaultdict(list)
    for number, unit in enumerate(units):
        for key in set(reports[number].keys):
            places[key].append(unit[1].name)
    faults = [fault for number in range(len(units)) for fault in reports[number].faults]
    return faults + [f"{at[1]}/{key}: duplicate key, also in {at[0]}" for key, at in sorted(places.items()) if len(at) > 1]


def _totals(manifest: Manifest) -> list[str]:
    faults = []
    for split, info in manifest.splits.items():
        for what in ("samples", "bytes"):
            said, found = getattr(info, what), sum(getattr(shard, what) for shard in info.shards)
            if said != found:
                faults.append(f"{shards.MANIFEST}: split {split} says {said} {what}, its shards have {found}")
    return faults


def _files(fs: Any, root: str, manifest: Manifest, *, sizes: bool) -> list[str]:
    known = {shard.name: shard.bytes for info in manifest.splits.values() for shard in info.shards}
    found = storage.list_files(fs, root)
    faults = [
        f"{name}: a shard that the manifest does not list" for name in found if name.endswith(".tar") and name not in known
    ]
    if sizes:  # deeper checks tell it of each shard that they read
        faults += [f"{name}: missing" for name in known if name not in found]
        faults += [
            f"{name}: {found[name]} bytes, the manifest says {size}"
            for name, size in known.items()
            if found.get(name, size) != size
        ]
    if shards.QUARANTINE not in found:
        return [*faults, f"{shards.QUARANTINE}: missing"]
    try:
        content = storage.read_bytes(fs, storage.join(root, shards.QUARANTINE))
        videos = shards.parse_record(shards.Quarantine, content, shards.QUARANTINE).videos
    except DataError as error:
        return [*faults, str(error)]
    if len(videos) != manifest.quarantined:
        faults.append(f"{shards.QUARANTINE}: {len(videos)} videos, the manifest says {manifest.quarantined}")
    return faults


def _rows(index: SplitIndex, number: int) -> tuple[IndexRow, ...]:
    names = ("key", "label", "suffix", "offset", "size", "frames", "width", "height", "sha256")
    chosen = (index.shard == number).nonzero()[0]
    columns = [getattr(index, name)[chosen].tolist() for name in names[:-1]]
    columns.append([digest.tobytes().hex() for digest in index.sha256[chosen]])
    return tuple(IndexRow(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True))


# --- one shard ---


def _check_shard(url: str, shard: ShardInfo, expected: tuple[IndexRow, ...] | None, rules: Rules, board: Any) -> ShardReport:
    """Everything that is wrong with a shard; runs in a Ray task."""
    fs, root = storage.open_storage(url)
    report = ShardReport()
    try:
        stream = fs.open_input_stream(storage.join(root, shard.name), buffer_size=READ_BYTES)
    except FileNotFoundError:
        report.faults.append(f"{shard.name}: missing")
        return report
    with contextlib.closing(stream):
        hashed = Hashed(stream)
        rows = _walk(hashed, shard.name, rules, report, Noting(board, shard.name))
        hashed.drain()
    if hashed.bytes < shard.bytes:
        report.faults.insert(0, f"{shard.name}: truncated, {hashed.bytes} of {shard.bytes} bytes are there")
    elif hashed.hash.hexdigest() != shard.sha256:
        report.faults.insert(0, f"{shard.name}: altered, its sha256 is not the manifest's; remove it and pack the set again")
    if len(rows) != shard.samples:
        report.faults.append(f"{shard.name}: {len(rows)} whole samples, the manifest says {shard.samples}")
    report.faults.extend(_index_faults(shard.name, rows, expected))
    return report


class Hashed:
    """A stream that hashes and counts what is read from it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.hash, self.bytes = stream, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        """The next bytes."""
        content = bytes(self.stream.read(size))
        self.hash.update(content)
        self.bytes += len(content)
        return content

    def drain(self) -> None:
        """Read to the end."""
        while self.read(READ_BYTES):
            pass


def _walk(file: Any, name: str, rules: Rules, report: ShardReport, noting: Noting) -> list[IndexRow]:
    rows: list[IndexRow] = []
    for video, content, meta in samples_of(file, name, report):
        if meta.key in report.keys:
            report.faults.append(f"{name}/{meta.key}: duplicate key")
        report.keys.append(meta.key)
        rows.append(tars.index_row(video, meta))
        report.faults.extend(f"{name}/{meta.key}: {fault}" for fault in _sample_faults(content, meta, rules))
        noting.add(len(content))
    return rows


def samples_of(file: Any, name: str, report: ShardReport) -> Iterator[tuple[Member, bytes, SampleMeta]]:
    """Samples of a tar; members without a partner, and the tar's own damage, become faults."""
    video: tuple[Member, bytes] | None = None
    try:
        for member, content in tars.read_members(file):
            if video and (member.suffix != shards.META_SUFFIX or member.key != video[0].key):
                report.faults.append(f"{name}/{video[0].key}: missing member, {video[0].suffix} without json")
                video = None
            if member.suffix != shards.META_SUFFIX:
                video = (member, content)
            elif video is None:
                report.faults.append(f"{name}/{member.key}: missing member, json without a video")
            else:
                meta = _meta(member, content, name, report)
                if meta:
                    yield *video, meta
                video = None
    except DataError as error:
        report.faults.append(f"{name}: {error}")
    if video:
        report.faults.append(f"{name}/{video[0].key}: missing member, {video[0].suffix} without json")


def _meta(member: Member, content: bytes, name: str, report: ShardReport) -> SampleMeta | None:
    try:
        meta = shards.parse_record(SampleMeta, content, f"{name}/{member.key}")
    except DataError as error:
        report.faults.append(str(error))
        return None
    if meta.key != member.key:
        report.faults.append(f"{name}/{member.key}: its json has the key {meta.key}")
    return meta.model_copy(update={"key": member.key})


def _sample_faults(content: bytes, meta: SampleMeta, rules: Rules) -> Iterator[str]:
    classes = rules.classes
    if meta.label is not None and not 0 <= meta.label < classes:
        yield f"label {meta.label} outside the list of {classes} classes (0 to {classes - 1})"
    if hashlib.sha256(content).hexdigest() != meta.sha256:
        yield "the video's bytes are altered, their sha256 is not that of its json"
    if not rules.decoding:
        return
    try:
        [(info, kept)] = decode.apart(transcode.looked_at, content, rules.form, seconds=decode.WHOLE_SECONDS)
    except DecodeError as error:
        yield f"undecodable video: {error}"
        return
    found, said = (info.frames, info.width, info.height), (meta.frames, meta.width, meta.height)
    if found != said:
        yield "frames, width, height are {} x {} x {}, its json says {} x {} x {}".format(*found, *said)
    if not kept:
        yield "the video is not in the form that the manifest says (short side, GOP, rate, H.264)"


def _index_faults(name: str, rows: list[IndexRow], expected: tuple[IndexRow, ...] | None) -> Iterator[str]:
    if expected is None:
        return
    found = {row.key: row for row in rows}
    for row in expected:
        if row.key not in found:
            yield f"{name}/{row.key}: in the index, not whole in the shard"
        elif row != found[row.key]:
            wrong = [field for field in IndexRow.model_fields if getattr(row, field) != getattr(found[row.key], field)]
            yield f"{name}/{row.key}: index wrong in {', '.join(wrong)}"
    for key in sorted(found.keys() - {row.key for row in expected}):
        yield f"{name}/{key}: not in the index"
