"""How long training stands still for a checkpoint of about 200 MB on a real S3 server: stored in the background, against waited for.

Both are saved by the same code, in turn; while one is stored in the background, steps go on and are timed beside steps without it.
"""

from __future__ import annotations

import statistics
import time

import pyarrow.fs as pafs
import pytest
import torch

from vidfuse.config import from_mapping
from vidfuse.data.batch import Batch
from vidfuse.data.sampling import World
from vidfuse.models.recognizer import frozen_digest
from vidfuse.on_ray.storage import open_storage
from vidfuse.train import checkpoint
from vidfuse.train.engine import build_engine, end_engine
from vidfuse.train.keeper import Keeper
from vidfuse.train.loss import cross_entropy
from vidfuse.train.model import model_of
from vidfuse.train.optim import parameter_groups
from vidfuse.train.shelf import Shelf
from vidfuse.train.step import train_step
from vidfuse.train.worker import LocalWorker

pytestmark = [pytest.mark.bench, pytest.mark.s3]
GOAL, REPEATS, STEPS = 0.75, 7, 6


def median(values):
    return statistics.median(values)


def test_a_checkpoint_stands_in_the_way_for_its_disk_only(s3, tmp_path):
    tree = {
        "data": {"classes": 12, "frames": 8, "size": 64},
        "model": {
            "semantic": {"name": "tiny_image", "frozen": True},
            "motion": {"name": "r3d", "stage": "layer3", "batch_norm": "frozen", "frozen": False},
            "fusion": {"name": "cross_attention", "width": 384},
        },
        "train": {"global_batch": 4, "micro_batch": 4, "precision": "fp32", "zero_stage": 2, "activation_checkpointing": False},
    }
    config = from_mapping(tree)
    train = config.train
    worker, world = LocalWorker(tmp_path / "run"), World(1, 0, train.global_batch, train.micro_batch)
    model = model_of(config)
    frozen = frozen_digest(model)
    engine = build_engine(model, parameter_groups(model), train, world, torch.device("cpu"))
    clips = torch.randint(0, 255, (4, 8, 3, 64, 64), dtype=torch.uint8)
    batch = Batch(clips, torch.arange(4), torch.ones(4), torch.arange(4))
    state = checkpoint.State(config.model_dump(mode="json"), "bench", "bench", frozen, 1)
    keeper = Keeper(Shelf(*open_storage(s3.url("bench"))), machine=worker.machine, in_place=False, publish=worker.publish)

    def step() -> float:
        start = time.perf_counter()
        train_step(engine, (batch,), train, world, loss=cross_entropy, seed=0, step=0, stop=False)
        return time.perf_counter() - start

    def save(*, wait: bool) -> float:
        start = time.perf_counter()
        keeper.save("step-00000001", lambda folder: checkpoint.save(engine, folder, state), {}, keep=1)
        if wait:
            keeper.settle()
        return time.perf_counter() - start

    step(), save(wait=True)
    folder = next(iter(keeper._shelf.names()))
    size = sum(listed.size for listed in keeper._shelf.contents(folder)[0].values())
    rows, alone, beside, behind = [], [], [], []
    for _ in range(REPEATS):
        alone += [step() for _ in range(STEPS)]
        stall, start = save(wait=False), time.perf_counter()
        while keeper._flight.thread.is_alive():
            beside.append(step())
        behind.append(time.perf_counter() - start)
        keeper.settle()
        rows.append((stall, save(wait=True)))
    keeper.close(at_most_seconds=60)
    end_engine(engine)
    ratios = [ours / waited for ours, waited in rows]
    print(
        f"\ncheckpoint of {size / 1e6:.0f} MB: stall {median(r[0] for r in rows):.2f} s, waited for {median(r[1] for r in rows):.2f} s"
    )
    print(f"ratio: median {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; goal {GOAL}")
    print(f"stored behind it in {median(behind):.2f} s; steps {median(alone):.3f} s alone, {median(beside):.3f} s beside it")
    assert isinstance(keeper._shelf.filesystem, pafs.S3FileSystem) and median(ratios) <= GOAL
