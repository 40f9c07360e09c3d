"""Training on repeated clips: the loss is the mean of all clips, and batches, steps and the ledger still count videos."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.train.local import Job, config, execute, losses, packed, pull, together
from tests.train.test_audit import audited
from vidfuse.config import override
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.on_ray import room
from vidfuse.train.loop import run
from vidfuse.train.model import model_of
from vidfuse.train.plan import activation_bytes, batch_lines, memory
from vidfuse.train.worker import LocalWorker

FP32 = 1e-4
THREE = {"data__repeats": 3}


def far(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) == 6  # 21 videos, batches of 8: three steps an epoch, two epochs
    return max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))


def run_with(settings, folder, pulled):
    worker = LocalWorker(folder)
    feed = Feed(settings, packed(), World(1, 0, settings.train.global_batch, settings.train.micro_batch), pulled)
    return run(settings, worker, feed, folder=folder, facts={})


def same_clips(reader, parts, rows):
    """`pull`, with each video's first clip in place of all of its repeats."""
    repeats = reader.views(parts[0].epoch)
    for columns in pull(reader, parts, rows):
        first = np.arange(len(columns["sample"])) // repeats * repeats
        yield {name: values[first] for name, values in columns.items()}


def test_equal_repeats_are_no_repeats(tmp_path):
    """The mean of three equal clips is one clip: neither the loss nor the step grows with the repeats, padding included."""
    execute(Job(config(), tmp_path / "one"))
    run_with(config(**THREE), tmp_path / "three", same_clips)
    assert far(losses(tmp_path / "one"), losses(tmp_path / "three")) < FP32


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, execute(Job(config(**THREE), folder))


def test_videos_are_counted_and_clips_are_timed(alone):
    folder, result = alone
    assert audited(folder).exact  # though each video gave three clips, it was used once an epoch
    assert (result.values["steps"], result.values["samples"]) == (6, 42)
    steps = result.values["clips_per_second"] * result.values["step_seconds"]
    assert steps == pytest.approx(8 * 3, rel=0.02)  # both figures are rounded


def test_other_clips_are_another_training(alone, tmp_path):
    execute(Job(config(), tmp_path))
    assert far(losses(tmp_path), losses(alone[0])) > FP32


def test_two_workers_are_one_and_resumed_is_unbroken(alone, tmp_path):
    settings = config(**THREE)
    broken = override(settings, ["train.checkpoint_every_steps=2"])
    cut = [Job(broken, tmp_path / "broken", crash_after=5), Job(broken, tmp_path / "broken")]
    together([Job(settings, tmp_path / "two"), *cut], 2)
    assert far(losses(alone[0]), losses(tmp_path / "two")) < FP32
    assert losses(tmp_path / "broken") == losses(tmp_path / "two")
    state = json.loads((tmp_path / "broken" / "checkpoints.json").read_text())
    assert state["last"].startswith("step-00000006-") and audited(tmp_path / "broken").exact


def test_the_plan_counts_the_clips():
    one, three = config(), config(**THREE)
    with torch.device("meta"):
        model = model_of(one)
    assert memory(three, model, 1).clips == 3 * memory(one, model, 1).clips
    assert activation_bytes(three, model) > 2 * activation_bytes(one, model)
    assert batch_lines(three, range(1, 2)) == ["1 workers: micro batch 4 x accumulation 2 x 1 = 8 videos, 24 clips"]
    assert batch_lines(one, range(1, 2)) == ["1 workers: micro batch 4 x accumulation 2 x 1 = 8"]


def test_a_buffer_must_hold_the_repeats():
    needed = 8 * 4 * 4 * 32**2 * 3  # blocks x micro batch x frames x size x size x colours
    room.check_buffer(config(data__buffer_bytes=needed), 1)
    with pytest.raises(ValueError, match=rf"micro batches of 12 clips.*at least {3 * needed:,} .*data\.repeats"):
        room.check_buffer(config(data__buffer_bytes=needed, **THREE), 1)
