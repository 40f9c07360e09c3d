"""Surveying: a packed set -> what it is and what is wrong with it, one Ray task a shard.

Comes in: a URL, thresholds, and a place for what comes out. Goes out, in that place:

    quality.json            the `Survey`: every figure, flag, duplicate and broken threshold
    quality.html            the same for reading
    shards/<sha256>-<frames>-<version>.parquet      one row a video (`data.quality.SCHEMA`), written as shards are done

A shard is streamed once. Its table is stored by what it is a function of, so that a report that was cut off, or is asked for again
with other thresholds, measures only what is not there yet, and shards that are missing or of another size by now; what else may have
happened to one since, `jobs.check` tells. The driver alone writes; it holds the rows of all videos without
their pictures (300 bytes each, five times that while they are judged), and a task holds one video and the small pictures of its shard.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs as pafs

from vidfuse.config import QualityConfig
from vidfuse.data import quality, shards
from vidfuse.data.quality import PICTURE
from vidfuse.data.shards import DataError, Manifest, ShardInfo
from vidfuse.data.survey import Survey, survey
from vidfuse.evaluate.quality_report import quality_report as page_of
from vidfuse.evaluate.quality_report import shown_videos
from vidfuse.on_ray import checking, storage
from vidfuse.on_ray.tasks import Noting, Progress, Teller, run_tasks

_MISSING = "the shard is missing"
_ALTERED = "altered, its sha256 is not the manifest's"
TABLES = "shards"
"""Folder of the rows below the report's place."""


@dataclass(frozen=True)
class Measured:
    """What a task found in a shard."""

    table: bytes
    """Parquet."""
    altered: bool
    """Whether the shard's bytes are not the manifest's, or it is missing; such a table is not stored."""


@dataclass(frozen=True)
class Place:
    """A packed set, opened, and where its report goes."""

    set_url: str
    """URL or absolute folder."""
    out: str
    manifest: Manifest
    quarantine: shards.Quarantine
    frames: int
    there: frozenset[str]
    """Names of the tables that are stored, of shards that have the manifest's size."""

    def table_name(self, shard: ShardInfo) -> str:
        """Of a shard's table."""
        return f"{shard.sha256}-{self.frames}-{quality.VERSION}.parquet"

    @property
    def measured(self) -> bool:
        """Whether no shard is left to be measured: Ray is not needed."""
        return all(self.table_name(shard) in self.there for info in self.manifest.splits.values() for shard in info.shards)


def prepare(url: str, out: str | None, frames: int) -> Place:
    """Open a set and check that its report can be written; needs no Ray.

    Args:
        url: Of the set.
        out: Folder or `s3://` URL of the report; `None`: `runs/quality/<name of the set>-<its version>`.
        frames: How many frames of a video to look at.

    Raises:
        DataError: no packed set there, or a number of frames that cannot be.
        StorageError: a place that cannot be read or written.
    """
    quality.check_frames(frames)
    manifest = checking.open_set(url)
    fs, root = storage.open_storage(url)
    try:
        content = storage.read_bytes(fs, storage.join(root, shards.QUARANTINE))
    except FileNotFoundError:
        raise DataError(f"{root}/{shards.QUARANTINE}: missing; run python -m jobs.check, pack the set again") from None
    quarantine = shards.parse_record(shards.Quarantine, content, shards.QUARANTINE)
    out = out or storage.join("runs", "quality", f"{PurePosixPath(url).name or 'set'}-{manifest.version}")
    storage.check_storage(out, write=True)
    out_fs, out_root = storage.open_storage(out)
    there = storage.list_files(out_fs, storage.join(out_root, TABLES))
    set_url = root if isinstance(fs, pafs.LocalFileSystem) else url
    place = Place(set_url, out, manifest, quarantine, frames, frozenset(there))
    sizes = storage.list_files(fs, root)
    other = (shard for info in manifest.splits.values() for shard in info.shards if sizes.get(shard.name) != shard.bytes)
    return replace(place, there=place.there - {place.table_name(shard) for shard in other})


def report(
    place: Place,
    config: QualityConfig,
    *,
    facts: Mapping[str, str],
    on_progress: Callable[[Progress], None] | None = None,
) -> Survey:
    """Measure what is not measured yet, judge the set, and write its report; Ray is running, unless all is measured.

    Args:
        place: What `prepare` gave.
        config: What counts as a flaw, and thresholds.
        facts: What else the reader must know: command, git revision.
        on_progress: Called after each shard, and every ten seconds between.

    Raises:
        DataError: an index that is missing or is not the manifest's.
    """
    tables, altered, unstored = _measure(place, on_progress)
    found = survey(tables, place.manifest, place.quarantine.videos, config, frames=place.frames, altered=altered)
    fs, root = storage.open_storage(place.out, write=True)
    storage.write_bytes(fs, storage.join(root, "quality.json"), shards.dump_record(found))
    content = found.model_dump(mode="json")
    page = page_of(content, pictures=_pictures(place, shown_videos(content), unstored), facts=facts)
    storage.write_bytes(fs, storage.join(root, "quality.html"), page.encode())
    return found


