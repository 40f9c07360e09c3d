"""A decoded frame to 224 px of its crop: converted whole and resized by OpenCV, as reading tasks do it or by area, or by FFmpeg.

FFmpeg resizes either the whole frame while it converts it, so that the crop has its size (`scale`), or the crop alone, in a graph of filters
(`filters`). One thread, frames of the sizes that data sets have, a random crop each as training draws it; all in turn, several times.
Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import av
import av.filter
import cv2
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from vidfuse.config import DataConfig
from vidfuse.data.transforms import Box, crop_resize, random_box
from vidfuse.data.video import Frame

pytestmark = pytest.mark.bench
CLIPS, FRAMES, SIZE, ROUNDS = 12, 16, 224, 7
SIZES = [(432, 240), (320, 240), (640, 480), (1280, 720), (1920, 1080)]
"""Something-Something-V2, UCF101 and what Kinetics and cameras have."""
LIMIT = 12.0
"""Mean difference of two ways, of 255 levels: they are the same part of the picture, whose colours are strong;
FFmpeg interpolates them in one step with the rest. Another part differs by 50."""
Decoded = Sequence[Any]
"""Frames of PyAV, yuv420p."""
Way = Callable[[Decoded, Box], list[Frame]]


def decoded(width: int, height: int) -> Decoded:
    """A soft picture that moves."""
    draw = np.random.default_rng(0)
    picture = cv2.resize(draw.integers(0, 256, (30, 40, 3), np.uint8), (width + 160, height), interpolation=cv2.INTER_CUBIC)
    parts = (np.ascontiguousarray(picture[:, 10 * number :][:, :width]) for number in range(FRAMES))
    return [av.VideoFrame.from_ndarray(part, format="rgb24").reformat(format="yuv420p") for part in parts]


def opencv(frames: Decoded, box: Box) -> list[Frame]:
    convert, out = VideoReformatter(), []
    for frame in frames:
        image = np.empty((SIZE, SIZE, 3), np.uint8)
        crop_resize(convert.reformat(frame, format="rgb24", threads=1).to_ndarray(), box, image)
        out.append(image)
    return out


def area(frames: Decoded, box: Box) -> list[Frame]:
    convert, out = VideoReformatter(), []
    for frame in frames:
        part = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()[box.top :, box.left :][: box.height, : box.width]
        out.append(cv2.resize(part, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return out


def scale(frames: Decoded, box: Box) -> list[Frame]:
    convert, out = VideoReformatter(), []
    for frame in frames:
        down, across = SIZE / box.height, SIZE / box.width
        width, height = max(round(frame.width * across), SIZE), max(round(frame.height * down), SIZE)
        whole = convert.reformat(frame, width, height, "rgb24", interpolation="BILINEAR", threads=1).to_ndarray()
        top, left = min(round(box.top * down), height - SIZE), min(round(box.left * across), width - SIZE)
        out.append(np.ascontiguousarray(whole[top : top + SIZE, left : left + SIZE]))
    return out


def filters(frames: Decoded, box: Box) -> list[Frame]:
    graph = av.filter.Graph()
    graph.threads = 1
    first = frames[0]
    source = graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 25))
    steps = [
        graph.add("crop", f"w={box.width}:h={box.height}:x={box.left}:y={box.top}:exact=1"),
        graph.add("scale", f"w={SIZE}:h={SIZE}:flags=bilinear"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(source, *steps).configure()
    out = []
    for frame in frames:
        graph.push(frame)
        out.append(graph.pull().to_ndarray())
    return out


WAYS: dict[str, Way] = {"opencv": opencv, "area": area, "scale": scale, "filters": filters}


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_resizing_by_opencv_and_by_ffmpeg(width, height):
    cv2.setNumThreads(1)
    data, rng = DataConfig(classes=2), np.random.default_rng(1)
    boxes = [random_box(height, width, area=data.crop_area, aspect=data.crop_aspect, flip=False, rng=rng) for _ in range(CLIPS)]
    frames = decoded(width, height)
    pictures = {name: np.stack(way(frames, boxes[0])).astype(np.int16) for name, way in WAYS.items()}
    apart = {name: float(np.abs(pictures[name] - pictures["opencv"]).mean()) for name in WAYS if name != "opencv"}
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(ROUNDS):
        for name, way in WAYS.items():
            start = time.process_time()
            for box in boxes:
                way(frames, box)
            taken[name].append((time.process_time() - start) / (CLIPS * FRAMES) * 1000)
    for name in apart:
        ratios = [there / ours for ours, there in zip(taken["opencv"], taken[name], strict=True)]
        shown = f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(
            f"\n{width} x {height}: OpenCV {statistics.median(taken['opencv']):.3f} ms a frame, "
            f"{name} {statistics.median(taken[name]):.3f} ms; {shown}; {apart[name]:.1f} levels apart"
        )
    assert max(apart.values()) < LIMIT
