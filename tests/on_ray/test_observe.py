"""Figures become series; tries of a run become figures. Without Ray: what Prometheus finds is in test_prometheus.py."""

from __future__ import annotations

from unittest.mock import Mock

import pytest

from vidfuse.on_ray import monitor, observe
from vidfuse.on_ray.metrics import BOUNDS, METRICS
from vidfuse.on_ray.monitor import Tries
from vidfuse.on_ray.observe import Board, peak_of

RANK, RUN = (("run", "a"), ("rank", "1")), (("run", "a"),)


@pytest.fixture
def board():
    made = Board("worker", run="a", rank="1")
    yield made
    made.close()


def test_totals_and_histograms_begin_with_nothing(board):
    series = board.series()
    totals = {metric.name for metric in METRICS.values() if metric.teller == "worker" and metric.kind == "counter"}
    assert totals and all(series[f"vidfuse_{name}", RANK] == 0 for name in totals)
    buckets = {dict(labels)["le"]: value for (name, labels), value in series.items() if name == "vidfuse_decode_seconds_bucket"}
    assert list(buckets.values()) == [0] * (len(BOUNDS) + 1) and "+Inf" in buckets


def test_a_figure_has_the_labels_of_the_table(board):
    board.set("loss", 2.5)
    board.set("step_seconds", 0.5)
    board.add("read_bytes_total", 3)
    board.add("read_bytes_total", 4)
    series = board.series()
    assert series["vidfuse_loss", RUN] == 2.5 and series["vidfuse_step_seconds", RANK] == 0.5
    assert series["vidfuse_read_bytes_total", RANK] == 7
    with pytest.raises(KeyError):
        board.set("speed", 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_gone(board, value):
    board.set("loss", 2.5)
    board.set("loss", value)
    assert ("vidfuse_loss", RUN) not in board.series()


def test_buckets_are_cumulative_and_the_sum_is_exact(board):
    board.observe("decode_seconds", [0.002, 0.03])
    board.observe("decode_seconds", [0.03, 60])
    series = board.series()
    at = {dict(labels)["le"]: value for (name, labels), value in series.items() if name == "vidfuse_decode_seconds_bucket"}
    assert (at["0.002"], at["0.02"], at["0.05"], at["10"], at["+Inf"]) == (1, 1, 3, 3, 4)
    assert series["vidfuse_decode_seconds_count", RANK] == 4
    assert series["vidfuse_decode_seconds_sum", RANK] == pytest.approx(60.062)


def test_a_board_that_is_closed_is_told_no_more(board):
    assert board in observe._Telling._boards
    board.close()
    assert board not in observe._Telling._boards


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_name(gpu, peak):
    assert peak_of(gpu) == peak


def test_time_lost_is_from_the_last_step_before_a_restart_to_the_first_new_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(monitor, "time", Mock(time=lambda: now[0]))
    tries = Tries()

    def at(time: float, step: int) -> None:
        now[0] = time
        tries.hear(step, judged=False)

    tries.begin(3)
    at(110, 1)
    at(120, 8)
    at(125, 8)  # the same event again is no progress
    assert tries.figures() == {
        "progress_timestamp_seconds": 120, "restarts_total": 0, "resizes_total": 0, "lost_seconds_total": 0,
    }  # fmt: skip
    now[0] = 140
    tries.begin(2)
    assert tries.figures()["lost_seconds_total"] == 20
    at(150, 6)  # done before
    assert tries.figures()["lost_seconds_total"] == 30 and tries.figures()["progress_timestamp_seconds"] == 150
    at(160, 9)
    now[0] = 1000
    assert tries.figures() == {
        "progress_timestamp_seconds": 160, "restarts_total": 1, "resizes_total": 1, "lost_seconds_total": 40,
    }  # fmt: skip
    tries.begin(2)
    assert (tries.figures()["restarts_total"], tries.figures()["resizes_total"]) == (2, 1)
