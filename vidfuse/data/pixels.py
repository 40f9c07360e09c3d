"""Transforms of a clip's pixels, each a pure function of the clip and its parameters.

Axes: T frames, H height, W width, 3 colours. Comes in: a clip uint8 [T, H, W, 3]. Goes out: a new one; what came in is left as it is.
All frames are treated alike: where a transform looks at the picture (contrast, equalisation), it looks at the whole clip, which
is then one tall picture [T x H, W, 3], so that nothing flickers.

Each is OpenCV's, and equals torchvision's function of the same name up to rounding (`tests/data/test_pixels.py`). OpenCV and not
torchvision or Kornia: measured side by side on CPU (`tests/bench/test_augment.py`) it is the fastest of the three, and reading
tasks stay free of torch, whose import costs each of them seconds and half a gigabyte. Placement on a GPU was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from vidfuse.data.opencv import cv2

Clip = npt.NDArray[np.uint8]
GREY = np.array([0.299, 0.587, 0.114])
"""Share of red, green and blue in luma (ITU-R BT.601)."""
FILL = 128
"""Colour of what a geometric transform leaves empty, as in timm's RandAugment."""
MEAN, DEVIATION = np.array([0.485, 0.456, 0.406]) * 255, np.array([0.229, 0.224, 0.225]) * 255
"""Of ImageNet's colours: noise that erases is normal around them, as timm's is after normalisation."""
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13
"""PIL's `ImageFilter.SMOOTH`."""

# --- colours ---


def brightness(clip: Clip, *, factor: float) -> Clip:
    """Colours times `factor`."""
    return _mapped(clip, np.arange(256) * factor)


def contrast(clip: Clip, *, factor: float) -> Clip:
    """Distance of colours from the clip's mean luma times `factor`."""
    mean = float(cv2.cvtColor(_tall(clip), cv2.COLOR_RGB2GRAY).mean())
    return _mapped(clip, np.arange(256) * factor + (1 - factor) * mean)


def saturation(clip: Clip, *, factor: float) -> Clip:
    """Distance of colours from their own luma times `factor`."""
    matrix = np.eye(3) * factor + (1 - factor) * GREY
    return cv2.transform(_tall(clip), matrix).reshape(clip.shape)


def hue(clip: Clip, *, shift: float) -> Clip:
    """Turn the colour circle (HSV) by `shift` turns, -0.5 to 0.5; in steps of 1/256 turn."""
    hsv = cv2.cvtColor(_tall(clip), cv2.COLOR_RGB2HSV_FULL)
    table = np.stack([np.arange(256) + round(shift * 256), np.arange(256), np.arange(256)], -1) % 256
    turned = cv2.LUT(hsv, table.astype(np.uint8)[None])
    return cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL).reshape(clip.shape)


