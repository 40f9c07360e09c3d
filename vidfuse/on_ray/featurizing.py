"""Making caches of frozen streams' tokens: Ray Data reads and decodes clips, actors run the streams, tasks write parts.

Comes in: a config, its packed set and the caches that are missing. Goes out: parts with their records, and each cache's manifest last.
What was written stays: made again after a crash, or after parts were removed, only those that are not there are computed.

A clip is decoded once for all streams. Memory: blocks of clips wait in the object store within `data.buffer_bytes`; a writing task
holds one part.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy, ExecutionResources

from vidfuse.config import Config
from vidfuse.data.clips import ClipReader, Part, parts_of
from vidfuse.data.features import (
    BITS,
    CHECKS,
    MANIFEST,
    NAN,
    PART_VIDEOS,
    FeatureManifest,
    PartRecord,
    encode_checks,
    encode_part,
    part_name,
    parts_of_draw,
    row_checks,
)
from vidfuse.data.feed import PackedSet
from vidfuse.data.flips import mirrored_classes
from vidfuse.data.sampling import PADDING
from vidfuse.data.shards import DataError, dump_record, parse_record
from vidfuse.models.parts import Tokens
from vidfuse.models.recognizer import Recognizer
from vidfuse.on_ray.features import Cache, find, lost, shapes
from vidfuse.on_ray.storage import StorageError, join, list_files, open_storage, read_bytes, told_when_full, write_bytes
from vidfuse.on_ray.stream import RETRIES, ClipDatasource
from vidfuse.on_ray.tasks import Progress
from vidfuse.on_ray.waiting import Asked, wait_for_room
from vidfuse.on_ray.weights import local
from vidfuse.train.model import DTYPES, started

TELL_SECONDS = 5.0
"""Between two words on how far it is."""


@dataclass(frozen=True)
class Job:
    """Caches of one split that are made together."""

    caches: tuple[Cache, ...]
    samples: int
    draws: int
    precision: Any

    @property
    def parts(self) -> int:
        """Parts of each cache."""
        return self.draws * parts_of_draw(self.samples)


def compute(
    config: Config, packed: PackedSet, model: Recognizer, caches: Sequence[Cache], on_progress: Callable[[Progress], None]
) -> None:
    """Make caches; Ray is running.

    Args:
        config: of the run.
        packed: its packed set.
        model: of the config, on the meta device.
        caches: what is to be made.
        on_progress: is called now and then, and at the end.

    Raises:
        DataError: a stream gives numbers that are not finite.
        StorageError: the place cannot be written.
    """
    tokens = shapes(config, model)
    jobs = []
    for split in dict.fromkeys(cache.recipe.split for cache in caches):
        mine = tuple(cache for cache in caches if cache.recipe.split == split and find(cache) is None)
        draws = (config.data.views or 1) if split == config.data.train_split else 1
        if mine:
            jobs.append(Job(mine, len(packed.indices[split]), draws, config.features.precision))
    sizes = [sum(_row_bytes(tokens[c.recipe.stream].values.shape, config) for c in job.caches) for job in jobs]
    videos = [job.samples * job.draws for job in jobs]
    progress = Progress(sum(n * size for n, size in zip(videos, sizes, strict=True)), sum(videos))
    told = 0.0
    for job, size in zip(jobs, sizes, strict=True):
        records = [_records(cache) for cache in job.caches]
        todo = [n for n in range(job.parts) if any(n not in of for of in records)]
        before = sum(_videos_of(job, n) for n in range(job.parts)) - sum(_videos_of(job, n) for n in todo)
        progress.videos += before
        progress.bytes += before * size
        progress.bytes_before += before * size
        for number, written in _make(config, packed, job, todo):
            for of, record in zip(records, written, strict=True):
                of[number] = record
            progress.videos += _videos_of(job, number)
            progress.bytes += _videos_of(job, number) * size
            progress.quarantined += len(written[0].unreadable)
            if progress.videos == progress.videos_total or time.monotonic() - told >= TELL_SECONDS:
                told = time.monotonic()
                on_progress(progress)
        for cache, of in zip(job.caches, records, strict=True):
            _finish(cache, job, tokens[cache.recipe.stream], of)


def _row_bytes(shape: Sequence[int], config: Config) -> int:
    return int(np.prod(shape[-2:])) * np.dtype(BITS[config.features.precision]).itemsize


def _videos_of(job: Job, number: int) -> int:
    start = number % parts_of_draw(job.samples) * PART_VIDEOS
    return min(PART_VIDEOS, job.samples - start)


def _records(cache: Cache) -> dict[int, PartRecord]:
    """Parts that an earlier try completed. A manifest that names more goes: it would be that of other rows until the last part is made."""
    filesystem, root = open_storage(cache.url, write=True)
    found = list_files(filesystem, root)
    if MANIFEST in found:
        filesystem.delete_file(join(root, MANIFEST))
    records = {}
    for name in found:
        if name.endswith(".json") and name != MANIFEST:
            record = parse_record(PartRecord, read_bytes(filesystem, join(root, name)), f"{cache.url}/{name}")
            if found.get(record.name) == record.bytes:
                records[int(name.removesuffix(".json").rpartition("-")[2])] = record
    return records


def _make(config: Config, packed: PackedSet, job: Job, todo: Sequence[int]) -> Iterator[tuple[int, tuple[PartRecord, ...]]]:
    """Compute and write parts; their numbers and the records of each cache, as they come."""
    if not todo:
        return
    split = job.caches[0].recipe.split
    training = split == config.data.train_split
    data = config.data.model_copy(update={"repeats": 1})
    mirrored = mirrored_classes(packed.manifest.classes, data.flip)
    reader = ClipReader(packed.filesystem, packed.root, data, config.seed, mirrored=mirrored)
    parts: list[Part] = []
    for number in todo:
        draw, start = divmod(number, parts_of_draw(job.samples))
        samples = np.full(PART_VIDEOS, PADDING, np.int64)
        samples[: _videos_of(job, number)] = np.arange(_videos_of(job, number)) + start * PART_VIDEOS
        parts += parts_of(packed.indices[split], samples, PART_VIDEOS, epoch=draw if training else None)
    cluster = ray.cluster_resources()
    gpus = int(cluster.get("GPU", 0))
    actors = gpus or max(1, int(cluster.get("CPU", 1)) // 2)
    block = PART_VIDEOS * reader.row_bytes
    wait_for_room(Asked(1, 1.0, float(gpus > 0)))
    dataset = (
        ray.data.read_datasource(
            ClipDatasource(reader, parts, todo),
            concurrency=min(max(data.buffer_bytes // (3 * block), 2), len(parts)),
            override_num_blocks=len(parts),
            num_cpus=data.cpus_per_task,
        )
        .map_batches(
            _Streams,
            fn_constructor_args=(config.model_dump(mode="json"), [cache.recipe.stream for cache in job.caches]),
            batch_size=None,
            zero_copy_batch=True,
            compute=ActorPoolStrategy(min_size=1, max_size=actors),
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        .map_batches(_Write(job), batch_size=None, zero_copy_batch=True, num_cpus=data.cpus_per_task)
    )
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = dataset.context
    context.enable_progress_bars = False
    context.issue_detectors_config.detectors = []  # it takes an actor's model for a leak
    context.retried_map_errors, context.max_map_retries = True, RETRIES
    context.target_max_block_size = max(context.target_max_block_size or 0, 2 * block)
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=max(data.buffer_bytes // 4, 4 * block))
    for row in dataset.iter_rows():
        if row["fault"]:
            raise DataError(row["fault"])
        yield int(row["part"]), tuple(parse_record(PartRecord, text.encode(), "a part") for text in json.loads(row["records"]))


class _Streams:
    """An actor that runs streams over blocks of clips."""

    def __init__(self, tree: dict[str, Any], names: Sequence[str]) -> None:
        config = Config.model_validate(tree)
        self.config, self.names = config, names
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = started(config, local)[0].eval()
        autocast = config.train.precision == "bf16" and config.train.zero_stage == 0  # as training does it
        self.model.to(self.device, torch.float32 if autocast else DTYPES[config.train.precision])
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)

    def __call__(self, block: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        clips = torch.from_numpy(block["clip"]).permute(0, 1, 4, 2, 3)
        columns = {column: block[column] for column in ("part", "error")}
        with self.autocast:
            made = {f"tokens.{name}": self._tokens(name, clips, block) for name in self.names}
        faults = [fault for _, fault in made.values() if fault]  # raised, Ray Data would try again and again
        columns["fault"] = np.full(len(clips), faults[0] if faults else "", object)
        return columns | {column: bits for column, (bits, _) in made.items()}

    def _tokens(self, name: str, clips: torch.Tensor, block: dict[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], str]:
        """Bit patterns of a block, and what is wrong with them."""
        precision = self.config.features.precision
        parts = [
            self.model.tokens(name, some.to(self.device)).values.to(DTYPES[precision]).cpu()
            for some in clips.split(self.config.train.micro_batch)
        ]
        values = torch.cat(parts)
        lost = torch.from_numpy(block["weight"] == 0)
        strange = ~torch.isfinite(values.float()).flatten(1).all(1) & ~lost
        fault = ""
        if strange.any():
            sample = int(block["sample"][int(strange.nonzero()[0])])
            fault = f"the {name} stream gives numbers that are not finite for sample {sample}; check its weights, or try train.precision=fp32"
        bits = values.view(torch.int16 if precision == "bf16" else torch.int32).numpy().view(BITS[precision])
        bits[lost.numpy()] = NAN[precision]
        return bits, fault


@dataclass(frozen=True)
class _Write:
    """What a writing task does: a part of each cache, then its record."""

    job: Job

    def __call__(self, block: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        number = int(block["part"][0])
        if len(block["part"]) != PART_VIDEOS or (block["part"] != number).any():
            raise RuntimeError(
                f"part {number} came as {len(block['part'])} rows of parts {sorted(set(block['part'].tolist()))}"
            )
        fault, records = str(block["fault"][0]), []
        try:
            records = [] if fault else [self._write(cache, number, block) for cache in self.job.caches]
        except StorageError as error:
            fault = str(error)
        return {"part": np.array([number]), "records": np.array([json.dumps(records)], object), "fault": np.array([fault])}

    def _write(self, cache: Cache, number: int, block: dict[str, npt.NDArray[Any]]) -> str:
        filesystem, root = open_storage(cache.url, write=True)
        bits = np.ascontiguousarray(block[f"tokens.{cache.recipe.stream}"])
        content, _ = encode_part(bits, self.job.precision)
        name = f"{part_name(number)}.safetensors"
        record = PartRecord(
            name=name,
            bytes=len(content),
            checks=tuple(row_checks(bits.data, len(bits))),
            unreadable={row: str(reason) for row, reason in enumerate(block["error"]) if reason},
        )
        with told_when_full(cache.url, " or raise the quota"):
            write_bytes(filesystem, join(root, name), content)
            write_bytes(filesystem, join(root, f"{part_name(number)}.json"), dump_record(record))
        return dump_record(record).decode()


def _finish(cache: Cache, job: Job, tokens: Tokens, records: dict[int, PartRecord]) -> None:
    """Write the manifest, when all parts are there."""
    filesystem, root = open_storage(cache.url)
    _, count, width = tokens.values.shape
    empty = np.zeros((PART_VIDEOS, count, width), BITS[job.precision])
    parts = [records[number] for number in range(job.parts)]
    checks = encode_checks(parts)
    manifest = FeatureManifest(
        recipe=cache.recipe,
        samples=job.samples,
        draws=job.draws,
        views=1,
        tokens=count,
        width=width,
        precision=job.precision,
        positions=tuple((t, y, x) for t, y, x in tokens.positions.tolist()),
        header_bytes=encode_part(empty, job.precision)[1],
        checks=zlib.crc32(checks),
        parts=tuple(part.model_copy(update={"unreadable": {}, "checks": ()}) for part in parts),
    )
    write_bytes(filesystem, join(root, CHECKS), checks)
    absent = lost(filesystem, root, manifest)
    if absent:
        raise DataError(
            f"{cache.url}: {absent[0]} was written by a worker and is not there as seen from here; every machine of the cluster has to see "
            "the same folder: give an s3:// URL or a shared folder as features.url"
        )
    write_bytes(filesystem, join(root, MANIFEST), dump_record(manifest))
