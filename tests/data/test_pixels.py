"""Each transform of pixels against torchvision's (or timm's) own; and what holds for all of them."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from vidfuse.data import pixels
from vidfuse.data.augment import OPERATIONS

BILINEAR = F.InterpolationMode.BILINEAR


def smooth(frames: int = 4, height: int = 40, width: int = 48) -> np.ndarray:
    """A clip of smooth random colours over the whole range, as videos have."""
    coarse = np.random.default_rng(0).integers(0, 256, (frames, 6, 7, 3), dtype=np.uint8)
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in coarse])


CLIP = smooth()
DARK = (smooth() // 2 + 30).astype(np.uint8)
"""Does not use the whole range, so that there is something to stretch."""


def theirs(function, clip, *, whole: bool = False):
    """torchvision's function of a clip; `whole`: of the clip as one picture, since ours look at the whole clip."""
    shaped = clip.reshape(1, -1, *clip.shape[2:]) if whole else clip
    return function(torch.from_numpy(shaped).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy().reshape(clip.shape)


def far(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


POINTWISE = {
    "brightness": (lambda c: pixels.brightness(c, factor=1.37), lambda t: F.adjust_brightness(t, 1.37), 0),
    "darkness": (lambda c: pixels.brightness(c, factor=0.4), lambda t: F.adjust_brightness(t, 0.4), 0),
    "contrast": (lambda c: pixels.contrast(c, factor=1.4), lambda t: F.adjust_contrast(t, 1.4), 1),
    "less contrast": (lambda c: pixels.contrast(c, factor=0.3), lambda t: F.adjust_contrast(t, 0.3), 1),
    "saturation": (lambda c: pixels.saturation(c, factor=1.4), lambda t: F.adjust_saturation(t, 1.4), 1),
    "less saturation": (lambda c: pixels.saturation(c, factor=0.2), lambda t: F.adjust_saturation(t, 0.2), 2),
    "grayscale": (pixels.grayscale, lambda t: F.rgb_to_grayscale(t, 3), 1),
    "invert": (pixels.invert, F.invert, 0),
    "posterize": (lambda c: pixels.posterize(c, bits=3), lambda t: F.posterize(t, 3), 0),
    "posterize to nothing": (lambda c: pixels.posterize(c, bits=0), lambda t: F.posterize(t, 0), 0),
    "solarize": (lambda c: pixels.solarize(c, threshold=77), lambda t: F.solarize(t, 77), 0),
    "autocontrast": (pixels.autocontrast, F.autocontrast, 1),
    "equalize": (pixels.equalize, F.equalize, 0),
}


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("clip", [CLIP, DARK], ids=["bright", "dark"])
def test_colours_are_torchvisions_up_to_rounding(name, clip):
    ours, reference, within = POINTWISE[name]
    assert far(ours(clip), theirs(reference, clip, whole=True)).max() <= within


@pytest.mark.parametrize("shift", [-0.4, -0.1, 0.05, 0.3])
def test_hue_is_torchvisions_up_to_steps_of_the_circle(shift):
    """OpenCV's circle has 256 steps of 6 levels, and there and back are rounded; torchvision's are fractions."""
    difference = far(pixels.hue(CLIP, shift=shift), theirs(lambda t: F.adjust_hue(t, shift), CLIP))
    assert difference.max() <= 12 and difference.mean() < 1.5


def test_solarize_add_is_timms():
    from PIL import Image
    from timm.data.auto_augment import solarize_add

    reference = np.stack([np.asarray(solarize_add(Image.fromarray(frame), 60)) for frame in CLIP])
    assert np.array_equal(pixels.solarize_add(CLIP, add=60), reference)


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.9])
def test_sharpness_is_torchvisions(factor):
    assert far(pixels.sharpness(CLIP, factor=factor), theirs(lambda t: F.adjust_sharpness(t, factor), CLIP)).max() <= 1


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_torchvisions(sigma):
    side = pixels.math.ceil(3 * sigma) * 2 + 1
    assert far(pixels.blur(CLIP, sigma=sigma), theirs(lambda t: F.gaussian_blur(t, side, sigma), CLIP)).max() <= 2


def affine(angle=0.0, translate=(0, 0), shear=(0.0, 0.0), center=None):
    """torchvision's affine transform, bilinear, over grey."""
    settings = {"angle": angle, "translate": list(translate), "scale": 1.0, "shear": list(shear), "center": center}
    return lambda t: F.affine(t, **settings, interpolation=BILINEAR, fill=[128.0] * 3)