def lines(found: Survey) -> list[str]:
    """A survey in words, broken thresholds last."""
    kinds: dict[str, int] = {}
    for flag in found.flags:
        kinds[flag.kind] = kinds.get(flag.kind, 0) + 1
    flaws = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "no video is flagged"
    missing = {flag.shard for flag in found.flags if flag.reason == _MISSING}
    repeated = sum(len(group.keys) - 1 for group in found.repeats)
    return [
        *(f"{split}: {facts.samples} videos, {facts.hours:.2f} hours" for split, facts in found.splits.items()),
        f"{flaws}; {len(found.leaks)} duplicates across splits, {repeated} inside them",
        *(f"{name}: {_ALTERED if name not in missing else 'missing'}; run python -m jobs.check" for name in found.altered),
        *(broken.line for broken in found.broken),
    ]


def _measure(
    place: Place, on_progress: Callable[[Progress], None] | None
) -> tuple[dict[str, pa.Table], list[str], dict[str, bytes]]:
    """The rows of each split, shards that are altered, and the tables of these."""
    fs, root = storage.open_storage(place.out, write=True)
    found: dict[str, pa.Table] = {}
    altered: dict[str, bytes] = {}
    units: list[tuple[Any, ...]] = []
    listed = [shard for info in place.manifest.splits.values() for shard in info.shards]
    progress = Progress(sum(shard.bytes for shard in listed), sum(shard.samples for shard in listed))
    set_fs, set_root = storage.open_storage(place.set_url)
    for split, info in place.manifest.splits.items():
        index = shards.read_index(set_fs, set_root, split, manifest=place.manifest)
        for number, shard in enumerate(info.shards):
            name = place.table_name(shard)
            if name in place.there:
                path = storage.join(root, TABLES, name)
                found[shard.name] = _named(quality.load_table(storage.read_bytes(fs, path), path), shard.name)
                progress.add(shard.samples, shard.bytes, before=True)
                continue
            rows = np.flatnonzero(index.shard == number)
            expected = tuple(zip(index.key[rows].tolist(), index.label[rows].tolist(), strict=True))
            units.append((place.set_url, shard, expected, place.frames))
    for number, measured in _measured(units, progress, on_progress) if units else ():
        shard = units[number][1]
        if measured.altered:
            altered[shard.name] = measured.table
        else:
            storage.write_bytes(fs, storage.join(root, TABLES, place.table_name(shard)), measured.table)
        found[shard.name] = quality.load_table(measured.table)
    splits = {
        split: pa.concat_tables([found[shard.name] for shard in info.shards]) for split, info in place.manifest.splits.items()
    }
    return splits, sorted(altered), altered


def _measured(
    units: Sequence[tuple[Any, ...]], progress: Progress, on_progress: Callable[[Progress], None] | None
) -> Iterator[tuple[int, Measured]]:
    """What `run_tasks` gives, and how far it is told."""
    tell = Teller(progress, on_progress)
    names = [unit[1].name for unit in units]
    for number, measured in run_tasks(_measure_shard, [(*unit, tell.board) for unit in units], names=names, on_wait=tell):
        yield number, measured
        shard = units[number][1]
        progress.add(shard.samples, shard.bytes)
        tell(shard.name)


def _named(table: pa.Table, shard: str) -> pa.Table:
    """A stored table under the shard's name of now: the same bytes may have another one in another set."""
    return table.set_column(0, "shard", pa.array([shard] * len(table), pa.string()))


def _measure_shard(url: str, shard: ShardInfo, expected: tuple[tuple[str, int], ...], frames: int, board: Any) -> Measured:
    """The rows of a shard, also of videos that its damage hides; runs in a Ray task."""
    fs, root = storage.open_storage(url)
    walked = checking.ShardReport()
    noting = Noting(board, shard.name)
    rows: list[quality.Row] = []
    try:
        stream = fs.open_input_stream(storage.join(root, shard.name), buffer_size=checking.READ_BYTES)
    except FileNotFoundError:
        return _completed(rows, shard.name, expected, _MISSING, altered=True)
    with contextlib.closing(stream):
        hashed = checking.Hashed(stream)
        for _, content, meta in checking.samples_of(hashed, shard.name, walked):
            rows.append(quality.measure(shard.name, meta, content, frames))
            noting.add(len(content))
        hashed.drain()
    why = walked.faults[0] if walked.faults else "it is in the index and not in the shard"
    return _completed(rows, shard.name, expected, why, altered=hashed.hash.hexdigest() != shard.sha256)


def _completed(
    rows: list[quality.Row], shard: str, expected: tuple[tuple[str, int], ...], why: str, *, altered: bool
) -> Measured:
    seen = {row["key"] for row in rows}
    rows = rows + [quality.unread(shard, key, label, why) for key, label in expected if key not in seen]
    return Measured(quality.dump_table(quality.table(rows)), altered)


def _pictures(place: Place, wanted: Mapping[str, set[str]], unstored: Mapping[str, bytes]) -> dict[tuple[str, str], str]:
    """Small JPEGs in base64 of videos, by shard and key.

    Args:
        place: Of the report.
        wanted: Keys, by shard.
        unstored: Tables that were not stored, by shard.
    """
    fs, root = storage.open_storage(place.out)
    found: dict[tuple[str, str], str] = {}
    for info in place.manifest.splits.values():
        for shard in info.shards:
            if shard.name not in wanted:
                continue
            path = storage.join(root, TABLES, place.table_name(shard))
            table = quality.load_table(unstored.get(shard.name) or storage.read_bytes(fs, path), path, pictures=True)
            for key, picture in zip(table["key"].to_pylist(), table[PICTURE].to_pylist(), strict=True):
                if key in wanted[shard.name] and picture:
                    found[shard.name, key] = base64.b64encode(picture).decode()
    return found
