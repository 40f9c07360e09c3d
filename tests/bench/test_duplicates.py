"""Finding duplicates among as many hashes as Something-Something-V2 has videos, against comparing all with all."""

from __future__ import annotations

import time

import numpy as np
import psutil
import pytest

from vidfuse.data.duplicates import FRAME_BITS, near_pairs
from vidfuse.data.labels import SSV2_SPLITS

pytestmark = pytest.mark.bench
VIDEOS, FRAMES, MOST, PLANTED, ROWS = sum(SSV2_SPLITS.values()), 8, 32, 1000, 100
GOAL = 20


def hashes(rng: np.random.Generator, kind: str) -> np.ndarray:
    """`spread`: all bits are random; `still`: frames of a video differ in some four bits from its first, as of a still camera."""
    if kind == "spread":
        return rng.integers(0, 2**64, (VIDEOS, FRAMES), dtype=np.uint64)
    found = np.repeat(rng.integers(0, 2**64, (VIDEOS, 1), dtype=np.uint64), FRAMES, axis=1)
    for _ in range(4):
        found ^= np.uint64(1) << rng.integers(0, FRAME_BITS, found.shape, dtype=np.uint64)
    return found


@pytest.mark.parametrize("kind", ["spread", "still"])
def test_duplicates_of_220847_videos(kind):
    rng = np.random.default_rng(0)
    values = hashes(rng, kind)
    first, second = rng.choice(VIDEOS, (2, PLANTED), replace=False)
    values[second] = values[first]
    for number, row in enumerate(second):
        for bit in rng.choice(FRAMES * FRAME_BITS, number % (MOST + 1), replace=False):
            values[row, bit // FRAME_BITS] ^= np.uint64(1) << np.uint64(bit % FRAME_BITS)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    pairs = near_pairs(values, MOST)
    ours = time.perf_counter() - start
    grown = (psutil.Process().memory_info().rss - before) / 2**20
    start = time.perf_counter()
    for row in range(ROWS):
        np.flatnonzero(np.bitwise_count(values ^ values[row]).sum(axis=1) <= MOST)
    all_with_all = (time.perf_counter() - start) / ROWS * VIDEOS / 2
    planted = {tuple(sorted(pair)) for pair in zip(first.tolist(), second.tolist(), strict=True)}
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True))
    print(
        f"\n{kind}: {VIDEOS} videos in {ours:.1f} s, all with all {all_with_all:.0f} s (of {ROWS} rows), "
        f"ratio {all_with_all / ours:.0f}, {len(planted & found)} of {PLANTED} planted, {len(found)} pairs, +{grown:.0f} MiB resident"
    )
    assert planted <= found
    assert all_with_all / ours >= GOAL
