"""What is drawn for a clip: a pure function of (seed, epoch, sample, repeat), within its bounds, as often as it says."""

from __future__ import annotations

import random

import numpy as np
import pytest
from torchvision.transforms.v2 import ColorJitter

from tests.data.test_repeats import reader_of
from vidfuse.config import Augment, ConfigError, from_mapping, override
from vidfuse.data import augment as module
from vidfuse.data.augment import OPERATIONS, RAND_AUGMENT, apply, draw
from vidfuse.data.clips import Part
from vidfuse.data.sampling import generator

ALL = Augment.model_validate(
    {"rotation_degrees": 15, "rand_augment": {}, "jitter": {}, "grayscale": 0.2, "blur": {}, "erasing": {"mode": "rand"}}
)


def drawn(augment: Augment, clips: int = 2000, size: int = 64):
    return [draw(augment, size, generator(0, 0, sample, 3)) for sample in range(clips)]


def test_nothing_is_drawn_by_default():
    assert draw(Augment(), 64, generator(0)) == ()


def test_draws_are_a_function_of_the_key():
    assert drawn(ALL, 50) == drawn(ALL, 50)
    assert draw(ALL, 64, generator(0, 0, 1, 3)) != draw(ALL, 64, generator(0, 1, 1, 3))


def test_shares_are_what_was_asked_for():
    found = drawn(Augment(grayscale=0.2, blur={"probability": 0.5}, erasing={"probability": 0.25}))
    for name, share in (("grayscale", 0.2), ("blur", 0.5), ("erase", 0.25)):
        count = sum(any(change.name == name for change in changes) for changes in found)
        assert abs(count / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5, name


def test_jitter_is_torchvisions_in_range_and_order():
    found = drawn(Augment(jitter={"brightness": 0.4, "contrast": 1.5, "hue": 0.1}))
    values = {
        name: [next(iter(c.values.values())) for changes in found for c in changes if c.name == name] for name in OPERATIONS
    }
    theirs = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.4, hue=0.1)
    for name in ("brightness", "contrast", "saturation", "hue"):
        low, high = getattr(theirs, name)
        assert len(values[name]) == 2000 and low <= min(values[name]) and max(values[name]) <= high
        assert abs(np.mean(values[name]) - (low + high) / 2) < 0.05 * (high - low)
    assert len({tuple(c.name for c in changes) for changes in found}) == 24  # every order of the four


def test_rand_augment_draws_as_timm_does():
    """Counts of operations made, and the level's arguments at three magnitudes, of timm's `rand-m7-n4-mstd0.5-inc1`."""
    from timm.data import auto_augment as timm

    counts = np.bincount([len(changes) for changes in drawn(Augment(rand_augment={}))], minlength=5) / 2000
    assert np.allclose(counts, [1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16], atol=0.05)
    names = {change.name for changes in drawn(Augment(rand_augment={})) for change in changes}
    assert names == set(RAND_AUGMENT) and len(RAND_AUGMENT) == len(timm._RAND_INCREASING_TRANSFORMS)
    plain = {
        "rotate": "Rotate", "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
        "saturation": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
        "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
        "translate_y": "TranslateYRel",
    }  # fmt: skip
    random.seed(0)
    for ours, name in plain.items():
        assert name in timm._RAND_INCREASING_TRANSFORMS
        for level in (0.0, 7.0, 10.0):
            reference = {round(float(timm.LEVEL_TO_ARG[name](level, {})[0]), 6) for _ in range(40)}
            found = {round(float(RAND_AUGMENT[ours][1](level, np.random.default_rng(n))), 6) for n in range(40)}
            assert found == reference, (ours, level)


def test_erased_rectangles_are_within_bounds():
    erasing = {"probability": 1, "count": 2, "area": (0.1, 0.2), "aspect": (0.5, 2.0)}
    found = drawn(Augment(erasing=erasing), 300, size=100)
    places = [change.values for changes in found for change in changes]
    assert len(places) > 590
    for place in places:
        assert 0 <= place["top"] <= 100 - place["height"] and 0 <= place["left"] <= 100 - place["width"]
        assert 0.045 < place["height"] * place["width"] / 1e4 < 0.105  # two of them share the area
        assert 0.45 < place["height"] / place["width"] < 2.2


def test_changes_are_made_in_order_and_leave_the_clip():
    clip = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    before = clip.copy()
    made = apply(clip, (module.Change("posterize", {"bits": 1}), module.Change("invert", {})))
    assert np.array_equal(made, 255 - (clip & 128)) and np.array_equal(clip, before)


def test_a_change_says_its_parameters():
    assert str(module.Change("rotate", {"degrees": -12.345})) == "rotate: degrees -12.35"
    assert str(module.Change("invert", {})) == "invert"


def test_a_reader_alters_training_clips_and_no_others(videos):
    root, rows = videos
    settings = {"rand_augment": {"probability": 1.0}, "erasing": {"probability": 1.0}}
    plain, altered = reader_of(root, 2), reader_of(root, 2, augment=settings)
    part = Part(1, rows[:2])
    clips, again = altered.read(part)["clip"], altered.read(part)["clip"]
    assert np.array_equal(clips, again) and not np.array_equal(clips, plain.read(part)["clip"])
    for row, plan in enumerate(plan for video in rows[:2] for plan in altered.plans(video, 1)):
        assert np.array_equal(clips[row], apply(plain.read(part)["clip"][row], plan.changes))
    testing = Part(None, rows[:2])
    assert np.array_equal(altered.read(testing)["clip"], plain.read(testing)["clip"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.augment.erasing.area=[0.5,0.1]", r"data\.augment: erasing\.area is \(smallest, largest\)"),
        ("data.augment.blur.sigma=[0,1]", r"blur\.sigma is .* given \(0, 1\)"),
        ("data.augment.jitter.hue=0.7", r"data\.augment\.jitter\.hue: .*less than or equal to 0\.5"),
        ("data.augment.rand_augment.strength=3", r"no such key; allowed here: operations, magnitude"),
        ("data.augment.erasing.mode=black", r"'pixel', 'rand' or 'const'"),
    ],
)
def test_wrong_settings_are_explained(setting, words):
    with pytest.raises(ConfigError, match=words):
        override(from_mapping({}), [setting])


def test_a_part_is_switched_on_with_its_own_defaults():
    config = override(from_mapping({}), ["data.augment.rand_augment={}", "data.augment.erasing.mode=rand"])
    assert config.data.augment.rand_augment.magnitude == 7 and config.data.augment.erasing.probability == 0.25
    assert from_mapping(config.model_dump(mode="json")) == config
