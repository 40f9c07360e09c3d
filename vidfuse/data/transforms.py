"""Spatial augmentation: which part of a frame, and the part at its size.

Comes in: frames uint8 [H, W, 3] and a random generator. Goes out: boxes and frames uint8 [size, size, 3]. The same box holds
for all frames of a clip. Normalisation happens on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vidfuse.data.opencv import cv2


@dataclass(frozen=True)
class Box:
    """Part of a frame, in pixels, and whether it is mirrored left-right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


def random_box(
    height: int, width: int, *, area: tuple[float, float], aspect: tuple[float, float], flip: bool, rng: np.random.Generator
) -> Box:
    """A random part for training ("random resized crop": Szegedy et al. 2014, section 6; ten tries, as torchvision's, then the centre).

    Args:
        height: of the frame, pixels.
        width: of the frame, pixels.
        area: smallest and largest share of the frame's area.
        aspect: smallest and largest width : height; drawn uniformly in its logarithm.
        flip: whether the part is mirrored half of the time.
        rng: source of the draws.
    """
    mirrored = bool(flip and rng.random() < 0.5)
    for _ in range(10):
        target = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return Box(top, left, h, w, mirrored)
    return centre_box(height, width, mirrored=mirrored)


def centre_box(height: int, width: int, *, crop: int = 0, crops: int = 1, mirrored: bool = False) -> Box:
    """The largest square of a frame: in the centre, or number `crop` of `crops` evenly spaced along the longer side."""
    side = min(height, width)
    place = 0.5 if crops == 1 else crop / (crops - 1)
    return Box(round((height - side) * place), round((width - side) * place), side, side, mirrored)


def crop_resize(frame: npt.NDArray[np.uint8], box: Box, out: npt.NDArray[np.uint8]) -> None:
    """Fill `out` [size, size, 3] with a part of a frame [H, W, 3]: bilinear, after sides were halved that shrink by half or more.

    Up to a half, each pixel of the part still counts in bilinear interpolation. Halvings before it, as in a mip map (Williams 1983), take
    a fifth of the time of OpenCV's area, which is not vectorised for other than whole factors (`tests/bench/test_resize.py`).

    Args:
        frame: the whole of it.
        box: the part.
        out: without gaps in memory: OpenCV would fill a copy of any other.
    """
    assert out.flags.c_contiguous
    size = len(out)
    part = frame[box.top : box.top + box.height, box.left : box.left + box.width]
    while max(part.shape[:2]) >= 2 * size:
        height, width = (math.ceil(side / 2) if side >= 2 * size else side for side in part.shape[:2])
        part = cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)
    cv2.resize(part, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)
    if box.mirrored:  # a mirrored view of NumPy's, copied, takes three times as long as all of the rest
        cv2.flip(out, 1, dst=out)
