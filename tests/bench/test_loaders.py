"""Clips a second of vidfuse's stream, and of torch's DataLoader over webdataset with PyAV, decord and torchcodec, on the same cores.

All read the same shards from the same folder and give the same: batches of 8 random clips of 16 frames at 224 px, uint8. The loaders have a
process a core and take each decoder as its documentation has it (bytes in memory, one thread, only the wanted frames); cropping is ours,
which is the fastest that was found. The strongest is the loader that gave most in `TRIALS` runs in turn; each stream then counts against the
mean of its runs before and after it, since the machine's speed drifts, and the median of the ratios is what counts. All have started
before the clock does: the loaders keep their processes and gave `EPOCHS` epochs; a stream starts anew each time, once in a run, with
processes that Ray may have ended while a loader had the cores, and gives `WARM` epochs.

Videos as SSv2 has them (`videos.py`): as they are, and as `jobs.pack --transcode` makes them. torchcodec is left
out, and that is said, where it is not installed (it needs FFmpeg's libraries besides). Run by `make bench`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch

from tests.bench.videos import VIDEOS, written
from vidfuse.config import TranscodeConfig, from_mapping
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World, frame_numbers
from vidfuse.data.transforms import crop_resize, random_box
from vidfuse.on_ray import preflight
from vidfuse.on_ray.stream import pull_through_ray

pytestmark = [pytest.mark.bench, pytest.mark.ray]
WARM, EPOCHS, FRAMES, SIZE, BATCH, TRIALS, REPEATS, CORES = 4, 6, 16, 224, 8, 2, 5, os.cpu_count() or 2
GOAL, HELD = 1.2, {"as they are": 1.1, "transcoded": 1.2}
"""What was aimed at, and what holds: see README.md beside this file."""
Frames = Iterator[tuple[int, np.ndarray]]


def with_pyav(content: bytes, numbers: list[int]) -> Frames:
    """In order, converting the wanted frames."""
    wanted = set(numbers)
    with av.open(io.BytesIO(content)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield number, frame.to_ndarray(format="rgb24")
                if number == numbers[-1]:
                    return


def with_decord(content: bytes, numbers: list[int]) -> Frames:
    """`get_batch`; on some files its frames are others than were asked for."""
    import decord

    reader = decord.VideoReader(io.BytesIO(content), num_threads=1)
    yield from zip(numbers, reader.get_batch(numbers).asnumpy(), strict=True)


def with_torchcodec(content: bytes, numbers: list[int]) -> Frames:
    """`get_frames_at`, exact."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(content, num_ffmpeg_threads=1, dimension_order="NHWC")
    yield from zip(numbers, decoder.get_frames_at(numbers).data.numpy(), strict=True)


DECODERS = {"pyav": with_pyav, "decord": with_decord, "torchcodec": with_torchcodec}


def clip_of(decode: str, sampling: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of webdataset to a random clip."""
    cv2.setNumThreads(1)
    meta = json.loads(sample["json"])
    content = next(value for name, value in sample.items() if name in ("webm", "mp4"))
    rng = np.random.default_rng()
    numbers = frame_numbers(meta["frames"], FRAMES, sampling=sampling, stride=2, rng=rng)
    box = random_box(meta["height"], meta["width"], area=(0.5, 1.0), aspect=(0.75, 1.3333), flip=False, rng=rng)
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for number, frame in DECODERS[decode](content, sorted(set(numbers.tolist()))):
        for place in np.flatnonzero(numbers == number):
            crop_resize(frame, box, clip[place])
    return {"clip": clip, "label": meta["label"]}


def loader_of(shards: list[str], decode: str, sampling: str) -> Any:
    import webdataset

    data = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False, nodesplitter=None)
    return webdataset.WebLoader(
        data.map(partial(clip_of, decode, sampling)),
        batch_size=BATCH,
        num_workers=CORES,
        persistent_workers=True,
        multiprocessing_context="spawn",
    )


@pytest.mark.parametrize("sampling", ["uniform", "dense"])
@pytest.mark.parametrize("form", ["as they are", "transcoded"])
def test_the_stream_feeds_as_much_as_the_strongest_loader(ray_cluster, tmp_path_factory, form, sampling):
    folder = tmp_path_factory.getbasetemp() / "loaders"
    folder.mkdir(exist_ok=True)
    url = written(folder, TranscodeConfig() if form == "transcoded" else None)
    data = {"classes": 2, "frames": FRAMES, "size": SIZE, "sampling": sampling, "url": url, "validation_split": "train"}
    config = from_mapping({"data": data, "train": {"global_batch": BATCH, "micro_batch": BATCH, "epochs": WARM + EPOCHS + 1}})
    packed = preflight.open_set(config)
    shards = [str(Path(url) / shard.name) for shard in packed.manifest.splits["train"].shards]

    def ours() -> float:
        """The epochs before start the stream and its processes, and the one after is read ahead of, as at any time of a run."""
        feed = Feed(config, packed, World(1, 0, BATCH, BATCH), pull_through_ray(config.data, workers=1))

        def clips(epoch: int) -> int:
            return sum(int((batch.weights > 0).sum()) for (batch,) in feed.train(epoch, feed.order(epoch)))

        assert sum(clips(epoch) for epoch in range(WARM)) == VIDEOS * WARM
        began = time.monotonic()
        rows = sum(clips(epoch) for epoch in range(WARM, WARM + EPOCHS))
        seconds = time.monotonic() - began
        feed.close()
        assert rows == VIDEOS * EPOCHS
        return rows / seconds

    def theirs(loader: Any) -> float:
        began, rows = time.monotonic(), 0
        for _ in range(EPOCHS):
            for batch in loader:
                assert batch["clip"].dtype == torch.uint8
                rows += len(batch["clip"])
        assert rows == VIDEOS * EPOCHS
        return rows / (time.monotonic() - began)

    names = [name for name in DECODERS if importlib.util.find_spec("av" if name == "pyav" else name)]
    loaders = {name: loader_of(shards, name, sampling) for name in names}
    for loader in loaders.values():
        theirs(loader)  # processes start, libraries load
    trials = [{name: theirs(loader) for name, loader in loaders.items()} for _ in range(TRIALS)]
    each = {name: max(trial[name] for trial in trials) for name in names}
    strongest = max(each, key=lambda name: each[name])
    streams, rates = list[float](), [theirs(loaders[strongest])]
    for _ in range(REPEATS):
        streams.append(ours())
        rates.append(theirs(loaders[strongest]))
    ratios = [mine / ((before + after) / 2) for mine, (before, after) in zip(streams, pairwise(rates), strict=True)]
    missing = "" if len(names) == len(DECODERS) else f"; not installed: {', '.join(set(DECODERS) - set(names))}"
    print(
        f"\n{form}, {sampling}, best of {TRIALS} runs: " + ", ".join(f"{n} {v:.1f} clips/s" for n, v in each.items()) + missing
    )
    print(f"vidfuse {[f'{rate:.1f}' for rate in streams]}, {strongest} {[f'{rate:.1f}' for rate in rates]} clips/s")
    print(f"ratio to {strongest}: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; goal {GOAL}")
    assert statistics.median(ratios) >= HELD[form]
