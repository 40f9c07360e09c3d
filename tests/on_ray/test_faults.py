"""Faults on a real cluster of several raylets with a real S3 server; after each, every sample of an epoch was used exactly once."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from tests import support
from tests.faults import FAULTS, HARMLESS, TRAIN, UNREADABLE
from tests.raylets import Training
from vidfuse.config import override

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(2400)]
GIB = 1024**3


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_run_survives(here, hurt, tmp_path, fault):
    """Each fault strikes the same run, continued by the same command after SIGTERM to its driver."""
    here.mend()
    with Training(hurt, here.cluster.address, tmp_path) as training:
        tried = max((entry["try"] for entry in training.journal()), default=0)
        before = training.wait_for(
            "a checkpoint", lambda entries: [e for e in entries if e["kind"] == "used" and e["try"] > tried]
        )
        fault(here, training)
        last = before[-1]
        struck = time.time()
        training.wait_for(
            "two epochs more",
            lambda entries: [
                e
                for e in entries
                if e["kind"] == "used" and e["closed"] and e["epoch"] > last["epoch"] + 1 and e["time"] > struck
            ],
        )
        training.stop()
        result = training.end()
    found = training.audit()
    print("\n".join([*found.lines()][-8:]))
    assert result["state"] == "stopped" and found.exact
    finished = [epoch for epoch in found.epochs if epoch.closed]
    assert len(finished) >= 2 and all(epoch.once == TRAIN for epoch in finished)
    assert all(len(epoch.unreadable) == UNREADABLE for epoch in finished)
    assert any(not gap.planned for gap in found.interruptions) or fault in HARMLESS


def test_a_node_that_is_taken_away_costs_no_more_than_a_step_or_two(here, hurt, tmp_path):
    """A notice of 20 seconds: a checkpoint is saved in time, though none is due for long; then the node dies."""
    settings = override(hurt, ["run.name=preempted", "train.checkpoint_every_steps=1000"])
    here.mend()
    cluster = here.cluster
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


BALLOON = "import sys, time; held = bytearray(int(sys.argv[1])); print(flush=True); time.sleep(60)"


def test_memory_that_runs_short_costs_a_reading_task_and_is_given_back(here, hurt, tmp_path):
    """Ray's own monitor kills processes of ours while another one takes up the memory of the machine; nothing is lost."""
    cluster, now = here.cluster, psutil.virtual_memory()
    limit = 1 - (now.available - 6 * GIB) / now.total  # three workers, three that stand by and the readers need less
    for node in cluster.nodes:
        cluster.kill(node)
    for _ in range(3):
        cluster.add(RAY_memory_usage_threshold=f"{limit:.3f}")
    with Training(override(hurt, ["run.name=memory"]), cluster.address, tmp_path) as training:
        training.wait_for("a checkpoint", lambda entries: [e for e in entries if e["kind"] == "used"])
        now = psutil.virtual_memory()
        much = now.available - int((1 - limit) * now.total) + GIB
        with subprocess.Popen([sys.executable, "-c", BALLOON, str(much)], stdout=subprocess.PIPE) as balloon:
            training.wait_for("a kill", lambda _: cluster.raylets_say("OOM kill reason"), 60)
            balloon.kill()
        struck = time.time()
        training.wait_for(
            "an epoch more", lambda entries: any(e["kind"] == "used" and e["closed"] and e["time"] > struck for e in entries)
        )
        training.stop()
        training.end()
    found = training.audit()
    print("\n".join([*cluster.raylets_say("OOM kill reason"), *found.lines()]))
    assert found.exact and all(epoch.once == TRAIN for epoch in found.epochs if epoch.closed)


def test_the_command_tells_what_the_audit_found(here, hurt):
    folder = f"{hurt.run.storage}/{hurt.run.name}"
    done = support.run_job("audit", "--run", folder)
    assert done.returncode == 0, done.stderr
    assert "epoch 0: exactly once" in done.stdout and "interruptions" in done.stdout and "unreadable: train-" in done.stdout
    missing = support.run_job("audit", "--run", override(hurt, ["run.name=nobody"]).run.storage + "/nobody")
    assert missing.returncode == 2 and "holds no run" in missing.stderr
