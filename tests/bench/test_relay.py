"""The longest wait for clips where one stream ends and the next begins: the next one started ahead, against when the last has ended.

Both in turn, on a cluster of two CPUs, with clips so small that some 400 of them come a second; a stream of 512 parts is followed by one of
2,048, as in a run. Waits of the first 5 s, in which the first stream starts, do not count. Run by `make bench`.
"""

from __future__ import annotations

import statistics
import time

import pytest

from tests import support
from vidfuse.config import from_mapping
from vidfuse.data import relay
from vidfuse.data.feed import Feed
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World
from vidfuse.on_ray import preflight
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.stream import pull_through_ray

pytestmark = [pytest.mark.bench, pytest.mark.ray]
VIDEOS, BATCH, ROUNDS, GOAL = 240, 8, 3, 0.5
PER_SECOND = 320
"""Clips that a training takes."""


@pytest.fixture
def config(ray_cluster, tmp_path):
    videos = tmp_path / "videos"
    for number in range(VIDEOS):
        path = videos / "train" / "ab"[number % 2] / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(support.make_video(12, suffix="mp4", width=64, height=64, seed=number % 6))
    pack(prepare(read_layout(videos, "tree"), videos, str(tmp_path / "set"), 3_000_000))
    data = {"classes": 2, "frames": 8, "size": 64, "url": str(tmp_path / "set"), "validation_split": "train"}
    data |= {"block_bytes": BATCH * 8 * 64 * 64 * 3, "buffer_bytes": 2**26}
    return from_mapping({"data": data, "train": {"global_batch": BATCH, "micro_batch": BATCH, "epochs": 100}})


def test_nobody_waits_for_the_next_stream(config, monkeypatch):
    packed = preflight.open_set(config)

    def longest() -> float:
        feed = Feed(config, packed, World(1, 0, BATCH, BATCH), pull_through_ray(config.data, workers=1))
        waits, began = [], time.monotonic()
        for epoch in range(relay.FIRST_PARTS * BATCH // VIDEOS + 4):
            asked = time.monotonic()
            for _ in feed.train(epoch, feed.order(epoch)):
                given = time.monotonic()
                if given - began > 5:
                    waits.append(given - asked)
                time.sleep(BATCH / PER_SECOND)
                asked = time.monotonic()
        feed.close()
        time.sleep(2)  # threads of Ray Data end, which may not find Ray shut down
        return max(waits)

    def afterwards() -> float:
        with monkeypatch.context() as patch:
            patch.setattr(relay, "AHEAD_SECONDS", 0.0)
            return longest()

    rounds = [(longest(), afterwards()) for _ in range(ROUNDS)]
    ratios = [ahead / after for ahead, after in rounds]
    ahead, after = (statistics.median(each) for each in zip(*rounds, strict=True))
    print(
        f"\nlongest wait: {ahead:.2f} s ahead, {after:.2f} s afterwards; ratios {', '.join(f'{r:.2f}' for r in ratios)}; goal {GOAL}"
    )
    assert statistics.median(ratios) <= GOAL
