"""Clips a second of decord in a process of its own, as `data.decoder=decord` has it, against decord in this one.

16 uniform frames of each of the real AVI files (320 x 240) of the shared test data, both sides in turn, one at a time: the
ratio is the figure, and there is no goal: it is the price of a crash that costs one video. Run by `make bench`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from tests.support import shared_data
from vidfuse.data import decode
from vidfuse.data.decode import decode_frames, probe

pytestmark = pytest.mark.bench
FRAMES, ROUNDS = 16, 40


def test_what_a_process_of_its_own_costs():
    videos = [file.read_bytes() for file in sorted(shared_data("realclips").glob("*/*_g01_c01.avi"))]
    clips = [(video, np.linspace(0, probe(video).frames - 1, FRAMES).astype(int).tolist()) for video in videos]
    bounds = decode.MAX_FRAMES, decode.MAX_PIXELS

    def rate(decoded: Callable) -> float:
        start = time.monotonic()
        assert all(len(list(decoded(video, wanted))) == FRAMES for video, wanted in clips)
        return len(clips) / (time.monotonic() - start)

    def here(video, wanted):
        return (item for some in decode._decode_decord(video, wanted, *bounds) for item in some)

    def there(video, wanted):
        return decode_frames(video, wanted, decoder="decord")

    rate(here), rate(there)  # decord is imported, the process starts
    pairs = [(rate(there), rate(here)) for _ in range(ROUNDS)]
    ratios = sorted(a / b for a, b in pairs)
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    print(f"\n{len(clips)} videos: {medians[0]:.0f} clips/s in a process of its own, {medians[1]:.0f} clips/s here")
    print(f"ratio: median {statistics.median(ratios):.2f}, quartiles {ratios[ROUNDS // 4]:.2f} to {ratios[-ROUNDS // 4]:.2f}")
