"""Which frames a training clip has: what is off draws nothing, speeds and shares are what was asked for, holds and reversal."""

from __future__ import annotations

import numpy as np
import pytest

from vidfuse.config import ConfigError, Temporal, from_mapping, override
from vidfuse.data.sampling import frame_numbers, generator

FRAMES, COUNT = 120, 16


def clips(sampling: str, clips: int = 400, *, frames: int = FRAMES, stride: int = 2, **temporal) -> np.ndarray:
    how = Temporal(**temporal)
    options = {"sampling": sampling, "stride": stride, "temporal": how}
    return np.stack([frame_numbers(frames, COUNT, rng=generator(0, 0, sample, 2), **options) for sample in range(clips)])


@pytest.mark.parametrize(
    ("sampling", "numbers"),
    [
        ("uniform", [6, 14, 21, 27, 30, 43, 46, 54, 66, 69, 75, 83, 92, 100, 109, 115]),
        ("dense", list(range(73, 105, 2))),
        ("single", [98] * 16),
    ],
)
def test_what_is_off_leaves_the_draws_as_they_were(sampling, numbers):
    """Frames of (seed 0, epoch 0, sample 7) as commit 27973a3 drew them."""
    assert frame_numbers(FRAMES, COUNT, sampling=sampling, stride=2, rng=generator(0, 0, 7, 2)).tolist() == numbers
    assert clips(sampling, 8)[7].tolist() == numbers


def test_testing_is_not_altered():
    how = Temporal(speed=(0.2, 0.5), jitter=1, dropped=0.5, reverse=1)
    for sampling in ("uniform", "dense", "single"):
        plain, given = (frame_numbers(FRAMES, COUNT, sampling=sampling, stride=2, temporal=t) for t in (Temporal(), how))
        assert np.array_equal(plain, given)


def test_speed_multiplies_the_distance_of_dense_frames():
    distance = np.diff(clips("dense", speed=(0.5, 2.0), frames=400), axis=1).mean(1)
    assert distance.min() > 0.9 and distance.max() < 4.05  # stride 2, halved and doubled
    assert np.exp(np.log(distance).mean()) == pytest.approx(2.0, rel=0.1)  # even in the logarithm


def test_speed_cuts_uniform_clips_from_a_random_part_of_the_video():
    found = clips("uniform", speed=(0.5, 0.5), jitter=0.0)
    assert (np.diff(found, axis=1) >= 3).all() and (np.diff(found, axis=1) <= 4).all()  # 60 frames of 120 in 16 segments
    starts = found[:, 0] - FRAMES / COUNT / 4
    assert starts.min() < 6 and 54 < starts.max() < 61 and abs(starts.mean() - 30) < 4


def test_jitter_is_the_share_of_the_distance():
    centre = (np.arange(COUNT) + 0.5) * FRAMES / COUNT
    assert np.array_equal(clips("uniform", 3, jitter=0.0), np.floor(np.stack([centre] * 3)))
    assert np.abs(clips("uniform", jitter=0.4) + 0.5 - centre).max() <= 0.2 * FRAMES / COUNT + 0.5
    still, moved = clips("dense", stride=6), clips("dense", stride=6, jitter=0.5)
    assert (np.diff(still, axis=1) == 6).all() and np.diff(moved, axis=1).min() >= 2 and np.diff(moved, axis=1).max() <= 10


def test_a_dropped_frame_shows_the_one_before_on():
    whole, holed = clips("uniform"), clips("uniform", dropped=0.3)
    held = holed != whole
    assert not held[:, 0].any() and held[:, 1:].mean() == pytest.approx(0.3, abs=0.03)
    rows, places = np.nonzero(held)
    assert np.array_equal(holed[rows, places], holed[rows, places - 1])


def test_reversal_is_of_whole_clips():
    forth, back = clips("uniform"), clips("uniform", reverse=0.5)
    turned = (back == forth[:, ::-1]).all(1)
    assert (turned | (back == forth).all(1)).all() and turned.mean() == pytest.approx(0.5, abs=0.1)


def test_frames_are_always_of_the_video():
    for frames in (1, 5, 31):
        for sampling in ("uniform", "dense", "single"):
            found = clips(sampling, 50, frames=frames, stride=3, speed=(0.3, 1.0), jitter=1.0, dropped=0.5, reverse=0.5)
            assert found.min() >= 0 and found.max() < frames


def test_uniform_sampling_cannot_go_faster_than_the_whole_video():
    with pytest.raises(ConfigError, match=r"temporal\.speed is at most 1 under sampling=uniform.*given 2"):
        override(from_mapping({}), ["data.augment.temporal.speed=[0.5,2]"])
    override(from_mapping({}), ["data.sampling=dense", "data.augment.temporal.speed=[0.5,2]"])


def test_what_one_frame_cannot_show_is_refused():
    one = override(from_mapping({}), ["data.sampling=single"])
    assert from_mapping(one.model_dump(mode="json")) == one
    with pytest.raises(ConfigError, match=r"augment\.temporal\.dropped is about frames of a clip.*leave it out"):
        override(one, ["data.augment.temporal.dropped=0.2"])


def test_a_curriculum_that_would_leave_the_hardest_out_is_refused():
    wanted = ["data.curriculum.difficulty=d.csv", "train.epochs=5"]
    with pytest.raises(ConfigError, match=r"data\.curriculum\.epochs is 10, but train\.epochs is 5: the hardest"):
        override(from_mapping({}), wanted)
    assert override(from_mapping({}), [*wanted, "data.curriculum.epochs=4"]).data.curriculum.epochs == 4
