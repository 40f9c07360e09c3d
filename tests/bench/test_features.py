"""An epoch on cached tokens against one that runs the frozen streams, at real width; storing them, and how near the losses are.

Both train `ssv2_cross_attention` (DINOv3 ViT-S+/16 and I3D-R50 with random weights, 16 x 224 px) through S3 and Ray Data in one process, in
turn; tokens of both streams are averaged in the same grid. Run by `make bench`.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.local import losses
from vidfuse import presets
from vidfuse.config import Config, override
from vidfuse.data.features import open_features
from vidfuse.data.feed import Feed
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World
from vidfuse.data.synthetic import render
from vidfuse.on_ray import features, fit, preflight
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.storage import open_storage
from vidfuse.on_ray.stream import pull_through_ray
from vidfuse.train.loop import run
from vidfuse.train.worker import LocalWorker

pytestmark = [pytest.mark.bench, pytest.mark.ray, pytest.mark.s3]
VIDEOS, EPOCHS, REPEATS, GOAL = 32, 6, 3, 20.0
SET = [
    "data.classes=14",
    "data.views=1",
    "model.semantic.grid=[8,7,7]",
    "train.global_batch=8",
    "train.precision=fp32",
    "train.zero_stage=0",
    "train.activation_checkpointing=false",
    "train.log_every_steps=1",
    "train.warmup_epochs=1",
    "train.validate_every_epochs=1000",
    "data.cpus_per_task=0.5",
]


def epochs(config: Config, folder: Path, places: features.Places) -> tuple[list[float], list[float]]:
    """Seconds of each epoch's steps, waiting for data included, and the losses."""
    packed = replace(preflight.open_set(config), features=features.opened(places))
    feed = Feed(config, packed, World(1, 0, 8, 8), pull_through_ray(config.data, workers=1))
    times: list[float] = []
    inner = feed.train

    def timed(epoch, left):
        began = time.perf_counter()
        yield from inner(epoch, left)
        times.append(time.perf_counter() - began)

    feed.train = timed  # type: ignore[method-assign]
    run(config, LocalWorker(folder), feed, folder=folder, facts={})
    return times, losses(folder)


def test_an_epoch_on_cached_tokens(s3, ray_cluster, tmp_path):
    render(tmp_path / "videos", train=VIDEOS, validation=8, seed=1)
    url = s3.url("features")
    pack(prepare(read_layout(tmp_path / "videos", "ssv2"), tmp_path / "videos", url, 1_500_000))
    base = override(presets.get("ssv2_cross_attention"), [*SET, f"data.url={url}", f"run.storage={s3.url('runs')}"])
    cached = override(base, ["data.features=auto", f"train.epochs={EPOCHS}"])
    began = time.perf_counter()
    places = fit.features_of(cached, lambda event: print(event["features"], flush=True))
    made = time.perf_counter() - began
    raw, raw_losses = epochs(override(base, ["train.epochs=1"]), tmp_path / "raw", {})
    runs = [epochs(cached, tmp_path / f"cached{n}", places) for n in range(REPEATS)]
    seconds = [second for times, _ in runs for second in times[1:]]  # the first of each has the start of the stream
    first = [times[0] for times, _ in runs]
    ratios = [raw[0] / second for second in seconds]
    size = sum(part.bytes for split in places.values() for at in split.values() for part in _manifest(at)) / 1e6
    far = max(abs(a - b) / abs(a) for a, b in zip(raw_losses, runs[0][1][: VIDEOS // 8], strict=True))
    print(f"\nmaking the cache: {made:.0f} s for {VIDEOS + 8} clips, {size:.1f} MB")
    span = f"{min(seconds):.2f} to {max(seconds):.2f}"
    print(f"an epoch of {VIDEOS} clips: {raw[0]:.1f} s raw; {statistics.median(seconds):.2f} s cached ({span})")
    print(f"the first epoch of a run, with the start of its stream: {statistics.median(first):.2f} s")
    print(f"ratio: median {statistics.median(ratios):.1f}, {min(ratios):.1f} to {max(ratios):.1f}; goal {GOAL}")
    print(f"losses of the first epoch, kept in bf16, differ by at most {far:.1e}")
    assert statistics.median(ratios) >= GOAL and far < 0.02


def _manifest(url: str):
    return open_features(*open_storage(url))[1].parts
