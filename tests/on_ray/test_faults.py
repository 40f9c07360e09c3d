"""Faults on a real cluster of several raylets with a real S3 server; after each, every sample of an epoch was used exactly once."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tests.cluster import Training, nodes
from vidfuse.config import Config, from_mapping, override
from vidfuse.data.shards import read_index, read_manifest
from vidfuse.on_ray.storage import join, open_storage, read_bytes, write_bytes

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(2400)]
TRAIN = 96
CORRUPT = 17
OUTAGE_SECONDS = 20


class Store:
    """An S3 server of this module's own, which can be killed and started again with its objects and on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        self.server = self._stack.enter_context(support.object_store(folder))

    def outage(self, seconds: float) -> None:
        """Kill the server, and start it again after some seconds."""
        port = int(self.server.endpoint.rpartition(":")[2])
        os.kill(self.server.pid, 9)
        self.server.program.wait(20)
        time.sleep(seconds)
        self.server = self._stack.enter_context(support.object_store(self._folder, port=port))

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Iterator[Store]:
    made = Store(tmp_path_factory.mktemp("faults-s3"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in made.server.environment.items():
            patch.setenv(name, value)
        yield made
    made.close()


@pytest.fixture(scope="module")
def config(store, tmp_path_factory) -> Config:
    """A run over a set of which one video in 96 is corrupt in its shard."""
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": TRAIN, "validation": 6})
    url = store.server.url("faults")
    done = support.run_job("pack", str(source), url, **store.server.environment)
    assert done.returncode == 0, done.stderr
    corrupt(url, CORRUPT)
    data = {
        "url": url,
        "classes": 3,
        "frames": 4,
        "size": 32,
        "block_bytes": 60_000,
        "buffer_bytes": 2**23,
        "cpus_per_task": 0.2,
    }
    train = {
        "epochs": 1000,
        "global_batch": 12,
        "micro_batch": 2,
        "zero_stage": 2,
        "checkpoint_every_steps": 5,
        "validate_every_epochs": 1000,
    }
    cluster = {"workers": (1, 3), "cpus_per_worker": 0.6, "resize_seconds": 5, "max_failures": -1}
    return from_mapping(
        {"data": data, "train": train, "cluster": cluster, "run": {"storage": store.server.url("runs"), "name": "faults"}}
    )


def corrupt(url: str, sample: int) -> None:
    """Overwrite the inside of one training video in its shard."""
    filesystem, root = open_storage(url)
    index = read_index(filesystem, root, "train", manifest=read_manifest(filesystem, root))
    shard = join(root, index.shards[index.shard[sample]])
    content = bytearray(read_bytes(filesystem, shard))
    start, size = int(index.offset[sample]), int(index.size[sample])
    content[start + 40 : start + size] = bytes(size - 40)
    write_bytes(filesystem, shard, bytes(content))


@pytest.fixture(scope="module")
def cluster(store):
    with nodes(3, store.server.environment) as made:
        yield made


def kill_a_worker(cluster, store) -> None:
    cluster.kill_worker(next(node for node in cluster.nodes if cluster.workers(node)))


def kill_a_node(cluster, store) -> None:
    cluster.kill(next(node for node in cluster.nodes if cluster.workers(node)))


def stop_the_store(cluster, store) -> None:
    store.outage(OUTAGE_SECONDS)


def kill_a_node_and_a_worker(cluster, store) -> None:
    kill_a_node(cluster, store)
    kill_a_worker(cluster, store)


def kill_a_worker_while_the_store_is_away(cluster, store) -> None:
    kill_a_worker(cluster, store)
    store.outage(OUTAGE_SECONDS)


FAULTS = (kill_a_worker, kill_a_node, stop_the_store, kill_a_node_and_a_worker, kill_a_worker_while_the_store_is_away)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(cluster, store, config, tmp_path, fault):
    """Each fault strikes the same run, continued by the same command after SIGTERM to its driver."""
    while len(cluster.nodes) < 3:
        cluster.add()
    with Training(config, cluster.address, tmp_path) as training:
        tried = max((entry["try"] for entry in training.journal()), default=0)
        before = training.wait_for(
            "a checkpoint", lambda entries: [e for e in entries if e["kind"] == "used" and e["try"] > tried]
        )
        fault(cluster, store)
        last = before[-1]
        training.wait_for(
            "two epochs more",
            lambda entries: [e for e in entries if e["kind"] == "used" and e["closed"] and e["epoch"] > last["epoch"] + 1],
        )
        training.stop()
        result = training.end()
    found = training.audit()
    print("\n".join(found.lines()))
    assert result["state"] == "stopped" and found.exact
    finished = [epoch for epoch in found.epochs if epoch.closed]
    assert len(finished) >= 2 and all(epoch.once == TRAIN for epoch in finished)
    assert all(len(epoch.unreadable) == 1 for epoch in finished)
    assert any(not gap.planned for gap in found.interruptions) or fault is stop_the_store


def test_a_node_that_is_taken_away_costs_no_more_than_a_step_or_two(cluster, store, config, tmp_path):
    """A notice of 20 seconds: a checkpoint is saved in time, though none is due for long; then the node dies."""
    settings = override(config, ["run.name=preempted", "train.checkpoint_every_steps=1000"])
    while len(cluster.nodes) < 3:
        cluster.add()
    with Training(settings, cluster.address, tmp_path) as training:
        training.wait_for("the first step", lambda entries: any(e["kind"] == "first" for e in entries))
        node = next(node for node in cluster.nodes if cluster.workers(node))
        cluster.drain(node, 20)
        saved = training.wait_for(
            "a checkpoint", lambda entries: [e for e in entries if e["kind"] == "used" and not e["closed"] and e["try"] == 1]
        )
        assert saved[0]["step"] % 1000
        time.sleep(5)
        cluster.kill(node)
        training.wait_for("a new try", lambda entries: any(e["kind"] == "first" and e["try"] == 2 for e in entries))
        training.stop()
        training.end()
    found = training.audit()
    print("\n".join(found.lines()))
    assert found.exact and found.interruptions[0].resumed >= saved[0]["step"]


def test_the_command_tells_what_the_audit_found(cluster, config):
    folder = f"{config.run.storage}/{config.run.name}"
    done = support.run_job("audit", "--run", folder)
    assert done.returncode == 0, done.stderr
    assert "epoch 0: exactly once" in done.stdout and "interruptions" in done.stdout and "unreadable: train-" in done.stdout
    missing = support.run_job("audit", "--run", override(config, ["run.name=nobody"]).run.storage + "/nobody")
    assert missing.returncode == 2 and "holds no run" in missing.stderr
