"""Boxes and their pictures, against torchvision's."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from vidfuse.data.transforms import Box, centre_box, crop_resize, random_box

FRAME = np.random.default_rng(0).integers(0, 256, (240, 432, 3), np.uint8)


def _cropped(frame, box, size):
    out = np.full((size, size, 3), 77, np.uint8)
    crop_resize(frame, box, out)
    return out


def _torchvision(frame, box, size):
    image = torch.from_numpy(frame).permute(2, 0, 1)
    out = tv.resized_crop(image, box.top, box.left, box.height, box.width, [size, size], antialias=False)
    return (tv.horizontal_flip(out) if box.mirrored else out).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    "box",
    [
        Box(0, 0, 240, 432),
        Box(3, 50, 231, 301, mirrored=True),
        Box(7, 11, 224, 224),
        Box(20, 30, 112, 160),
        Box(0, 1, 200, 431),
    ],
    ids=str,
)
def test_a_crop_is_torchvisions(box):
    """Bilinear: rounding may differ by one of 255."""
    out = _cropped(FRAME, box, 224)
    assert np.abs(out.astype(int) - _torchvision(FRAME, box, 224)).max() <= 1


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_crop_that_shrinks_much_is_the_mean_of_its_pixels(factor):
    """Each halving may round."""
    side = 30
    box = Box(0, 5, factor * side, factor * side)
    part = FRAME[: factor * side, 5 : 5 + factor * side].reshape(side, factor, side, factor, 3)
    assert np.abs(_cropped(FRAME, box, side) - part.mean(axis=(1, 3))).max() <= 0.51 * math.log2(factor)


@pytest.mark.parametrize("size", [31, 50, 70, 100, 112, 118, 130, 224])
@pytest.mark.parametrize("height", [90, 240])
def test_each_pixel_of_a_crop_counts(size, height):
    """Whatever it shrinks by, and also where it is stretched in height: nothing is stepped over."""
    for column in range(60, 100):
        frame = np.zeros((240, 432, 3), np.uint8)
        frame[:, column] = 255
        assert _cropped(frame, Box(0, 0, height, 239), size).any(), column


@pytest.mark.parametrize(("height", "width", "size"), [(1079, 1440, 224), (720, 731, 224), (455, 560, 224), (1001, 333, 112)])
def test_a_crop_that_shrinks_much_is_near_the_area_that_its_pixels_cover(height, width, size):
    """Of a soft picture, against OpenCV's own way by area; a crop shifted by a pixel of its own differs by more."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    frame = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    wanted = cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA).astype(int)
    error = np.abs(_cropped(frame, Box(0, 0, height, width), size) - wanted).mean()
    assert error < 1 and error < 0.2 * np.abs(np.roll(wanted, 1, axis=1) - wanted).mean()


def test_random_boxes_are_drawn_as_torchvision_draws_them():
    """Shares of the area and ratios of the sides: the same quartiles."""
    area, aspect, rng = (0.2, 1.0), (0.75, 1.3333), np.random.default_rng(0)
    torch.manual_seed(0)
    ours = [random_box(240, 432, area=area, aspect=aspect, flip=True, rng=rng) for _ in range(4000)]
    image = torch.empty(3, 240, 432)
    theirs = [RandomResizedCrop(8, scale=area, ratio=aspect).make_params([image]) for _ in range(4000)]
    for box in ours:
        assert box.top >= 0 and box.top + box.height <= 240 and box.left >= 0 and box.left + box.width <= 432
    assert 0.45 < np.mean([box.mirrored for box in ours]) < 0.55
    for of_box in (lambda h, w: h * w / (240 * 432), lambda h, w: w / h):
        quartiles = [
            np.percentile([of_box(b.height, b.width) for b in ours], [25, 50, 75]),
            np.percentile([of_box(b["height"], b["width"]) for b in theirs], [25, 50, 75]),
        ]
        np.testing.assert_allclose(*quartiles, rtol=0.05)


def test_a_frame_that_no_random_box_fits_gives_its_centre():
    box = random_box(10, 1000, area=(0.9, 1.0), aspect=(0.9, 1.1), flip=False, rng=np.random.default_rng(0))
    assert box == centre_box(10, 1000) == Box(0, 495, 10, 10)


def test_crops_of_a_test_are_spread_over_the_longer_side():
    assert [centre_box(240, 432, crop=crop, crops=3) for crop in range(3)] == [
        Box(0, 0, 240, 240),
        Box(0, 96, 240, 240),
        Box(0, 192, 240, 240),
    ]