def grayscale(clip: Clip) -> Clip:
    """Luma in all three colours."""
    return cv2.cvtColor(cv2.cvtColor(_tall(clip), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).reshape(clip.shape)


def invert(clip: Clip) -> Clip:
    """The negative."""
    return 255 - clip


def posterize(clip: Clip, *, bits: int) -> Clip:
    """Only the `bits` highest bits of each colour."""
    return clip & np.uint8(256 - (1 << (8 - bits)))


def solarize(clip: Clip, *, threshold: float) -> Clip:
    """The negative of colours that are at least `threshold`, 0 to 256."""
    values = np.arange(256)
    return _mapped(clip, np.where(values >= threshold, 255 - values, values))


def solarize_add(clip: Clip, *, add: int) -> Clip:
    """`add` more of colours below 128 (of timm's RandAugment; torchvision has none)."""
    values = np.arange(256)
    return _mapped(clip, np.where(values < 128, values + add, values))


def autocontrast(clip: Clip) -> Clip:
    """Each colour stretched to 0..255 over the clip."""
    colours = cv2.split(_tall(clip))
    low, high = (np.array([float(edge(colour)) for colour in colours]) for edge in (np.min, np.max))
    stretched = (np.arange(256)[:, None] - low) * (255 / np.maximum(high - low, 1))
    return _mapped(clip, np.where(high > low, stretched, np.arange(256)[:, None]))


def equalize(clip: Clip) -> Clip:
    """Each colour mapped so that its histogram over the clip is flat, as PIL does it."""
    tables = []
    for colour in cv2.split(_tall(clip)):
        counts = np.bincount(colour.reshape(-1), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        tables.append((below + step // 2) // step if step else np.arange(256))
    return _mapped(clip, np.stack(tables, -1))


# --- neighbourhoods ---


def sharpness(clip: Clip, *, factor: float) -> Clip:
    """Blend with a smoothed clip: 0 is smoothed, 1 as it was, 2 sharpened; the outermost pixels stay."""
    tall = _tall(clip)
    mixed = cv2.addWeighted(tall, factor, cv2.filter2D(tall, -1, SMOOTH), 1 - factor, 0).reshape(clip.shape)
    out = clip.copy()
    out[:, 1:-1, 1:-1] = mixed[:, 1:-1, 1:-1]
    return out


def blur(clip: Clip, *, sigma: float) -> Clip:
    """Gaussian blur of `sigma` pixels, cut off at three of them."""
    side = 2 * math.ceil(3 * sigma) + 1
    return _framewise(clip, lambda frame: cv2.GaussianBlur(frame, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101))


# --- places ---


def rotate(clip: Clip, *, degrees: float) -> Clip:
    """Turn counter-clockwise around the middle."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _moved(clip, ((c, -s), (s, c)))


def shear_x(clip: Clip, *, slope: float) -> Clip:
    """Rows move by `slope` times their distance from the top, to the left if it is positive."""
    return _moved(clip, ((1.0, slope), (0.0, 1.0)), middle=(0.0, 0.0))


def shear_y(clip: Clip, *, slope: float) -> Clip:
    """Columns move by `slope` times their distance from the left, up if it is positive."""
    return _moved(clip, ((1.0, 0.0), (slope, 1.0)), middle=(0.0, 0.0))


def translate_x(clip: Clip, *, share: float) -> Clip:
    """Move by a share of the width, to the left if it is positive."""
    return _moved(clip, ((1.0, 0.0), (0.0, 1.0)), offset=(share * clip.shape[2], 0.0))


def translate_y(clip: Clip, *, share: float) -> Clip:
    """Move by a share of the height, up if it is positive."""
    return _moved(clip, ((1.0, 0.0), (0.0, 1.0)), offset=(0.0, share * clip.shape[1]))


def erase(
    clip: Clip, *, top: int, left: int, height: int, width: int, mode: Literal["pixel", "rand", "const"], noise: int
) -> Clip:
    """Erase one rectangle in all frames (Zhong et al. 2017, arXiv:1708.04896; modes are timm's, the cube through time VideoMAE's).

    Args:
        clip: [T, H, W, 3].
        top: of the rectangle, pixels.
        left: of the rectangle, pixels.
        height: of the rectangle, pixels.
        width: of the rectangle, pixels.
        mode: `pixel`: noise, drawn for every pixel of every frame; `rand`: one random colour; `const`: ImageNet's mean colour.
        noise: seed of what is drawn.
    """
    rng = np.random.default_rng(noise)
    shape = {"pixel": (len(clip), height, width, 3), "rand": (3,), "const": ()}[mode]
    drawn = rng.standard_normal(shape, np.float32) if shape else np.float32(0)
    out = clip.copy()
    out[:, top : top + height, left : left + width] = np.clip(np.rint(MEAN + DEVIATION * drawn), 0, 255)
    return out


def _tall(clip: Clip) -> Clip:
    """The clip as one picture, frames below each other."""
    return np.ascontiguousarray(clip).reshape(-1, *clip.shape[2:])


def _mapped(clip: Clip, values: npt.NDArray[np.generic]) -> Clip:
    """Look each colour up in `values` [256] or, by colour, [256, 3]; cut to 0..255, fractions dropped."""
    table = np.clip(values, 0, 255).astype(np.uint8)
    return cv2.LUT(_tall(clip), table if table.ndim == 1 else table[None]).reshape(clip.shape)


def _framewise(clip: Clip, change: Callable[[Clip], Clip]) -> Clip:
    out = np.empty_like(clip)
    for number, frame in enumerate(clip):
        out[number] = change(np.ascontiguousarray(frame))
    return out


def _moved(
    clip: Clip,
    matrix: tuple[tuple[float, float], tuple[float, float]],
    *,
    middle: tuple[float, float] | None = None,
    offset: tuple[float, float] = (0.0, 0.0),
) -> Clip:
    """Each pixel from the place `matrix` x (its own - middle) + middle + offset (x, y), bilinear; `FILL` from outside."""
    height, width = clip.shape[1:3]
    x, y = middle or ((width - 1) / 2, (height - 1) / 2)
    (a, b), (c, d) = matrix
    places = np.array([[a, b, x - a * x - b * y + offset[0]], [c, d, y - c * x - d * y + offset[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    fill = (FILL, FILL, FILL)
    return _framewise(
        clip,
        lambda f: cv2.warpAffine(f, places, (width, height), flags=flags, borderMode=cv2.BORDER_CONSTANT, borderValue=fill),
    )
