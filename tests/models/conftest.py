"""What several tests of models need: a small recogniser and small clips."""

import copy

import pytest
import torch

from vidfuse.models.building import build_recognizer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing by threads, and lose minutes to them on a shared machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built():
    """Recognisers of a file by their arguments: drawing 29 M weights takes longer than most tests."""
    return {}


@pytest.fixture
def make_recognizer(built):
    """A recogniser of real files at their smallest useful input; arguments replace those of `build_recognizer`."""

    def make(*, fresh=False, **changes):
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
        arguments |= changes
        if fresh or repr(arguments) not in built:
            built[repr(arguments)] = build_recognizer(**arguments)
        return copy.deepcopy(built[repr(arguments)])

    return make


@pytest.fixture
def clips():
    """Two uint8 clips of 4 frames at 32 x 32."""
    return torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
