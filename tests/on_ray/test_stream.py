"""Every sample exactly once, through Ray Data from S3, for any number of workers; broken videos counted; memory bounded."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import ray
from ray._private.internal_api import memory_summary
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import STANDARD_RESOURCE_TYPES

from tests import support
from vidfuse.config import DataConfig, from_mapping
from vidfuse.data.clips import ClipReader, parts_of
from vidfuse.data.feed import Feed, PackedSet, read_here
from vidfuse.data.layouts import read_layout
from vidfuse.data.relay import relay
from vidfuse.data.sampling import World
from vidfuse.data.shards import read_index, read_manifest
from vidfuse.on_ray import stream as stream_module
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.storage import open_storage
from vidfuse.on_ray.stream import FAILED, ClipDatasource, pull_through_ray

pytestmark = [pytest.mark.ray, pytest.mark.s3]
TRAIN, VALIDATION = 29, 13  # divided by nothing


@pytest.fixture(scope="module")
def packed(s3, ray_cluster, tmp_path_factory) -> PackedSet:
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": TRAIN, "validation": VALIDATION})
    url = s3.url("stream")
    pack(prepare(read_layout(source, "ssv2"), source, url, 70_000))
    filesystem, root = open_storage(url)
    manifest = read_manifest(filesystem, root)
    assert len(manifest.splits["train"].shards) > 2
    return PackedSet(filesystem, root, manifest, {s: read_index(filesystem, root, s) for s in ("train", "validation")})


def feed_of(packed: PackedSet, size: int, rank: int, **data) -> Feed:
    tree = {
        "data": {"classes": 3, "frames": 4, "size": 32, "block_bytes": 40_000, "buffer_bytes": 4 * 2**20, "cpus_per_task": 0.5}
        | data,
        "train": {"global_batch": 12, "micro_batch": 2, "epochs": 3},
    }
    config = from_mapping(tree)
    pull = read_here if data.get("decoder") else pull_through_ray(config.data, workers=size)
    return Feed(config, packed, World(size, rank, 12, 2), pull)


@pytest.mark.parametrize(("workers", "block"), [(1, 1), (2, 1), (3, 1), (2, 4)])
def test_an_epoch_uses_every_sample_once_in_equal_steps(packed, workers, block):
    steps, used = set(), []
    for rank in range(workers):
        feed = feed_of(packed, workers, rank, shuffle_block=block)
        for epoch in (0, 1):
            count = 0
            for micro_batches in feed.train(epoch, feed.order(epoch)):
                count += 1
                assert len(micro_batches) == 12 // (2 * workers)
                for batch in micro_batches:
                    assert batch.clips.shape == (2, 4, 3, 32, 32)
                    assert ((batch.samples >= 0) == (batch.weights > 0)).all()
                    used += [(epoch, int(s)) for s in batch.samples if s >= 0]
            steps.add(count)
        feed.close()
    assert steps == {3}  # ceil(29 / 12)
    assert sorted(used) == [(epoch, sample) for epoch in (0, 1) for sample in range(TRAIN)]


@pytest.mark.parametrize("workers", [1, 2])
def test_streams_end_inside_of_epochs_and_lose_nothing(packed, workers, monkeypatch):
    """Pieces of an epoch and of several, in the order of one long stream."""
    order = {}
    for first, others in ((512, 2048), (1, 3)):
        monkeypatch.setattr("vidfuse.data.relay.FIRST_PARTS", first)
        monkeypatch.setattr("vidfuse.data.relay.PARTS_AT_ONCE", others)
        feeds = [feed_of(packed, workers, rank, decoder="pyav") for rank in range(workers)]
        order[first] = [
            batch.samples.tolist()
            for feed in feeds
            for epoch in range(3)
            for micro_batches in feed.train(epoch, feed.order(epoch))
            for batch in micro_batches
        ]
        for feed in feeds:
            feed.close()
    assert order[1] == order[512] and sum(s >= 0 for rows in order[1] for s in rows) == 3 * TRAIN


@pytest.mark.parametrize(("workers", "block"), [(1, 1), (2, 1), (3, 1), (2, 4), (3, 8)])
def test_scoring_sees_every_sample_once_with_all_its_views(packed, workers, block):
    batches = {
        rank: list(feed_of(packed, workers, rank, shuffle_block=block).score("validation", clips=2, crops=3, micro_batch=4))
        for rank in range(workers)
    }
    assert len({len(b) for b in batches.values()}) == 1
    seen = np.concatenate([b.samples.numpy() for part in batches.values() for b in part])
    assert np.array_equal(np.bincount(seen[seen >= 0], minlength=VALIDATION), np.full(VALIDATION, 6))


@pytest.mark.parametrize("repeats", [1, 3])
def test_ray_gives_what_this_process_reads(packed, repeats):
    here = list(feed_of(packed, 2, 1, decoder="pyav", repeats=repeats).train(0, feed_of(packed, 2, 1).order(0)))
    feed = feed_of(packed, 2, 1, repeats=repeats)
    there = list(feed.train(0, feed.order(0)))
    assert all(len(batch.samples) == 2 * repeats for step in there for batch in step)
    feed.close()
    for a, b in zip(here, there, strict=True):
        for x, y in zip(a, b, strict=True):
            assert (x.clips == y.clips).all() and (x.samples == y.samples).all() and (x.labels == y.labels).all()


def test_what_is_left_after_a_restart_is_streamed_and_nothing_else(packed):
    feed = feed_of(packed, 1, 0)
    order = feed.order(1)
    rest = [int(s) for step in feed.train(1, order[12:]) for b in step for s in b.samples if s >= 0]
    feed.close()
    assert rest == order[12:].tolist()


def test_order_and_draws_depend_on_the_epoch_and_the_seed_alone(packed):
    a, b = feed_of(packed, 1, 0), feed_of(packed, 3, 2)
    assert np.array_equal(a.order(4), b.order(4)) and not np.array_equal(a.order(4), a.order(5))


def test_a_broken_video_costs_its_own_rows(s3, ray_cluster, packed, tmp_path):
    """The bytes of one video are overwritten in its shard: its rows have weight 0 and a reason, the others are untouched."""
    index = packed.indices["validation"]
    victim = 5
    filesystem, root = open_storage(str(tmp_path))
    for shard in index.shards:
        content = bytearray(packed.filesystem.open_input_file(f"{packed.root}/{shard}").read())
        if shard == index.shards[index.shard[victim]]:
            start = int(index.offset[victim])
            content[start + 40 : start + int(index.size[victim])] = bytes(int(index.size[victim]) - 40)
        (tmp_path / shard).write_bytes(content)
    broken = PackedSet(filesystem, root, packed.manifest, packed.indices)
    batches = list(feed_of(broken, 1, 0).score("validation", clips=1, crops=1, micro_batch=4))
    weights = {int(s): float(w) for b in batches for s, w in zip(b.samples, b.weights, strict=True) if s >= 0}
    assert weights == {i: float(i != victim) for i in range(VALIDATION)}
    errors = [error for b in batches for error in b.errors]
    assert [(e.shard, e.key) for e in errors] == [(index.shards[index.shard[victim]], index.key[victim])]
    assert errors[0].reason


@dataclass(frozen=True)
class Stumbling(ClipReader):
    """Its first readings of each part fail as a storage does, or as a process that is killed."""

    marks: str = ""

    def read(self, part):
        mark = Path(self.marks) / str(int(part.videos[0].sample))
        before = len(mark.read_bytes()) if mark.exists() else 0
        mark.write_bytes(b"." * (before + 1))
        if before == 0:
            raise OSError("the storage went away")
        if before == 1:
            os._exit(1)
        return super().read(part)


def test_a_reading_task_that_fails_is_tried_again(packed, tmp_path):
    config = feed_of(packed, 1, 0).config
    reader = Stumbling(packed.filesystem, packed.root, config.data, 0, 1, 1, marks=str(tmp_path))
    parts = list(parts_of(packed.indices["train"], np.arange(8), 4, epoch=0))
    got = [columns["sample"] for columns in pull_through_ray(config.data, workers=1)(reader, parts, 4)]
    assert np.concatenate(got).tolist() == list(range(8))
    assert sorted(len(mark.read_bytes()) for mark in tmp_path.iterdir()) == [3, 3]


@dataclass(frozen=True)
class Losing(ClipReader):
    """Its first reading of the part that begins with sample 2 fails."""

    mark: str = ""

    def read(self, part):
        if part.videos[0].sample == 2 and not Path(self.mark).exists():
            Path(self.mark).touch()
            raise OSError("the storage went away")
        return super().read(part)


def datasource_of(reader: ClipReader, parts, block: int, **fields):
    """The dataset of some parts, and its blocks as lists of samples and of failed readings."""
    dataset = ray.data.read_datasource(ClipDatasource(reader, parts, **fields), override_num_blocks=len(parts), num_cpus=0.5)
    dataset.context.target_max_block_size, dataset.context.execution_options.preserve_order = block - 1, True
    dataset.context.retried_map_errors, dataset.context.max_map_retries = True, 2
    dataset.context.enable_progress_bars = False
    tables = [ray.get(ref) for bundle in dataset.iter_internal_ref_bundles() for ref in bundle.block_refs]
    return [table["sample"].to_pylist() for table in tables], [sum(table[FAILED].to_pylist()) for table in tables]


def test_a_task_of_several_parts_gives_a_block_of_each(packed):
    config = feed_of(packed, 1, 0).config
    reader = ClipReader(packed.filesystem, packed.root, config.data, 0)
    index = packed.indices["train"]
    parts = [*parts_of(index, np.arange(5), 2, epoch=0), *parts_of(index, np.arange(5, 10), 2, epoch=1)]
    for size, short, rows in ((4, 1, [2, 3, 5]), (2, 0, [4, 1, 4, 1])):  # a short part ends its task
        tasks = ClipDatasource(reader, parts, size=size, short=short).get_read_tasks(1)
        assert [task.metadata.num_rows for task in tasks] == rows
    blocks, _ = datasource_of(reader, parts, 2 * reader.row_bytes, size=4, short=1)
    assert blocks == [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9]]


def test_a_task_that_fails_at_a_later_part_gives_each_block_once_and_says_so(packed, tmp_path):
    config = feed_of(packed, 1, 0).config
    reader = Losing(packed.filesystem, packed.root, config.data, 0, mark=str(tmp_path / "mark"))
    parts = list(parts_of(packed.indices["train"], np.arange(6), 2, epoch=0))
    blocks, failed = datasource_of(reader, parts, 2 * reader.row_bytes, size=3)
    assert (tmp_path / "mark").exists()
    assert blocks == [[0, 1], [2, 3], [4, 5]] and failed == [0, 1, 0]


def test_tasks_and_blocks_are_long_where_a_stream_and_its_buffer_are(packed, monkeypatch):
    """Two CPUs run four tasks; the first of a stream are short, and a short stream or a buffer for few blocks shortens the others.

    A block has several parts, of one epoch, under the same conditions.
    """
    sizes: list[list[int]] = []
    tasks = ClipDatasource._tasks

    def seen(self):
        some = list(tasks(self))
        sizes[:] = [[len(part.videos) for part, _ in numbered] for numbered in some]
        return iter(some)

    monkeypatch.setattr(ClipDatasource, "_tasks", seen)
    samples = np.concatenate([np.arange(TRAIN)] * 12)
    for buffer_bytes, first, second, expected in (
        (4 * 2**20, 340, 0, [[5]] * 4 + [[5] * 4] * 16),
        (4 * 2**20, 171, 169, [[5]] * 4 + [[5] * 4] * 7 + [[5] * 2 + [1]] + [[5] * 4] * 8 + [[5, 4]]),
        (4 * 2**20, 36, 0, [[2]] * 18),
        (2**18, 36, 0, [[1]] * 36),
    ):
        data = feed_of(packed, 1, 0, buffer_bytes=buffer_bytes).config.data
        reader = ClipReader(packed.filesystem, packed.root, data, 0)
        index, count = packed.indices["train"], first + second
        parts = [*parts_of(index, samples[:first], 1, epoch=0), *parts_of(index, samples[first:count], 1, epoch=1)]
        got = [columns["sample"] for columns in pull_through_ray(data, workers=1)(reader, parts, 1)]
        assert np.concatenate(got).tolist() == samples[:count].tolist() and sizes == expected


def plasma_mib() -> float:
    found = re.search(
        r"Plasma memory usage (\d+) MiB", memory_summary(address=ray.get_runtime_context().gcs_address, stats_only=True)
    )
    assert found
    return float(found[1])


@pytest.mark.parametrize(("buffer", "parts_at_once", "seconds"), [(32, 1000, 0.05), (32, 30, 0.05), (200, 160, 0.02)])
def test_memory_is_bounded_with_four_times_as_much_data(packed, monkeypatch, buffer, parts_at_once, seconds):
    """A slow worker: what waits in the object store stays within `buffer_bytes`, though four times as much is to come.

    Also where streams follow each other, and two of them hold blocks for half of the time, and where blocks are of several parts.
    """
    for name in ("FIRST_PARTS", "PARTS_AT_ONCE"):
        monkeypatch.setattr(f"vidfuse.data.relay.{name}", parts_at_once)
    data = DataConfig(
        classes=3,
        frames=16,
        size=112,
        block_bytes=4 * 2**20,
        buffer_bytes=buffer * 2**20,
        cpus_per_task=0.5,
        prefetch_batches=1,
    )
    reader = ClipReader(packed.filesystem, packed.root, data, seed=0)
    samples = np.concatenate([np.arange(TRAIN)] * (1 + 4 * data.buffer_bytes // (TRAIN * reader.row_bytes)))
    parts = list(parts_of(packed.indices["train"], samples, 2, epoch=0))
    assert sum(len(p.videos) for p in parts) * reader.row_bytes > 4 * data.buffer_bytes
    before, most, rows = plasma_mib(), 0.0, 0
    for columns in relay(pull_through_ray(data, workers=1), reader, iter(parts), 2):
        rows += len(columns["sample"])
        time.sleep(seconds)
        most = max(most, plasma_mib() - before)
    print(f"most held: {most} of {data.buffer_bytes / 2**20} MiB")
    assert rows == len(samples)
    assert 0 < most <= data.buffer_bytes / 2**20, f"{most} MiB were held"


def test_a_stream_whose_buffer_is_full_leaves_cpus_to_others(packed):
    """Its tasks end, each with several blocks that nobody takes: those of another worker, of whom all wait for a batch, can run."""
    data = DataConfig(classes=3, frames=16, size=112, block_bytes=2**21, buffer_bytes=120 * 2**20, cpus_per_task=0.5)
    reader = ClipReader(packed.filesystem, packed.root, data, seed=0)
    parts = list(parts_of(packed.indices["train"], np.concatenate([np.arange(TRAIN)] * 8), 2, epoch=0))
    pull = pull_through_ray(data, workers=1)
    full = pull(reader, parts, 2)
    next(full)
    time.sleep(5)  # the buffer fills
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: sum(len(columns["sample"]) for columns in pull(reader, parts[:8], 2)))
        try:
            assert other.result(timeout=30) == 16
        finally:
            full.close()


@dataclass(frozen=True)
class Slow(ClipReader):
    """A storage that takes its time."""

    def read(self, part):
        time.sleep(0.3)
        return super().read(part)


@pytest.mark.parametrize(("workers", "tasks"), [(1, 4), (2, 2)])
def test_a_stream_has_its_share_of_the_cpus_though_another_asked_for_all(packed, workers, tasks):
    """As Ray Data's streams do once they are busy."""
    data = feed_of(packed, 1, 0).config.data
    reader = Slow(packed.filesystem, packed.root, data, 0)
    parts = list(parts_of(packed.indices["train"], np.arange(24), 1, epoch=0))
    other = get_or_create_autoscaling_coordinator()
    ray.get(other.request_resources.remote("busy", [{"CPU": 2.0}], 60.0, STANDARD_RESOURCE_TYPES))
    board = Mock(spec=Board)
    try:
        stream = pull_through_ray(data, workers=workers, board=board)(reader, parts, 1)
        assert sum(len(columns["sample"]) for columns in stream) == 24
    finally:
        ray.get(other.cancel_request.remote("busy"))
    assert max(call.args[1] for call in board.set.call_args_list if call.args[0] == "reading_tasks") == tasks


