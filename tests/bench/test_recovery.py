"""From `kill -9` of a node to the end of the next step: median and worst of five, and what it is made of."""

from __future__ import annotations

import statistics
import time

import pytest

from tests import support
from tests.faults import config_of
from tests.raylets import Training, nodes
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray.packing import pack, prepare

pytestmark = [pytest.mark.bench, pytest.mark.ray, pytest.mark.s3]
REPEATS = 5
GOAL = 25.0  # seconds, median
STAGES = ("node known dead", "new workers", "restore", "first step")


def test_recovery_after_the_death_of_a_node(s3, ray_cluster, tmp_path):
    source = support.make_ssv2(tmp_path / "source", {"train": 61, "validation": 6})
    url = s3.url("recovery")
    pack(prepare(read_layout(source, "ssv2"), source, url, 70_000))
    shape = {"global_batch": 8, "micro_batch": 4, "checkpoint_every_steps": 10}
    config = config_of(url, s3.url("runs"), "recovery", 2, **shape)
    rows = []
    with nodes(2, s3.environment) as cluster, Training(config, cluster.address, tmp_path) as training:
        for _ in range(REPEATS):
            old = training.wait_for("two workers", lambda entries: _stepping(entries, workers=2))
            for node in cluster.nodes:
                training.wait_for("one that stands by", lambda _, node=node: cluster.standing_by(node))
            time.sleep(8)  # for its imports
            killed = time.time()
            cluster.kill(cluster.nodes[0])
            known = _dead(cluster, killed)
            entries = training.wait_for("the next try", lambda entries, old=old: _stepping(entries, above=old[0]["try"]))
            start, first = entries[0], next(entry for entry in entries if entry["kind"] == "first")
            marks = (known, start["began"], start["time"], first["time"])
            rows.append(_stages(killed, marks))
            print("\n" + ", ".join(f"{name} {value:.1f}" for name, value in zip(STAGES, rows[-1], strict=True)), flush=True)
            cluster.add()
        training.stop()
        training.end()
    assert training.audit().exact
    totals = [sum(row) for row in rows]
    print(f"\nseconds to the next step: {[f'{total:.1f}' for total in totals]}; goal {GOAL} (median)")
    print(f"median {statistics.median(totals):.1f}, most {max(totals):.1f}")
    for name, values in zip(STAGES, zip(*rows, strict=True), strict=True):
        print(f"  {name}: median {statistics.median(values):.1f}, most {max(values):.1f}")
    assert statistics.median(totals) <= GOAL


def _stepping(entries, *, workers=None, above=0):
    """The entries of the newest try, if it has so many workers and has saved something (or, above a try, stepped)."""
    newest = [entry for entry in entries if entry["try"] == entries[-1]["try"]]
    wanted = "first" if above else "used"
    fits = newest and newest[0]["try"] > above and workers in (None, newest[0]["workers"])
    return newest if fits and any(entry["kind"] == wanted for entry in newest) else None


def _dead(cluster, since):
    """When the cluster knows that a node is gone."""
    while cluster.alive() > len(cluster.nodes) + 1:
        assert time.time() - since < 120, "the node was not missed"
        time.sleep(0.05)
    return time.time()


def _stages(since, marks):
    """Seconds between marks; a stage that ended before the one before it took none."""
    stages = []
    for mark in marks:
        stages.append(max(mark - since, 0.0))
        since = max(mark, since)
    return stages
