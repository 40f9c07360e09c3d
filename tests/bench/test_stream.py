"""Clips a second through S3 -> Ray Data -> one worker, against a bare loop over tarfile and the decoder on the same cores.

Both decode the same videos to as many frames of the same size, epochs in a row as in training, the start of the stream included.
They run in turn, several times, in one session: the median of the ratios is what counts, not the seconds.
Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from vidfuse.config import from_mapping
from vidfuse.data.decode import decode_frames
from vidfuse.data.feed import Feed, PackedSet
from vidfuse.data.layouts import read_layout
from vidfuse.data.sampling import World, frame_numbers
from vidfuse.data.shards import read_index, read_manifest
from vidfuse.data.synthetic import render
from vidfuse.data.transforms import centre_box, crop_resize
from vidfuse.on_ray.packing import pack, prepare
from vidfuse.on_ray.storage import open_storage
from vidfuse.on_ray.stream import pull_through_ray

pytestmark = [pytest.mark.bench, pytest.mark.ray, pytest.mark.s3]
VIDEOS, EPOCHS, FRAMES, SIZE, REPEATS, CORES = 360, 6, 16, 224, 3, os.cpu_count() or 2
GOAL = 0.85


def bare(shards: list[bytes]) -> int:
    """Decode every video of some shards that are in memory already; the number of clips."""
    count = 0
    for content in shards:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {m.name: m for m in tar}
            for name, member in members.items():
                if name.endswith(".json"):
                    continue
                meta = json.load(tar.extractfile(members[f"{name.rpartition('.')[0]}.json"]))
                numbers = frame_numbers(meta["frames"], FRAMES, sampling="uniform")
                box, clip = centre_box(meta["height"], meta["width"]), np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
                for number, frame in decode_frames(tar.extractfile(member).read(), sorted(set(numbers.tolist()))):
                    clip[numbers == number] = crop_resize(frame, box, SIZE)
                count += 1
    return count


def test_the_stream_is_near_the_decoder(s3, ray_cluster, tmp_path):
    render(tmp_path / "videos", train=VIDEOS, validation=12, seed=1)
    url = s3.url("bench")
    pack(prepare(read_layout(tmp_path / "videos", "ssv2"), tmp_path / "videos", url, 1_500_000))
    filesystem, root = open_storage(url)
    manifest = read_manifest(filesystem, root)
    packed = PackedSet(filesystem, root, manifest, {"train": read_index(filesystem, root, "train")})
    tree = {
        "data": {"classes": len(manifest.classes), "frames": FRAMES, "size": SIZE},
        "train": {"global_batch": 8, "micro_batch": 8, "epochs": EPOCHS},
    }
    config = from_mapping(tree)
    names = [shard.name for shard in manifest.splits["train"].shards]
    local = [filesystem.open_input_file(f"{root}/{name}").read() for name in names]

    def stream() -> float:
        start, rows = time.monotonic(), 0
        feed = Feed(config, packed, World(1, 0, 8, 8), pull_through_ray(config.data, workers=1))
        for epoch in range(EPOCHS):
            for (batch,) in feed.train(epoch, feed.order(epoch)):
                rows += int((batch.samples >= 0).sum())
        feed.close()
        assert rows == VIDEOS * EPOCHS
        return rows / (time.monotonic() - start)

    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:

        def limit() -> float:
            start = time.monotonic()
            parts = [local[i::CORES] for i in range(CORES)]
            assert sum(sum(pool.map(bare, parts)) for _ in range(EPOCHS)) == VIDEOS * EPOCHS
            return VIDEOS * EPOCHS / (time.monotonic() - start)

        stream(), limit()  # processes start, libraries load
        pairs = [(stream(), limit()) for _ in range(REPEATS)]
    ratios = [a / b for a, b in pairs]
    print(f"\nstream {[f'{a:.1f}' for a, _ in pairs]} clips/s, bare {[f'{b:.1f}' for _, b in pairs]} clips/s on {CORES} cores")
    print(f"ratio: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}; goal {GOAL}")
    assert statistics.median(ratios) >= GOAL
