"""The loop under LocalWorker: early stopping, unreadable videos, a full disk, another config."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from jobs.cli import describe
from tests.train.local import Job, config, execute, losses, packed, pull, relist
from vidfuse.data.batch import SampleError
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.data.shards import DataError
from vidfuse.train.errors import CheckpointError
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker, read_checkpoints


def broken_pull(every: int):
    """`pull`, with every so-many-th training sample unreadable."""

    def pulled(reader, parts, rows):
        for columns in pull(reader, parts, rows):
            if parts[0].epoch is not None:
                bad = (columns["sample"] >= 0) & (columns["sample"] % every == 0)
                columns["weight"][bad] = 0
                columns["error"][bad] = [f"train-00000.tar\t{s}\tbroken" for s in columns["sample"][bad]]
            yield columns

    return pulled


def run_with(settings, folder, pulled):
    worker = LocalWorker(folder)
    feed = Feed(settings, packed(), World(1, 0, settings.train.global_batch, settings.train.micro_batch), pulled)
    return run(settings, worker, feed, folder=folder, facts={})


def test_it_stops_when_validation_gains_no_more(tmp_path):
    settings = config(train__epochs=12, train__learning_rate=1e-9, train__early_stopping_epochs=2)
    result = execute(Job(settings, tmp_path))
    assert result.state == "stopped_early" and result.values["epochs"] == 3  # the first sets the mark, two do not pass it


def test_unreadable_videos_are_counted_and_named(tmp_path):
    settings = config(data__unreadable_limit=0.2)
    run_with(settings, tmp_path, broken_pull(7))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["kind"] == "event"]
    assert [event["videos"] for event in events] == [3, 3]
    assert events[0]["names"] == ["train-00000.tar/0", "train-00000.tar/14", "train-00000.tar/7"]


def test_unreadable_videos_show_while_training_goes_on(tmp_path):
    settings = config(data__unreadable_limit=0.2)
    run_with(settings, tmp_path, broken_pull(7))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for epoch in range(settings.train.epochs):
        steps = [line for line in lines if line["kind"] == "train" and line["epoch"] == epoch]
        lost = [round(step["unreadable_share"] * min(step["samples"] - 21 * epoch, 21), 3) for step in steps]
        assert lost == sorted(lost) and lost[-1] == 3, "it grows inside an epoch and begins anew with the next"
        assert len(steps[-1]["unreadable_last"]) == 3 and steps[-1]["unreadable_last"][0].startswith("train-00000.tar/")
    event = {"epoch": 0, "epochs": 1, "step": 1, "steps": 2, "clips_per_second": 1.0, "data_wait_fraction": 0.0}
    assert "unreadable" not in describe("run", event | {"unreadable_share": 0.0, "unreadable_last": []})
    told = describe("run", event | {"unreadable_share": 0.0125, "unreadable_last": ["a.tar/b"]})
    assert told.endswith("unreadable 1.2 % (last a.tar/b)")


def test_too_many_unreadable_videos_end_the_run(tmp_path):
    with pytest.raises(DataError, match=r"3 of 21 training videos could not be read.*data\.unreadable_limit"):
        run_with(config(), tmp_path, broken_pull(7))


def test_too_many_end_it_at_its_next_checkpoint(tmp_path):
    with pytest.raises(DataError, match=r"^[2-8] of 21 training videos could not be read in epoch 0"):
        run_with(config(train__checkpoint_every_steps=1), tmp_path, broken_pull(2))


def test_an_error_is_shard_key_and_reason():
    assert SampleError(*["a.tar", "key", "why\tand more"]) == SampleError("a.tar", "key", "why\tand more")


def test_a_changed_config_is_refused(tmp_path):
    settings = config(train__epochs=1)
    execute(Job(settings, tmp_path))
    other = settings.model_copy(update={"train": settings.train.model_copy(update={"learning_rate": 0.5})})
    with pytest.raises(CheckpointError, match=r"train\.learning_rate"):
        execute(Job(other, tmp_path))


def test_more_epochs_go_on(tmp_path):
    execute(Job(config(train__epochs=1), tmp_path))
    execute(Job(config(train__epochs=2), tmp_path))
    assert len(losses(tmp_path)) == 6


def test_other_frozen_weights_are_refused(tmp_path):
    settings = config(train__epochs=1)
    execute(Job(settings, tmp_path))
    name = read_checkpoints(tmp_path)["last"]
    state = json.loads((tmp_path / name / "state.json").read_text())
    state["frozen"]["semantic"] = "0" * 64
    (tmp_path / name / "state.json").write_text(json.dumps(state))
    relist(tmp_path / name)
    with pytest.raises(CheckpointError, match="frozen semantic stream has other weights"):
        execute(Job(config(train__epochs=2), tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of a given size needs root")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr!r}")
    try:
        settings = config(train__epochs=1, model__motion={"name": "tiny_motion", "width": 32, "channels": 16, "frozen": False})
        execute(Job(settings, disk))
        good = read_checkpoints(disk)["last"]
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "filler").write_bytes(b"x" * max(left - 60_000, 0))
        with pytest.raises(CheckpointError, match="the one before is unharmed"):
            execute(Job(settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 2})}), disk))
        (disk / "filler").unlink()
        assert read_checkpoints(disk)["last"] == good
        assert (
            execute(Job(settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 2})}), disk)).state
            == "finished"
        )
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
