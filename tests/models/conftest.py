"""What several tests of models need: small clips, and a loss that every output takes part in."""

import pytest
import torch

from vidfuse.models.recognizer import build_recognizer


@pytest.fixture
def make_recognizer():
    """A recogniser of real files at their smallest useful input; arguments replace those of `build_recognizer`."""

    def make(**changes):
        stream = {"frozen": False, "weights": None, "options": {}}
        arguments = {
            "classes": 5,
            "frames": 4,
            "size": 32,
            "semantic": {**stream, "name": "dinov3", "frozen": True},
            "motion": {**stream, "name": "r3d", "options": {"stage": "layer2"}},
            "fusion": {"name": "cross_attention", "options": {"width": 32, "heads": 4}},
            "seed": 3,
        }
        return build_recognizer(**{**arguments, **changes})

    return make


@pytest.fixture
def clips():
    """Two uint8 clips of 4 frames at 32 x 32."""
    return torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
