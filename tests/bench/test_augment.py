"""Transforms of a clip in OpenCV (ours), torchvision and, where it is installed, Kornia: milliseconds a clip on one thread.

Each starts from, and ends with, the clip as reading tasks hold it: uint8 [T, H, W, 3]. They run in turn, several times; the median
of the ratios is what counts. Run by `make bench`; Kornia is no dependency (`pip install kornia` to see its column).
"""

from __future__ import annotations

import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from vidfuse.config import Augment
from vidfuse.data import augment, pixels
from vidfuse.data.sampling import generator

pytestmark = pytest.mark.bench
FRAMES, SIZE, REPEATS = 16, 224, 5
COARSE = np.random.default_rng(0).integers(0, 256, (FRAMES, 14, 14, 3), dtype=np.uint8)
CLIP = np.stack([cv2.resize(frame, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) for frame in COARSE])
BILINEAR = F.InterpolationMode.BILINEAR


def torchvisions(function: Callable) -> Callable[[], np.ndarray]:
    return lambda: function(torch.from_numpy(CLIP).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous().numpy()


def kornias(name: str, *arguments: object) -> Callable[[], np.ndarray] | None:
    """Kornia's takes fractions; the way there and back is part of it."""
    module, _, function = name.partition(".")
    try:
        made = getattr(importlib.import_module(f"kornia.{module}"), function)
    except ImportError:
        return None

    def run() -> np.ndarray:
        clip = torch.from_numpy(CLIP).permute(0, 3, 1, 2).float() / 255
        return (made(clip, *arguments) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()

    return run


def sides() -> dict[str, tuple[Callable, Callable, Callable | None]]:
    angle = torch.tensor([15.0])
    return {
        "brightness": (
            lambda: pixels.brightness(CLIP, factor=1.3),
            torchvisions(lambda t: F.adjust_brightness(t, 1.3)),
            kornias("enhance.adjust_brightness", 0.3),
        ),
        "contrast": (
            lambda: pixels.contrast(CLIP, factor=1.3),
            torchvisions(lambda t: F.adjust_contrast(t, 1.3)),
            kornias("enhance.adjust_contrast", 1.3),
        ),
        "saturation": (
            lambda: pixels.saturation(CLIP, factor=1.3),
            torchvisions(lambda t: F.adjust_saturation(t, 1.3)),
            kornias("enhance.adjust_saturation", 1.3),
        ),
        "hue": (
            lambda: pixels.hue(CLIP, shift=0.1),
            torchvisions(lambda t: F.adjust_hue(t, 0.1)),
            kornias("enhance.adjust_hue", 0.6),
        ),
        "blur": (
            lambda: pixels.blur(CLIP, sigma=1.0),
            torchvisions(lambda t: F.gaussian_blur(t, 7, 1.0)),
            kornias("filters.gaussian_blur2d", (7, 7), (1.0, 1.0)),
        ),
        "rotate": (
            lambda: pixels.rotate(CLIP, degrees=15),
            torchvisions(lambda t: F.rotate(t, 15, BILINEAR)),
            kornias("geometry.rotate", angle),
        ),
        "sharpness": (
            lambda: pixels.sharpness(CLIP, factor=1.5),
            torchvisions(lambda t: F.adjust_sharpness(t, 1.5)),
            kornias("enhance.sharpness", 0.5),
        ),
        "equalize": (lambda: pixels.equalize(CLIP), torchvisions(F.equalize), kornias("enhance.equalize")),
        "autocontrast": (lambda: pixels.autocontrast(CLIP), torchvisions(F.autocontrast), None),
        "solarize": (
            lambda: pixels.solarize(CLIP, threshold=128),
            torchvisions(lambda t: F.solarize(t, 128)),
            kornias("enhance.solarize", 0.5),
        ),
    }


def milliseconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def test_opencv_is_the_fastest():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for name, runs in sides().items():
            times = [[milliseconds(run) if run else float("nan") for run in runs] for _ in range(REPEATS + 1)][1:]
            ours, theirs, other = (statistics.median(column) for column in zip(*times, strict=True))
            ratios.append(statistics.median(a / b for a, b, _ in times))
            print(f"\n{name:<13} OpenCV {ours:6.1f} ms, torchvision {theirs:6.1f} ms, Kornia {other:6.1f} ms", end="")
    finally:
        torch.set_num_threads(threads)
    print(f"\nOpenCV : torchvision, median of the transforms {statistics.median(ratios):.3f}")
    assert statistics.median(ratios) < 0.5


def test_what_videomaes_recipe_costs_beside_nothing():
    """The mean over 100 draws of RandAugment and erasing, a clip of 16 x 224 px."""
    recipe = Augment.model_validate({"rand_augment": {}, "erasing": {}})
    drawn = [augment.draw(recipe, SIZE, generator(0, 0, sample, 3)) for sample in range(100)]
    took = milliseconds(lambda: [augment.apply(CLIP, changes) for changes in drawn]) / 100
    print(f"\nrand-m7-n4-mstd0.5-inc1 and erasing 0.25: {took:.1f} ms a clip")


def test_reading_tasks_stay_free_of_torch():
    """What torchvision would cost each of them before its first clip: seconds, resident memory."""
    said = {}
    for name, module in (("reader", "vidfuse.data.clips"), ("torchvision", "torchvision.transforms.v2.functional")):
        facts = "time.time() - start, psutil.Process().memory_info().rss, 'torch' in sys.modules"
        code = f"import psutil, sys, time; start = time.time(); import {module}; print({facts})"
        said[name] = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        print(f"\n{name}: {float(said[name][0]):.1f} s, {int(said[name][1]) / 2**20:.0f} MiB", end="")
    assert said["reader"][2] == "False"
