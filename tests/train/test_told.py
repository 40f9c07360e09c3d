"""What ranks tell those who watch: figures of the table, in time, and how checkpoints are told of."""

from __future__ import annotations

import contextlib
import math

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine

from tests.train.local import config, packed, pull
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.on_ray.metrics import METRICS
from vidfuse.train import run as training
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker


class Told(LocalWorker):
    """Keeps what it is told."""

    def tell(self, figures):
        self.__dict__.setdefault("figures", []).append(dict(figures))


def told(folder, monkeypatch, *, diverges=False, **changes):
    monkeypatch.setattr(training, "PROGRESS_SECONDS", 0.0)
    settings = config(**changes)
    worker = Told(folder)
    feed = Feed(settings, packed(), World(1, 0, 8, 4), pull)
    with pytest.raises(ValueError, match="diverged") if diverges else contextlib.nullcontext():
        run(settings, worker, feed, folder=folder, facts={})
    return worker.figures


def test_a_run_tells_figures_of_the_table(tmp_path, monkeypatch):
    figures = told(tmp_path, monkeypatch)
    names = {name for some in figures for name in some}
    assert names <= METRICS.keys()
    by_stored_runs = {
        "mfu_ratio",
        "checkpoint_seconds",
        "checkpoint_bytes",
        "checkpoints_total",
        "checkpoint_good_timestamp_seconds",
    }
    of_rank_0 = {metric.name for metric in METRICS.values() if metric.teller == "rank 0"}
    assert names == of_rank_0 - by_stored_runs | {"step_seconds", "data_wait_ratio"}
    assert figures[0]["planned_steps"] == 6 and figures[0]["accumulation_steps"] == 2
    steps = [some["step"] for some in figures if "loss" in some]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(some["clips_per_second"] > 0 for some in figures if "clips_per_second" in some)
    assert all(some["nonfinite_losses_total"] == 0 for some in figures if "loss" in some)


def test_losses_that_are_not_finite_are_counted(tmp_path, monkeypatch):
    wild = told(tmp_path, monkeypatch, diverges=True, train__learning_rate=1e30, train__clip_norm=None)
    figures = [some for some in wild if "loss" in some]
    bad = sum(not math.isfinite(some["loss"]) for some in figures)
    assert bad and figures[-1]["nonfinite_losses_total"] == bad


def test_gradients_that_are_not_finite_are_counted(tmp_path, monkeypatch):
    """Clipped by an infinite norm they are 0: the loss stays finite, and nothing is learnt."""
    monkeypatch.setattr(DeepSpeedEngine, "get_global_grad_norm", lambda _: math.inf)
    figures = [some for some in told(tmp_path, monkeypatch) if "loss" in some]
    assert [some["nonfinite_losses_total"] for some in figures] == [1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(some["loss"]) for some in figures)


class Seen(Told):
    """Notes what the run's folder holds when figures are told."""

    def tell(self, figures):
        super().tell({**figures, "stored": sorted(path.name for path in self.folder.glob("*.*"))})


def test_a_run_is_found_before_its_first_checkpoint(tmp_path):
    settings = config()
    worker = Seen(tmp_path / "stored")
    run(settings, worker, Feed(settings, packed(), World(1, 0, 8, 4), pull), folder=tmp_path / "records", facts={})
    assert {"config.yaml", "run.json"} <= set(worker.figures[0]["stored"])
    assert "checkpoints.json" not in worker.figures[0]["stored"]