@pytest.mark.parametrize(
    ("tasks", "waiting", "seconds"), [(2, 0, 0.0), (2, 1, 0.01), (2, 5, 0.05), (2, 400, 0.2), (0, 0, 0.05), (0, 400, 0.2)]
)
def test_the_control_loop_rests_the_longer_the_more_blocks_wait(monkeypatch, tasks, waiting, seconds):
    rests = []
    monkeypatch.setattr(stream_module, "time", Mock(sleep=rests.append))  # of this module alone: other threads sleep, too
    policy, op = object.__new__(stream_module.Share), Mock()
    op.num_active_tasks.return_value = tasks
    policy._topology = {op: Mock(**{"output_queue.num_blocks": waiting, "total_enqueued_output_blocks.return_value": 400})}
    policy._data_context, policy._resource_manager = Mock(), Mock(**{"max_task_output_bytes_to_read.return_value": None})
    policy.max_task_output_bytes_to_read(op)
    assert rests == pytest.approx([seconds])


def test_a_full_buffer_costs_the_worker_no_time(packed):
    """While the worker is busy with a block, Ray Data's control loop, which runs in its process, rests."""
    data = DataConfig(classes=3, frames=16, size=112, block_bytes=2**21, buffer_bytes=32 * 2**20, cpus_per_task=0.5)
    reader = ClipReader(packed.filesystem, packed.root, data, seed=0)
    parts = list(parts_of(packed.indices["train"], np.concatenate([np.arange(TRAIN)] * 8), 2, epoch=0))
    stream = pull_through_ray(data, workers=1)(reader, parts, 2)
    next(stream)
    time.sleep(3)  # the buffer fills
    start = time.process_time()
    time.sleep(4)
    used = time.process_time() - start
    stream.close()
    time.sleep(1)  # Ray Data's threads end a moment after their stream; they must not outlive the cluster
    assert used < 1.0, f"{used:.2f} s of processor time in 4 s"
