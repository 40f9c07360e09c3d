"""Which transforms a training clip goes through, drawn from a generator; and the clip after them.

Comes in: an `Augment` and a random generator. Goes out: `Change`s, each a function of `pixels` with its parameters, and a clip
uint8 [T, H, W, 3]. What is drawn depends on the generator and the clip's size alone, never on the pixels, and holds for all frames.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vidfuse.config import Augment, Erasing, Jitter, RandAugment
from vidfuse.data import pixels
from vidfuse.data.pixels import Clip

OPERATIONS: dict[str, Callable[..., Clip]] = {
    name: made
    for name, made in inspect.getmembers(pixels, inspect.isfunction)
    if made.__module__ == pixels.__name__ and not name.startswith("_")
}
"""Transforms by name."""
TRIES = 10
"""Rectangles that are drawn before erasing is given up, as in timm."""


class Change(NamedTuple):
    """A transform with its parameters."""

    name: str
    """One of `OPERATIONS`."""
    values: Mapping[str, Any]

    def __str__(self) -> str:
        said = (f"{k} {v:.2f}".rstrip("0").rstrip(".") if isinstance(v, float) else f"{k} {v}" for k, v in self.values.items())
        return f"{self.name}: {', '.join(said)}" if self.values else self.name


def apply(clip: Clip, changes: Sequence[Change]) -> Clip:
    """The clip [T, H, W, 3] after all changes, in order; what came in is left as it is."""
    for change in changes:
        clip = OPERATIONS[change.name](clip, **change.values)
    return clip


def draw(augment: Augment, size: int, rng: np.random.Generator) -> tuple[Change, ...]:
    """The changes of one clip of `size` x `size` pixels, in the order in which they are made."""
    return tuple(_draw(augment, size, rng))


def _draw(augment: Augment, size: int, rng: np.random.Generator) -> Iterator[Change]:
    if augment.rotation_degrees:
        yield Change("rotate", {"degrees": float(rng.uniform(-augment.rotation_degrees, augment.rotation_degrees))})
    if augment.rand_augment is not None:
        yield from _rand_augment(augment.rand_augment, rng)
    if augment.jitter is not None and rng.random() < augment.jitter.probability:
        yield from _jitter(augment.jitter, rng)
    if augment.grayscale and rng.random() < augment.grayscale:
        yield Change("grayscale", {})
    if augment.blur is not None and rng.random() < augment.blur.probability:
        yield Change("blur", {"sigma": float(rng.uniform(*augment.blur.sigma))})
    if augment.erasing is not None and rng.random() < augment.erasing.probability:
        yield from _erasing(augment.erasing, size, rng)


def _jitter(jitter: Jitter, rng: np.random.Generator) -> Iterator[Change]:
    """Factors and their random order are torchvision's `ColorJitter`."""
    drawn = []
    for name in ("brightness", "contrast", "saturation"):
        if spread := getattr(jitter, name):
            drawn.append(Change(name, {"factor": float(rng.uniform(max(0.0, 1 - spread), 1 + spread))}))
    if jitter.hue:
        drawn.append(Change("hue", {"shift": float(rng.uniform(-jitter.hue, jitter.hue))}))
    yield from (drawn[place] for place in rng.permutation(len(drawn)))


def _signed(most: float) -> Callable[[float, np.random.Generator], float]:
    return lambda level, rng: level / 10 * most * (1 if rng.random() < 0.5 else -1)


def _factor(level: float, rng: np.random.Generator) -> float:
    return max(0.1, 1 + _signed(0.9)(level, rng))


RAND_AUGMENT: dict[str, tuple[str | None, Callable[[float, np.random.Generator], float | int]]] = {
    "autocontrast": (None, lambda level, rng: 0),
    "equalize": (None, lambda level, rng: 0),
    "invert": (None, lambda level, rng: 0),
    "rotate": ("degrees", _signed(30.0)),
    "posterize": ("bits", lambda level, rng: 4 - int(level / 10 * 4)),
    "solarize": ("threshold", lambda level, rng: 256 - min(256, int(level / 10 * 256))),
    "solarize_add": ("add", lambda level, rng: min(128, int(level / 10 * 110))),
    "saturation": ("factor", _factor),
    "contrast": ("factor", _factor),
    "brightness": ("factor", _factor),
    "sharpness": ("factor", _factor),
    "shear_x": ("slope", _signed(0.3)),
    "shear_y": ("slope", _signed(0.3)),
    "translate_x": ("share", _signed(0.45)),
    "translate_y": ("share", _signed(0.45)),
}
"""Transforms of RandAugment (Cubuk et al. 2019, arXiv:1909.13719) with their parameter at a level of 0 to 10: the set and the
levels of timm's `rand-...-inc1`, which VideoMAE and CAST train with."""


def _rand_augment(policy: RandAugment, rng: np.random.Generator) -> Iterator[Change]:
    names = tuple(RAND_AUGMENT)
    for _ in range(policy.operations):
        name = names[int(rng.integers(len(names)))]
        if rng.random() >= policy.probability:
            continue
        level = float(np.clip(rng.normal(policy.magnitude, policy.deviation), 0, 10))
        parameter, value_at = RAND_AUGMENT[name]
        yield Change(name, {} if parameter is None else {parameter: value_at(level, rng)})


def _erasing(erasing: Erasing, size: int, rng: np.random.Generator) -> Iterator[Change]:
    for _ in range(erasing.count):
        for _ in range(TRIES):
            area = rng.uniform(*erasing.area) * size * size / erasing.count
            aspect = math.exp(rng.uniform(math.log(erasing.aspect[0]), math.log(erasing.aspect[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < height < size and 0 < width < size:
                top, left = int(rng.integers(size - height + 1)), int(rng.integers(size - width + 1))
                place = {"top": top, "left": left, "height": height, "width": width}
                yield Change("erase", {**place, "mode": erasing.mode, "noise": int(rng.integers(2**31))})
                break
