"""Peak memory of the whole input path over a set and over one of eight times as many videos: as many clips, 16 x 224 px, from S3.

What is counted is the proportional memory (PSS: shared pages by share, the object store's among them) of this process, which takes the
batches, and of all processes of the cluster. Run by `make bench`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil
import pytest

from tests import support
from tests.bench.test_loaders import BATCH, FRAMES, SIZE
from vidfuse.config import from_mapping
from vidfuse.data.feed import Feed
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World
from vidfuse.on_ray import preflight
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.stream import pull_through_ray

pytestmark = [pytest.mark.bench, pytest.mark.ray, pytest.mark.s3]
VIDEOS, TIMES, ROUNDS, GOAL = 96, 8, 1, 1.05
LOOK_SECONDS = 0.5


def memory() -> float:
    """MiB of this process, of those that it started, and of their children."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            if "weed" not in process.name():
                total += process.memory_full_info().pss
    return total / 2**20


@contextlib.contextmanager
def peak() -> Iterator[list[float]]:
    """The most memory while the context is open."""
    found, done = [memory()], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_SECONDS):
            found[0] = max(found[0], memory())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def test_memory_does_not_grow_with_the_set(s3, ray_cluster, tmp_path):
    kinds = [support.make_video(45, suffix="webm", width=432, height=240, seed=seed) for seed in range(12)]
    urls = {}
    for count in (VIDEOS, VIDEOS * TIMES):
        videos = tmp_path / str(count)
        for number in range(count):
            path = videos / "train" / "ab"[number % 2] / f"{number}.webm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kinds[number % len(kinds)])
        urls[count] = s3.url(f"memory{count}")
        pack(prepare(read_layout(videos, "tree"), videos, urls[count], 3_000_000))

    def streamed(count: int) -> float:
        epochs = VIDEOS * TIMES // count
        data = {
            "classes": 2,
            "frames": FRAMES,
            "size": SIZE,
            "url": urls[count],
            "validation_split": "train",
            "buffer_bytes": 2**28,
        }
        config = from_mapping({"data": data, "train": {"global_batch": BATCH, "micro_batch": BATCH, "epochs": epochs}})
        feed, rows = (
            Feed(config, preflight.open_set(config), World(1, 0, BATCH, BATCH), pull_through_ray(config.data, workers=1)),
            0,
        )
        with peak() as most:
            for epoch in range(epochs):
                for (batch,) in feed.train(epoch, feed.order(epoch)):
                    rows += int((batch.weights > 0).sum())
        feed.close()
        assert rows == VIDEOS * TIMES
        return most[0]

    streamed(VIDEOS)  # processes start, libraries load
    rounds = [(streamed(VIDEOS), streamed(VIDEOS * TIMES)) for _ in range(ROUNDS)]
    small, large = max(a for a, _ in rounds), max(b for _, b in rounds)
    print(f"\nat most: {small:.0f} MiB over {VIDEOS} videos, {large:.0f} MiB over {VIDEOS * TIMES}; {rounds}")
    print(f"ratio {large / small:.3f}; goal {GOAL}; of them the buffer is 256 MiB")
    assert large <= GOAL * small
