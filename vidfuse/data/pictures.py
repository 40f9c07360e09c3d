"""Textured objects and backgrounds, and frames as H.264 or VP9: what the synthetic videos are painted and encoded with.

Comes in: a random generator and what a thing looks like, or frames. Goes out: pictures (RGB, uint8), or encoded bytes. The
quantiser of both encoders is constant, and neither looks ahead: a frame's quality does not depend on what comes after it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import av
import numpy as np
import numpy.typing as npt

from vidfuse.data.opencv import cv2

Image = npt.NDArray[np.uint8]

PATCH = 96
"""Side of the square on which an object is painted, pixels."""
COLOURS = {
    "red": (205, 40, 40),
    "orange": (235, 135, 30),
    "yellow": (235, 215, 60),
    "green": (50, 155, 60),
    "cyan": (60, 190, 200),
    "blue": (45, 75, 200),
    "purple": (130, 60, 165),
    "pink": (235, 135, 180),
    "brown": (120, 75, 45),
    "black": (30, 30, 34),
    "grey": (130, 130, 130),
    "white": (235, 235, 230),
}
PATTERNS = ("striped", "checked", "spotted", "halved", "marbled")
SHAPES = ("disc", "box", "triangle", "star", "cross", "pebble")


@dataclass(frozen=True)
class Thing:
    """An object."""

    picture: Image
    """[96, 96, 4] RGB, and how much it covers the background (0..255)."""


def encode(
    frames: Iterator[Image] | Sequence[Image], *, height: int, width: int, fps: int, codec: Literal["h264", "vp9"]
) -> bytes:
    """Encode frames, the same bytes for the same frames.

    The quantiser is constant, there are no B-frames and no look-ahead, so a frame's quality says nothing of later frames.

    Args:
        frames: in order, each [height, width, 3] RGB.
        height: pixels.
        width: pixels.
        fps: frames a second.
        codec: `h264` in MP4 (x264), or `vp9` in WebM (libvpx).
    """
    target = io.BytesIO()
    container, name, options = {
        "h264": ("mp4", "libx264", {"preset": "ultrafast", "qp": "26", "g": "48", "bf": "0", "threads": "1"}),
        "vp9": ("webm", "libvpx-vp9", _VP9),
    }[codec]
    with av.open(target, "w", format=container, options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream(name, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(cv2.cvtColor(frame, cv2.COLOR_RGB2YUV_I420), format="yuv420p")
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    return target.getvalue()


_VP9 = {
    "deadline": "realtime",
    "cpu-used": "8",
    "lag-in-frames": "0",
    "b:v": "0",
    "crf": "30",
    "qmin": "30",
    "qmax": "30",
    "g": "48",
    "threads": "1",
    "row-mt": "0",
}


def lay(frame: Image, thing: Thing, centre: tuple[float, float], radius: float, turn: float, opacity: float) -> None:
    """Paint an object onto the frame, in place; a positive turn is clockwise."""
    height, width = frame.shape[:2]
    reach = 1.45 * radius
    x0, x1 = max(int(centre[0] - reach), 0), min(int(centre[0] + reach) + 2, width)
    y0, y1 = max(int(centre[1] - reach), 0), min(int(centre[1] + reach) + 2, height)
    if opacity <= 0 or x0 >= x1 or y0 >= y1:
        return
    scale, half = 2 * radius / PATCH, (PATCH - 1) / 2
    c, s = math.cos(turn) * scale, math.sin(turn) * scale
    to_frame = np.array([[c, -s, centre[0] - x0 - (c - s) * half], [s, c, centre[1] - y0 - (s + c) * half]])
    size = (x1 - x0, y1 - y0)
    laid = cv2.warpAffine(thing.picture, to_frame, size, flags=cv2.INTER_LINEAR)
    cover = laid[..., 3] * np.float32(opacity / 255)
    region = frame[y0:y1, x0:x1]
    region[:] = cv2.blendLinear(cv2.cvtColor(laid, cv2.COLOR_RGBA2RGB), np.ascontiguousarray(region), cover, 1 - cover)


def paint_background(rng: np.random.Generator, height: int, width: int) -> Image:
    """[height, width, 3]: two random colours mixed by noise of three sizes and by a random pattern."""
    field = _noise(rng, height, width, cells=int(rng.integers(4, 8)))
    for cells, share in ((16, 0.45), (48, 0.3)):
        field = cv2.addWeighted(field, 1 - share, _noise(rng, height, width, cells=cells), share, 0)
    pattern = _pattern(rng, str(rng.choice(PATTERNS)), height, width, period=float(rng.uniform(24, 70)))
    share = rng.uniform(0.1, 0.5)
    return _coloured(cv2.addWeighted(field, 1 - share, pattern, share, 0), rng.integers(30, 226, 3), rng.integers(30, 226, 3))


def paint_thing(rng: np.random.Generator, look: tuple[str, str, str]) -> Thing:
    """An object of a colour, a pattern and a shape (of `COLOURS`, `PATTERNS`, `SHAPES`); details are drawn at random."""
    colour, pattern, shape = look
    main = np.clip(np.array(COLOURS[colour]) + rng.integers(-18, 19, 3), 0, 255)
    contrast = rng.uniform(0.15, 0.4)
    second = main * contrast if main.mean() > 110 else 255 - (255 - main) * contrast
    field = _pattern(rng, pattern, PATCH, PATCH, period=float(rng.uniform(44, 80)))
    picture = _coloured(field, second, main)
    outline = _outline(rng, shape)
    cv2.polylines(picture, [outline], True, [int(v) for v in second], thickness=5, lineType=cv2.LINE_AA, shift=4)
    cover = np.zeros((PATCH, PATCH), np.uint8)
    cv2.fillPoly(cover, [outline], 255, lineType=cv2.LINE_AA, shift=4)
    return Thing(np.dstack([picture, cv2.blur(cover, (3, 3))]))


def _outline(rng: np.random.Generator, shape: str) -> npt.NDArray[np.int32]:
    """Corners [N, 2] of a shape on its patch, in sixteenths of a pixel."""
    angle = np.arange(48) * (2 * math.pi / 48)
    if shape == "cross":
        arm = rng.uniform(0.3, 0.45)
        corner = np.array([[1, arm], [arm, arm], [arm, 1]])
        quarter = np.array([[0, -1], [1, 0]])
        points = np.concatenate([corner @ np.linalg.matrix_power(quarter.T, k) for k in range(4)]) * 0.92
    elif shape == "box":
        points = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [0.75, rng.uniform(0.5, 0.75)]
    elif shape in ("triangle", "star"):
        corners = 3 if shape == "triangle" else 10
        angle = np.arange(corners) * (2 * math.pi / corners)
        lengths = np.where(np.arange(corners) % 2, rng.uniform(0.45, 0.65), 0.97) if shape == "star" else np.full(3, 0.97)
        points = np.stack([np.sin(angle), -np.cos(angle)], 1) * lengths[:, None]
    else:
        wobble = sum(np.cos(k * angle + rng.uniform(0, 2 * math.pi)) * rng.uniform(0, 0.12) for k in (2, 3, 5))
        lengths = np.full(48, 0.92) if shape == "disc" else 0.72 + wobble
        points = np.stack([np.cos(angle), np.sin(angle)], 1) * lengths[:, None]
    return np.round((points * PATCH / 2 + (PATCH - 1) / 2) * 16).astype(np.int32)


def _pattern(rng: np.random.Generator, name: str, height: int, width: int, *, period: float) -> Image:
    """[height, width] values 0..255: a pattern at a random angle and offset, `period` pixels long."""
    if name == "marbled":
        return _noise(rng, height, width, cells=max(3, round(height / period * 1.5)))
    turn, offset = rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi, 2)
    y, x = np.ogrid[:height, :width]
    k = 2 * math.pi / period
    u = (k * math.cos(turn)) * (x - width / 2).astype(np.float32) + (k * math.sin(turn)) * (y - height / 2).astype(np.float32)
    if name == "halved":
        return np.where(u > 0, 255, 0).astype(np.uint8)
    first = np.sin(u + np.float32(offset[0]))
    if name == "striped":
        return np.where(first > 0, 255, 0).astype(np.uint8)
    v = (k * math.cos(turn)) * (y - height / 2).astype(np.float32) - (k * math.sin(turn)) * (x - width / 2).astype(np.float32)
    product = first * np.sin(v + np.float32(offset[1]))
    return np.where(product > (0 if name == "checked" else 0.35), 255, 0).astype(np.uint8)


def _noise(rng: np.random.Generator, height: int, width: int, *, cells: int) -> Image:
    """[height, width] smooth random values over 0..255, about `cells` grains high."""
    grid = rng.integers(0, 256, (cells, max(2, round(cells * width / height))), dtype=np.uint8)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _coloured(field: Image, low: npt.ArrayLike, high: npt.ArrayLike) -> Image:
    """Values [H, W] of 0..255 to RGB [H, W, 3] between two colours."""
    share = np.linspace(0, 1, 256)[:, None]
    table = np.asarray(low) * (1 - share) + np.asarray(high) * share
    return cv2.LUT(cv2.merge([field] * 3), np.round(table).astype(np.uint8)[:, None, :])
