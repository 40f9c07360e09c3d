"""Scoring views: mirrored ones are read back into their own classes, and what is averaged is what was asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.data.test_repeats import reader_of
from vidfuse.data.batch import Batch, SampleError
from vidfuse.data.clips import Part
from vidfuse.data.flips import mirrored_classes
from vidfuse.train.validate import Scored, score, together
from vidfuse.train.worker import LocalWorker

CLASSES = ("to the left", "to the right", "on")
SAMPLES, ROWS = 7, 3
CPU = torch.device("cpu")


def brighter_side(clips: torch.Tensor) -> torch.Tensor:
    """Logits of `CLASSES`: how bright the left and the right half are, and how bright it is in all."""
    halves = clips.float().mean(dim=(1, 2, 3)).unflatten(-1, (2, -1)).mean(-1)
    return torch.cat([halves, halves.mean(-1, keepdim=True)], -1) / 64


def batches(*, mirrored: bool) -> list[Batch]:
    """Views of some samples in batches of three, so that a pair of views is in two batches; then padding."""
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (SAMPLES, 2, 3, 8, 8), dtype=np.uint8))
    views = [clip for one in clips for clip in ((one, one.flip(-1)) if mirrored else (one,))]
    samples = torch.arange(SAMPLES).repeat_interleave(1 + mirrored)
    lacking = -len(views) % ROWS
    views += [torch.zeros_like(clips[0])] * lacking
    samples = torch.cat([samples, torch.full((lacking,), -1)])
    weights = (samples >= 0).float()
    parts = [slice(start, start + ROWS) for start in range(0, len(views), ROWS)]
    return [Batch(torch.stack(views[p]), torch.zeros(ROWS, dtype=torch.long), weights[p], samples[p]) for p in parts]


@pytest.fixture(autouse=True)
def alone(tmp_path):
    LocalWorker(tmp_path)  # a process group of one


def scored(mirrored: bool, mean="probabilities") -> np.ndarray:
    options = {"classes": 3, "views": 1 + mirrored, "device": CPU, "mean": mean}
    swap = mirrored_classes(CLASSES) if mirrored else None
    return score(brighter_side, batches(mirrored=mirrored), np.zeros(SAMPLES, np.int64), mirrored=swap, **options).probabilities


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_a_mirrored_view_says_the_same_when_its_sides_are_swapped_back(mean):
    assert np.allclose(scored(True, mean), scored(False), atol=1e-6)


def test_logits_and_probabilities_are_averaged_as_said():
    clips = torch.stack([torch.full((2, 3, 8, 8), v, dtype=torch.uint8) for v in (10, 250)])
    clips[0, ..., :4], clips[1, ..., 4:] = 200, 20
    batch = Batch(clips, torch.zeros(2, dtype=torch.long), torch.ones(2), torch.zeros(2, dtype=torch.long))
    logits = brighter_side(clips)
    for mean, reference in (("probabilities", logits.softmax(-1).mean(0)), ("logits", logits.mean(0).softmax(-1))):
        found = score(brighter_side, [batch], np.zeros(1, np.int64), classes=3, views=2, device=CPU, mean=mean)
        assert np.allclose(found.probabilities[0], reference.numpy(), atol=1e-6)


def test_a_reader_gives_each_view_and_its_mirror_image(videos):
    root, rows = videos
    reader = reader_of(root, 1)
    for name, value in (("clips", 2), ("crops", 3), ("flip", True)):
        object.__setattr__(reader, name, value)
    columns = reader.read(Part(None, rows[:1]))
    clips = columns["clip"]
    assert len(clips) == reader.views(None) == 12 and (columns["sample"] == 0).all() and (columns["label"] == 0).all()
    assert np.array_equal(clips[1::2], clips[::2, :, :, ::-1])


def part(probabilities: list[list[float]], unreadable: list[bool]) -> Scored:
    errors = tuple(SampleError("a.tar", str(row), "broken") for row, lost in enumerate(unreadable) if lost)
    rows = np.array(probabilities, np.float32) * ~np.array(unreadable)[:, None]
    return Scored(rows, np.zeros(len(rows), np.int64), np.array(unreadable), errors)


def test_an_ensemble_is_the_mean_and_what_one_cannot_read_is_unreadable():
    one = part([[0.9, 0.1], [0.5, 0.5]], [False, False])
    two = part([[0.2, 0.8], [0.0, 0.0]], [False, True])
    joined = together([one, two], mean="probabilities")
    assert np.allclose(joined.probabilities, [[0.55, 0.45], [0, 0]], atol=1e-6)
    assert joined.unreadable.tolist() == [False, True] and joined.errors == two.errors
    geometric = np.sqrt(np.array([0.9 * 0.2, 0.1 * 0.8]))
    assert np.allclose(together([one, two], mean="logits").probabilities[0], geometric / geometric.sum(), atol=1e-6)