PLACES = {
    "rotate": (lambda c: pixels.rotate(c, degrees=17.0), lambda t: F.rotate(t, 17.0, BILINEAR, fill=[128.0] * 3)),
    "rotate back": (lambda c: pixels.rotate(c, degrees=-30.0), affine(30.0)),
    "translate_x": (lambda c: pixels.translate_x(c, share=0.25), affine(translate=(-12, 0))),
    "translate_y": (lambda c: pixels.translate_y(c, share=-0.25), affine(translate=(0, 10))),
    "shear_x": (
        lambda c: pixels.shear_x(c, slope=0.3),
        affine(shear=(np.degrees(np.arctan(0.3)), 0.0), center=[0.5, 0.5]),
    ),
    "shear_y": (
        lambda c: pixels.shear_y(c, slope=-0.3),
        affine(shear=(0.0, np.degrees(np.arctan(-0.3))), center=[0.5, 0.5]),
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_places_are_torchvisions(name):
    """Inside; at the edge of what is left empty the two blend with grey over half a pixel differently."""
    ours, reference = PLACES[name]
    difference = far(ours(CLIP), theirs(reference, CLIP))
    assert np.quantile(difference, 0.95) <= 3 and difference.mean() < 2


def test_translation_fills_with_grey():
    moved = pixels.translate_x(CLIP, share=0.25)
    assert np.array_equal(moved[:, :, :36], CLIP[:, :, 12:]) and (moved[:, :, 36:] == 128).all()


@pytest.mark.parametrize("mode", ["rand", "const"])
def test_erasing_is_torchvisions(mode):
    ours = pixels.erase(CLIP, top=5, left=7, height=20, width=11, mode=mode, noise=3)
    colour = torch.from_numpy(ours[0, 5, 7].copy()).reshape(3, 1, 1)
    assert np.array_equal(ours, theirs(lambda t: F.erase(t, 5, 7, 20, 11, colour), CLIP))


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_a_rectangle_is_erased_in_all_frames_and_nothing_else(mode):
    erased = pixels.erase(CLIP, top=5, left=7, height=20, width=11, mode=mode, noise=3)
    kept = np.ones(CLIP.shape, bool)
    kept[:, 5:25, 7:18] = False
    assert np.array_equal(erased[kept], CLIP[kept])
    inside = erased[:, 5:25, 7:18].reshape(-1, 3)
    colours = len(np.unique(inside, axis=0))
    assert colours == 1 if mode != "pixel" else colours > 500
    if mode == "const":
        assert inside[0].tolist() == [124, 116, 104]
    if mode == "pixel":  # ImageNet's colours; what is normal is cut to 0..255
        assert np.allclose(inside.mean(0), pixels.MEAN, atol=6) and np.allclose(inside.std(0), pixels.DEVIATION, atol=8)


VALUES = {
    "brightness": {"factor": 1.2}, "contrast": {"factor": 1.2}, "saturation": {"factor": 1.2}, "hue": {"shift": 0.1},
    "grayscale": {}, "invert": {}, "posterize": {"bits": 4}, "solarize": {"threshold": 100.0}, "solarize_add": {"add": 40},
    "autocontrast": {}, "equalize": {}, "sharpness": {"factor": 1.5}, "blur": {"sigma": 1.0}, "rotate": {"degrees": 10.0},
    "shear_x": {"slope": 0.2}, "shear_y": {"slope": 0.2}, "translate_x": {"share": 0.1}, "translate_y": {"share": 0.1},
    "erase": {"top": 1, "left": 2, "height": 9, "width": 8, "mode": "pixel", "noise": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_are_pure_and_treat_all_frames_alike(name):
    """Twice the same, the clip that was given untouched, uint8 of the same shape; equal frames stay equal (noise aside)."""
    still = np.repeat(CLIP[:1], 3, axis=0)
    before = still.copy()
    once, twice = (OPERATIONS[name](still, **VALUES[name]) for _ in range(2))
    assert np.array_equal(once, twice) and np.array_equal(still, before)
    assert once.dtype == np.uint8 and once.shape == still.shape and once is not still
    if name != "erase":
        assert (once == once[:1]).all()
    turned = np.ascontiguousarray(CLIP[:, :, ::-1])[:, :, ::-1]  # a clip that is not contiguous
    assert np.array_equal(OPERATIONS[name](turned, **VALUES[name]), OPERATIONS[name](CLIP, **VALUES[name]))


def test_a_clip_of_one_colour_survives():
    flat = np.full((2, 16, 16, 3), 90, np.uint8)
    for name in ("autocontrast", "equalize"):
        assert np.array_equal(OPERATIONS[name](flat), flat)
