"""Thirty random faults over one run, and the losses of a broken run beside those of an unbroken one. `make soak`."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import FAULTS, TRAIN, UNREADABLE, Place, kill_a_node, kill_a_worker
from tests.raylets import Training
from vidfuse.config import override

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.soak, pytest.mark.timeout(7200)]
FAULTS_IN_ALL = int(os.environ.get("VIDFUSE_SOAK_FAULTS", "30"))
STEPS = 160
KILLS = [(kill_a_worker, 3), (kill_a_node, 2), (kill_a_node, 1), (kill_a_worker, 3), (kill_a_node, 2), (kill_a_worker, 3)]
"""What strikes the run whose losses are compared, and how many nodes there are then."""
LOSS = 1e-3  # relative, fp32, after 160 steps on one, two and three workers


def resize(here: Place, draw: random.Random) -> None:
    """Between one and three nodes, by chance: some come back only later."""
    here.proxy.faults.share = 0.0
    wanted = draw.choice((1, 2, 3, 3))
    while len(here.cluster.nodes) < wanted:
        here.cluster.add()


def test_thirty_random_faults(here, hurt, tmp_path):
    draw, struck = random.Random(0), Counter[str]()
    began = time.time()
    with Training(hurt, here.cluster.address, tmp_path) as training:
        training.wait_for_checkpoint()
        for number in range(FAULTS_IN_ALL):
            resize(here, draw)
            time.sleep(draw.uniform(0, 8))
            fault = draw.choice(FAULTS)
            moment = time.time()
            fault(here, training)
            if not here.cluster.nodes:
                here.cluster.add()
            training.wait_for_checkpoint(f"a checkpoint after fault {number}, {fault.__name__}")
            struck[fault.__name__] += 1
            print(f"{number} {fault.__name__}: {time.time() - moment:.0f} s, {len(here.cluster.nodes)} nodes", flush=True)
        training.stop()
        result = training.end()
    found = training.audit()
    print(f"{time.time() - began:.0f} s, {dict(struck)}, result {result}")
    print("\n".join([*found.lines()][-60:]))
    assert result["state"] == "stopped" and found.exact
    finished = [epoch for epoch in found.epochs if epoch.closed]
    assert finished and all(epoch.once == TRAIN and len(epoch.unreadable) == UNREADABLE for epoch in finished)
    assert {span.workers for span in found.spans} == {1, 2, 3}


def test_a_broken_run_has_the_losses_of_an_unbroken_one(here, hurt, tmp_path):
    """Six kills, three world sizes; the picture goes to $VIDFUSE_PICTURES, if it is set."""
    settings = override(hurt, ["train.log_every_steps=1", f"train.epochs={STEPS * 12 // TRAIN}", "train.learning_rate=3e-3"])
    here.mend()
    with Training(override(settings, ["run.name=whole"]), here.cluster.address, tmp_path) as whole:
        assert whole.end(900)["steps"] == STEPS
    with Training(override(settings, ["run.name=broken"]), here.cluster.address, tmp_path) as broken:
        for kill, left in KILLS:
            broken.wait_for_checkpoint()
            kill(here, broken)
            while len(here.cluster.nodes) < left:
                here.cluster.add()
        assert broken.end(900)["steps"] == STEPS
    found = broken.audit()
    print("\n".join([*found.lines()][-20:]))
    assert found.exact and sum(not gap.planned for gap in found.interruptions) >= 5
    assert len({span.workers for span in found.spans}) == 3
    a, b = whole.losses(), broken.losses()
    far = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    print(f"largest relative difference of {len(a)} losses: {far:.1e}")
    if os.environ.get("VIDFUSE_PICTURES"):
        draw_losses(Path(os.environ["VIDFUSE_PICTURES"]) / "broken_and_unbroken.png", a, b, found.spans)
    assert far < LOSS


def draw_losses(path: Path, whole, broken, spans) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(whole) + 1)
    axes.plot(steps, whole, color="#1f77b4", linewidth=4, alpha=0.4, label="unbroken, 3 workers")
    axes.plot(steps, broken, color="#d62728", linewidth=1, label="broken")
    for span in spans:
        axes.axvline(span.first - 0.5, color="0.8", linewidth=0.8, zorder=0)
        axes.annotate(f"{span.workers}", (span.first, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=8)
    axes.set(xlabel="step", ylabel="training loss", title="numbers: workers of the broken run from there on")
    axes.legend(loc="lower left")
    figure.savefig(path)
