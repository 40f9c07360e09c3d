"""What Ray Data's control loop takes from a training on CPUs: with a rest for each block that waits, and without.

The loop runs in a thread of each training worker. While a reading task runs that has given a block of which Ray Data has not fetched the
facts yet, it turns a thousand times a second, and the training's threads wait for the interpreter and for the CPU. Both in turn, of the
demo's single frames, with two workers on a cluster of two CPUs: clips a second from a third of the steps on. Run by `make bench`.
"""

from __future__ import annotations

import os
import statistics
import threading
import time

import pytest
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR

from vidfuse import presets
from vidfuse.config import override
from vidfuse.data.layouts import read_layout
from vidfuse.data.synthetic import render
from vidfuse.on_ray import fit, room, stream
from vidfuse.on_ray.packing import pack, prepare

pytestmark = [pytest.mark.bench, pytest.mark.ray]
TRAIN, VALIDATION, EPOCHS, ROUNDS, GOAL = 560, 28, 6, 3, 1.1
REST = "VIDFUSE_BENCH_REST"
"""Seconds a block, as `stream.REST_SECONDS`, for the workers of a run."""


def other_rest() -> None:
    """Called in each process of the workers' environment, before anything else."""
    stream.REST_SECONDS = float(os.environ[REST])


def test_the_loop_leaves_time_to_the_training(ray_cluster, tmp_path, monkeypatch):
    render(tmp_path / "videos", train=TRAIN, validation=VALIDATION, test=0, seed=0)
    pack(prepare(read_layout(tmp_path / "videos", "ssv2"), tmp_path / "videos", str(tmp_path / "set")))

    def per_second(rest: float, run: str) -> float:
        environment = {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.other_rest", REST: str(rest)}}
        monkeypatch.setattr(room, "environment", lambda *_, **__: environment)
        own = [f"data.url={tmp_path / 'set'}", f"run.storage={tmp_path / 'runs'}", f"run.name={run}"]
        how = [f"train.epochs={EPOCHS}", f"train.validate_every_epochs={EPOCHS}"]
        config = override(presets.get("demo_single_frame"), own + how)
        seen: list[tuple[float, int]] = []

        def hear(event) -> None:
            if "loss" in event:
                seen.append((time.monotonic(), event["step"]))

        fit.fit(config, facts={}, on_progress=hear, stop=threading.Event())
        (since, first), (until, last) = next(each for each in seen if each[1] * 3 >= seen[-1][1]), seen[-1]
        return (last - first) * config.train.global_batch / (until - since)

    pairs = [(per_second(stream.REST_SECONDS, f"rest-{n}"), per_second(0.0, f"without-{n}")) for n in range(ROUNDS)]
    ratios = [rest / without for rest, without in pairs]
    print(f"\nclips a second with a rest and without: {', '.join(f'{a:.1f} and {b:.1f}' for a, b in pairs)}")
    print(f"ratio: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}; goal {GOAL}")
    assert statistics.median(ratios) >= GOAL
