"""Runs on a cluster of several raylets that loses and gains nodes: they go on, and every sample is used exactly once."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from tests import support
from tests.raylets import Training, nodes
from tests.train.local import CrashError, CrashingFeed, losses
from vidfuse.config import Config, from_mapping, override
from vidfuse.data.feed import read_here
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World
from vidfuse.on_ray import preflight
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker

pytestmark = [pytest.mark.ray, pytest.mark.s3]
TRAIN, VALIDATION = 61, 6
LOSS = 1e-4  # relative, fp32 on one worker and on two


@pytest.fixture(scope="module")
def config(s3, ray_cluster, tmp_path_factory) -> Config:
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": TRAIN, "validation": VALIDATION})
    url = s3.url("elastic")
    pack(prepare(read_layout(source, "ssv2"), source, url, 70_000))
    tree = {
        "data": {"url": url, "classes": 3, "frames": 4, "size": 32, "block_bytes": 60_000, "buffer_bytes": 2**22},
        "model": {"semantic": {"name": "tiny_image"}, "motion": {"name": "tiny_motion", "frozen": False}},
        "train": {
            "epochs": 500,
            "global_batch": 8,
            "micro_batch": 4,
            "precision": "fp32",
            "zero_stage": 2,
            "log_every_steps": 1,
            "checkpoint_every_steps": 3,
            "validate_every_epochs": 100,
        },
        "cluster": {"workers": (1, 2), "cpus_per_worker": 0.6, "resize_seconds": 2, "max_failures": 10},
        "run": {"storage": s3.url("runs")},
    }
    tree["data"]["cpus_per_task"] = 0.2
    return from_mapping(tree)


@pytest.fixture(scope="module")
def cluster(s3, config):
    with nodes(2, s3.environment) as made:
        yield made


def unbroken(config: Config, steps: int, folder: Path) -> list[float]:
    """The losses of the first steps of the same run in this process."""
    settings = override(config, ["cluster.workers=1"])
    feed = CrashingFeed(settings, preflight.open_set(settings), World(1, 0, 8, 4), read_here)
    feed.crash_after = steps
    with contextlib.suppress(CrashError):
        run(settings, LocalWorker(folder), feed, folder=folder, facts={})
    return losses(folder)


@pytest.mark.slow
def test_prepared_processes_take_over(cluster, config, tmp_path):
    """New workers are the processes that stood by on their nodes, and others stand by in their place: as many, no more."""
    with Training(override(config, ["run.name=standby"]), cluster.address, tmp_path) as training:
        for number in (1, 2):
            training.wait_for_step(3 * number, tries=number, workers=2)
            ready = {
                node: training.wait_for("one that stands by", lambda _, n=node: cluster.standing_by(n))
                for node in cluster.nodes
            }
            assert all(len(pids) == 1 for pids in ready.values())
            cluster.kill_worker(cluster.nodes[0])
            training.wait_for(
                "the next try", lambda entries, n=number: entries[-1]["try"] > n and entries[-1]["kind"] != "start"
            )
            assert {node: [worker.pid for worker in cluster.workers(node)] for node in cluster.nodes} == ready
        training.stop()
        training.end()


def test_a_run_shrinks_when_a_node_dies_grows_when_one_comes_and_loses_nothing(cluster, config, tmp_path):
    with Training(override(config, ["run.name=elastic"]), cluster.address, tmp_path) as training:
        training.wait_for_step(4)
        cluster.kill(cluster.nodes[0])
        training.wait_for_step(5, tries=2, workers=1)
        training.wait_for_checkpoint()
        cluster.add()
        training.wait_for_step(6, tries=3, workers=2)
        training.stop()
        result = training.end()
    found = training.audit()
    print("\n".join(found.lines()))
    assert result["state"] == "stopped" and found.exact
    finished = [epoch for epoch in found.epochs if epoch.closed]
    assert finished and all(epoch.once == TRAIN for epoch in finished)
    assert [span.workers for span in found.spans] == [2, 1, 2]
    assert [(gap.before, gap.after, gap.planned) for gap in found.interruptions] == [(2, 1, False), (1, 2, False)]
    broken = training.losses()
    assert len(broken) == result["steps"]
    whole = unbroken(config, len(broken), tmp_path / "whole")
    assert max(abs(a - b) / abs(b) for a, b in zip(broken, whole, strict=True)) < LOSS
