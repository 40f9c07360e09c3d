"""Reading of four workers that wait for each other, as training's do: with a share of the CPUs each, and as Ray Data hands them out.

A storage that takes 0.4 s a part and no processor time, so that two cores can stand for a cluster: 16 reading tasks run at a time, and 10
parts a second and worker are the most there can be. The clock starts when the reading processes have started. Run by `make bench`.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import pytest
from pyarrow import fs as pafs
from ray.data._internal.execution.backpressure_policy import BackpressurePolicy

from vidfuse.config import DataConfig
from vidfuse.data.clips import COSTS, ClipReader, Columns, Part, Video
from vidfuse.on_ray.stream import Share, pull_through_ray

pytestmark = [pytest.mark.bench, pytest.mark.ray]
WORKERS, CPUS, CPUS_PER_TASK, SECONDS_A_PART = 4, 2, 0.125, 0.4
START_SECONDS, SECONDS, GOAL = 40, 40, 1.5


@dataclass(frozen=True)
class Waiting(ClipReader):
    """Gives the shape of clips, after a while."""

    def read(self, part: Part) -> Columns:
        time.sleep(SECONDS_A_PART)
        rows = len(part.videos)
        clips = np.zeros((rows, self.data.frames, self.data.size, self.data.size, 3), np.uint8)
        labels = {"label": np.zeros(rows, np.int64), "weight": np.ones(rows, np.float32), "sample": np.arange(rows)}
        return {"clip": clips, **labels, "error": np.full(rows, "", object), **{cost: np.zeros(rows) for cost in COSTS}}


def parts() -> list[Part]:
    videos = (Video(number, "", "", 0, 0, 1, 1, 1, 1) for number in cycle(range(8)))
    return [Part(0, tuple(islice(videos, 8))) for _ in range(2048)]


def per_second() -> float:
    """Parts a second and worker."""
    data = DataConfig(classes=2, frames=4, size=64, block_bytes=1, buffer_bytes=2**27, cpus_per_task=CPUS_PER_TASK)
    together, over, count = threading.Barrier(WORKERS), threading.Event(), [0] * WORKERS

    def worker(rank: int) -> None:
        stream = pull_through_ray(data, workers=WORKERS)(Waiting(pafs.LocalFileSystem(), "", data, 0), parts(), 8)
        with suppress(threading.BrokenBarrierError):
            while not over.is_set():
                next(stream)
                together.wait()
                count[rank] += 1
        together.abort()
        stream.close()

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(WORKERS)]
    for thread in threads:
        thread.start()
        time.sleep(0.5)
    time.sleep(START_SECONDS)
    before = sum(count)
    time.sleep(SECONDS)
    read = sum(count) - before
    over.set()
    for thread in threads:
        thread.join()
    time.sleep(2)  # threads of Ray Data end, which may not find Ray shut down
    return read / SECONDS / WORKERS


def test_workers_that_wait_for_each_other_have_a_share_each(ray_cluster, monkeypatch):
    shares = per_second()
    with monkeypatch.context() as patch:
        patch.setattr(Share, "__init__", BackpressurePolicy.__init__)
        as_they_come = per_second()
    most = CPUS / CPUS_PER_TASK / SECONDS_A_PART / WORKERS
    print(
        f"\nparts a second and worker: {shares:.1f} with a share each, {as_they_come:.1f} as Ray Data hands CPUs out "
        f"(ratio {shares / as_they_come:.2f}, goal {GOAL}); {most:.0f} are the most"
    )
    assert shares >= GOAL * as_they_come
