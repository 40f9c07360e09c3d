"""Clips a second from videos as they were and as `--transcode` makes them, and how many bytes each has.

Random clips of 16 frames, as training asks for them: `dense` (16 frames, 4 apart, from a random place) and `uniform` (one frame of
each sixteenth), decoded and cropped to 224 px. One process, one thread; both forms in turn, several times, in one session: the ratio
is the figure. Real videos where the shared test data are there, and always videos rendered at 640 x 480, 10 s, VP9 and H.264.
Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Sequence

import av
import cv2
import numpy as np
import pytest

from tests import support
from vidfuse.config import TranscodeConfig
from vidfuse.data.decode import decode_frames, probe
from vidfuse.data.sampling import frame_numbers
from vidfuse.data.transcode import into_form
from vidfuse.data.transforms import centre_box, crop_resize

pytestmark = pytest.mark.bench
CLIPS, ROUNDS, FRAMES, SIZE, STRIDE = 6, 3, 16, 224, 4
GOAL = 2.0
Videos = Sequence[tuple[bytes, int]]
"""Bytes and frames."""


def rendered(codec: str, seed: int) -> bytes:
    """10 s at 640 x 480 of soft noise that moves, with grain."""
    out = io.BytesIO()
    name, options = {
        "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "250"}),
        "h264": ("libx264", {"g": "250"}),
    }[codec]
    draw = np.random.default_rng(seed)
    picture = cv2.resize(draw.integers(0, 256, (40, 60, 3), np.uint8), (1200, 800), interpolation=cv2.INTER_CUBIC)
    with av.open(out, "w", format="webm" if codec == "vp9" else "mp4") as container:
        stream = container.add_stream(name, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 640, 480, "yuv420p", 900_000
        for number in range(300):
            part = picture[number % 300 :, number:][:480, :640].astype(np.int16) + draw.integers(-6, 7, (480, 640, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(part.clip(0, 255).astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def real() -> list[bytes]:
    return [file.read_bytes() for file in sorted(support.shared_data("originals").iterdir())]


def seconds(videos: Videos, sampling: str) -> float:
    """Processor time of `CLIPS` clips of each video."""
    start, image = time.process_time(), np.empty((SIZE, SIZE, 3), np.uint8)
    for number, (video, frames) in enumerate(videos):
        box = None
        for clip in range(CLIPS):
            rng = np.random.default_rng([number, clip])
            numbers = frame_numbers(frames, FRAMES, sampling=sampling, stride=STRIDE, rng=rng)
            for _, frame in decode_frames(video, numbers.tolist()):
                box = box or centre_box(*frame.shape[:2])
                crop_resize(frame, box, image)
    return time.process_time() - start


@pytest.mark.parametrize("source", ["vp9", "h264", "real"])
def test_transcoded_videos_decode_faster(source):
    originals = real() if source == "real" else [rendered(source, seed) for seed in range(3)]
    before: Videos = [(video, probe(video).frames) for video in originals]
    start = time.process_time()
    made = [into_form(video, TranscodeConfig()) for video in originals]
    cost = (time.process_time() - start) / sum(frames for _, frames in before)
    after: Videos = [(video, info.frames) for video, info in made]
    grown = sum(len(video) for video, _ in after) / sum(len(video) for video, _ in before)
    print(f"\n{source}: {len(before)} videos, bytes x {grown:.2f}, transcoding {1000 * cost:.1f} ms a frame")
    for sampling in ("dense", "uniform"):
        pairs = [(seconds(before, sampling), seconds(after, sampling)) for _ in range(ROUNDS)]
        ratios = [a / b for a, b in pairs]
        clips = CLIPS * len(before)
        rates = (clips / statistics.median(a for a, _ in pairs), clips / statistics.median(b for _, b in pairs))
        print(
            f"  {sampling}: {rates[0]:.1f} -> {rates[1]:.1f} clips/s of one core, ratio median {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f}); goal {GOAL}"
        )
        assert statistics.median(ratios) >= GOAL
