"""Runs of the loop without Ray, on clips made in memory: for tests of what must not alter numbers."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist

from tests import support
from vidfuse.config import Config, from_mapping
from vidfuse.data.clips import ClipReader, Columns, Part
from vidfuse.data.draws import Draws
from vidfuse.data.feed import Feed, PackedSet
from vidfuse.data.sampling import World, generator
from vidfuse.data.shards import Manifest, ShardInfo, SplitIndex, SplitInfo
from vidfuse.train.loop import Result, run
from vidfuse.train.record import read_metrics
from vidfuse.train.shelf import Shelf
from vidfuse.train.worker import LocalWorker

CLASSES = 4


def config(**changes: Any) -> Config:
    """A small dual-stream run with a frozen part; `changes` are `section__field=value`."""
    tree: dict[str, Any] = {
        "seed": 3,
        "data": {"classes": CLASSES, "frames": 4, "size": 32, "buffer_bytes": 10**8},
        "model": {
            "semantic": {"name": "tiny_image", "frozen": True},
            "motion": {"name": "tiny_motion", "frozen": False},
            "fusion": {"name": "cross_attention", "width": 32, "heads": 4, "dropout": 0.0},
        },
        "train": {
            "epochs": 2,
            "global_batch": 8,
            "micro_batch": 4,
            "learning_rate": 3e-3,
            "warmup_epochs": 0.5,
            "precision": "fp32",
            "zero_stage": 0,
            "activation_checkpointing": False,
            "log_every_steps": 1,
        },
        "run": {"name": "test"},
    }
    for path, value in changes.items():
        section, field = path.split("__")
        tree[section][field] = value
    return from_mapping(tree)


def packed(train: int = 21, validation: int = 10) -> PackedSet:
    """A packed set in name only: `pull` makes its clips."""

    def index(split: str, count: int) -> SplitIndex:
        ints = {n: np.zeros(count, np.int64) for n in ("offset", "size", "frames", "width", "height")}
        names = (f"{split}-00000.tar", f"{split}-00001.tar")
        return SplitIndex(
            shards=names,
            shard=(np.arange(count) >= count // 2).astype(np.int32),
            key=np.array([f"{split}{i}" for i in range(count)], object),
            label=(np.arange(count) % CLASSES).astype(np.int32),
            suffix=np.array(["mp4"] * count, object),
            sha256=np.zeros((count, 32), np.uint8),
            **ints,
        )

    def split(name: str, count: int) -> SplitInfo:
        sizes = (count // 2, count - count // 2)
        shards = tuple(ShardInfo(name=f"{name}-0000{i}.tar", samples=n, bytes=1, sha256="") for i, n in enumerate(sizes))
        return SplitInfo(samples=count, bytes=2, index="", index_sha256="", shards=shards)

    counts = {"train": train, "validation": validation}
    manifest = Manifest(
        dataset="memory",
        classes=tuple(f"class {i}" for i in range(CLASSES)),
        splits={name: split(name, count) for name, count in counts.items()},
        quarantined=0,
        plan="memory",
        recipe=support.RECIPE,
    )
    return PackedSet(None, "memory", manifest, {name: index(name, count) for name, count in counts.items()})


def pull(reader: ClipReader, parts: Sequence[Part], rows: int) -> Iterator[Columns]:
    """Clips that are a pure function of (epoch, sample, repeat), with the class in a moving pattern."""
    shape = (reader.data.frames, reader.data.size, reader.data.size, 3)
    waiting: list[Any] = [(p.epoch, video, n) for p in parts for video in p.videos for n in range(reader.views(p.epoch))]
    for start in range(0, len(waiting), rows):
        some = waiting[start : start + rows]
        clips = np.zeros((len(some), *shape), np.uint8)
        for row, (epoch, video, repeat) in enumerate(some):
            if video is not None:
                draw = (repeat,) if repeat else ()
                rng = generator(reader.seed, -1 if epoch is None else epoch, video.sample, *draw)
                texture = rng.integers(0, 255, shape[1:], np.uint8)
                step = (video.label - 1.5) * 2
                clips[row] = np.stack([np.roll(texture, int(step * t), axis=1) for t in range(shape[0])])
        yield {
            "clip": clips,
            "label": np.array([v.label if v else -1 for _, v, _ in some], np.int64),
            "weight": np.array([v is not None for _, v, _ in some], np.float32),
            "sample": np.array([v.sample if v else -1 for _, v, _ in some], np.int64),
            "error": np.full(len(some), "", object),
        }


@dataclass(frozen=True)
class Job:
    """One run: a config, its folder, and after how many steps it is cut off (as by a crash)."""

    config: Config
    folder: Path
    train: int = 21
    crash_after: int | None = None
    draws: Draws = field(default_factory=Draws)


class CrashError(Exception):
    """Stands for a machine that is gone."""


class CrashingFeed(Feed):
    """A feed that ends the run after some steps."""

    crash_after: int | None = None

    def train(self, epoch, left):  # type: ignore[no-untyped-def]
        for step in super().train(epoch, left):
            if self.crash_after is not None:
                self.crash_after -= 1
                if self.crash_after < 0:
                    raise CrashError
            yield step


def execute(job: Job) -> Result | None:
    """Run a job in this process (a rank of the process group, if there is one); its page is not drawn, which takes seconds."""
    torch.set_num_threads(1)
    worker = LocalWorker(job.folder)
    train = job.config.train
    world = World(worker.world_size, worker.rank, train.global_batch, train.micro_batch)
    feed = CrashingFeed(job.config, replace(packed(job.train), draws=job.draws), world, pull)
    feed.crash_after = job.crash_after
    try:
        with mock.patch("vidfuse.evaluate.report.report", return_value=""):
            return run(job.config, worker, feed, folder=job.folder, facts={"git_revision": "test"})
    except CrashError:
        return None


@functools.cache
def _ranks(world_size: int) -> list[ProcessPoolExecutor]:
    """The processes of a gloo group, each of which takes its jobs in order. They stay: starting them takes seconds."""
    store = f"{tempfile.mkdtemp(prefix='vidfuse-ranks-')}/store"
    spawn = get_context("spawn")
    return [ProcessPoolExecutor(1, spawn, _join, (store, rank, world_size)) for rank in range(world_size)]


def _join(store: str, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)


def _execute_all(jobs: Sequence[Job]) -> list[Any]:
    return [execute(job) for job in jobs]


def together(jobs: Sequence[Job], world_size: int) -> list[Any]:
    """Run jobs one after the other on `world_size` gloo processes; rank 0's results."""
    ranks = _ranks(world_size)
    waiting = [rank.submit(_execute_all, list(jobs)) for rank in ranks]
    done, _ = wait(waiting, return_when=FIRST_EXCEPTION)
    if any(ended.exception() for ended in done):  # the others wait for it
        _ranks.cache_clear()
        for rank in ranks:
            for process in list(rank._processes.values()):
                process.kill()
        next(ended for ended in done if ended.exception()).result()
    return waiting[0].result()


def losses(folder: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def relist(folder: Path) -> None:
    """Write the list of a local checkpoint anew, for one whose files were changed on purpose."""
    shelf = Shelf(pafs.LocalFileSystem(), str(folder.parent))
    shelf.close(folder.name, shelf.listed_in_place(folder.name), shelf.contents(folder.name)[1])
