"""Figures of this process -> Ray's metrics, which the agent of its node gives to Prometheus.

Comes in: figures by their names in `metrics.METRICS`, as often as one likes. Goes out: every second, in a thread of its own, all that are
known; what tells them writes into a dict and waits for nothing.

All series are gauges to Ray, totals and histograms too. Its agent (2.60) keeps counters and histograms of a process that is gone for as
long as the node lives, each process under an id of its own, and makes a histogram's sum from the middles of its buckets. A gauge goes
with its process: 20 seconds after it was set last, even if the process lives, which is why all are set again and again. To Prometheus
`rate()` and `histogram_quantile()` are the same on either. What is not finite Ray drops.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.util.metrics import Gauge

from vidfuse.on_ray.metrics import BOUNDS, METRICS, Teller

SECONDS = 1.0
"""Between two times that all figures are set: less than Ray's agents forget them in, however often they are told to report."""
PEAKS = {
    "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "GH200": 989e12,
    "A100": 312e12, "A800": 312e12, "A40": 149.7e12, "A30": 165e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "V100": 125e12, "T4": 65e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Operations a second of GPUs by their name, in 16 bits with 32 bits' sums, not sparse; as NVIDIA gives them, written down from memory."""

Labels = tuple[tuple[str, str], ...]


class Board:
    """Figures of one teller (or several in one process): they are told from when it is made until it is closed.

    Args:
        tellers: whose figures these are; their totals begin with 0.
        labels: of all figures; each has those of them that the table names.
    """

    def __init__(self, *tellers: Teller, **labels: str) -> None:
        self._labels, self._lock = labels, threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._counts: dict[tuple[str, Labels], npt.NDArray[np.int64]] = {}
        self._sums: dict[tuple[str, Labels], float] = {}
        for metric in METRICS.values():
            if metric.teller in tellers and metric.kind == "counter":
                self.add(metric.name, 0)
            if metric.teller in tellers and metric.kind == "histogram":
                self.observe(metric.name, ())
        _Telling.show(self)

    def __reduce__(self) -> tuple[type[Board], tuple[()]]:
        """What travels to other processes, with what holds a board, is an empty one."""
        return Board, ()

    def set(self, name: str, value: float, **more: str) -> None:
        """The newest value of a figure, or a total so far; one that is not finite is none."""
        key = self._key(name, more)
        with self._lock:
            if math.isfinite(value):
                self._values[key] = float(value)
            else:
                self._values.pop(key, None)

    def add(self, name: str, value: float, **more: str) -> None:
        """More of a total."""
        key = self._key(name, more)
        with self._lock:
            self._values[key] = self._values.get(key, 0.0) + float(value)

    def observe(self, name: str, values: Sequence[float] | npt.NDArray[Any], **more: str) -> None:
        """More values of a histogram."""
        key, found = self._key(name, more), np.asarray(values, np.float64)
        counts = np.bincount(np.searchsorted(BOUNDS, found), minlength=len(BOUNDS) + 1)
        with self._lock:
            self._counts[key] = self._counts.get(key, 0) + counts
            self._sums[key] = self._sums.get(key, 0.0) + float(found.sum())

    def close(self) -> None:
        """Tell no more: the figures are gone soon."""
        _Telling.hide(self)

    def series(self) -> dict[tuple[str, Labels], float]:
        """All values by the name of their series, without Ray's prefix, and their labels."""
        with self._lock:
            found = dict(self._values)
            for (name, labels), counts in self._counts.items():
                upto = np.cumsum(counts).tolist()
                bounds = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
                found |= {(f"{name}_bucket", (*labels, ("le", le))): n for le, n in zip(bounds, upto, strict=True)}
                found |= {(f"{name}_count", labels): upto[-1], (f"{name}_sum", labels): self._sums[name, labels]}
            return found

    def put(self) -> None:
        """Tell Ray all values now."""
        for (name, labels), value in self.series().items():
            _Telling.gauge(name, tuple(key for key, _ in labels)).set(value, dict(labels))

    def _key(self, name: str, more: dict[str, str]) -> tuple[str, Labels]:
        labels = {**self._labels, **more}
        return f"vidfuse_{name}", tuple((label, labels[label]) for label in METRICS[name].labels)


class _Telling:
    """The thread of this process that tells Ray, and what it tells."""

    _boards: tuple[Board, ...] = ()
    _gauges: dict[tuple[str, str], Gauge] = {}  # noqa: RUF012  (of the process)
    _lock = threading.Lock()
    _thread: threading.Thread | None = None

    @classmethod
    def show(cls, board: Board) -> None:
        with cls._lock:
            cls._boards = (*cls._boards, board)
            if cls._thread is None:
                cls._thread = threading.Thread(target=cls._tell, name="vidfuse-metrics", daemon=True)
                cls._thread.start()

    @classmethod
    def hide(cls, board: Board) -> None:
        with cls._lock:
            cls._boards = tuple(other for other in cls._boards if other is not board)

    @classmethod
    def gauge(cls, name: str, labels: tuple[str, ...]) -> Gauge:
        key = (ray.get_runtime_context().get_worker_id(), name)  # a driver that joins another cluster is another worker
        if key not in cls._gauges:
            cls._gauges[key] = Gauge(name, _about(name), labels)
        return cls._gauges[key]

    @classmethod
    def _tell(cls) -> None:
        while True:
            time.sleep(SECONDS)
            for board in cls._boards:
                if ray.is_initialized():
                    board.put()


def _about(series: str) -> str:
    name = series.removeprefix("vidfuse_")
    return (METRICS.get(name) or METRICS[name.rpartition("_")[0]]).meaning


def peak_of(gpu: str) -> float | None:
    """Operations a second that a GPU of this name can do; `None`: not known."""
    words = gpu.replace("-", " ")
    fitting = [name for name in PEAKS if f" {name} " in f" {words} "]
    return PEAKS[max(fitting, key=len)] if fitting else None
