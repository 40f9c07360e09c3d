"""bfloat16 on a CPU: the same values, rounded once, in forward, backward and recomputation, whatever it has instructions for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidfuse.models import precision
from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import checkpoint_activations


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def native(request, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("layer", [nn.Linear(16, 8), nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 3), nn.Conv3d(4, 8, 3)])
def test_a_product_is_the_rounded_product_of_float32(layer, monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda: False)
    layer = layer.bfloat16()
    shape = (2, 16) if isinstance(layer, nn.Linear) else (2, 4, *[8] * (layer.weight.ndim - 2))
    x = torch.randn(shape).bfloat16()
    with precision.bfloat16_arithmetic(x, layer):
        got = layer(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, layer.float()(x.float()).bfloat16())


def _model(checkpointed: bool):
    model = build_recognizer(
        classes=3,
        frames=4,
        size=32,
        semantic={"name": "tiny_image", "frozen": True},
        motion={"name": "tiny_motion", "frozen": False},
        fusion={"name": "cross_attention", "options": {"width": 16, "heads": 2}},
        seed=0,
    ).bfloat16()
    if checkpointed:
        checkpoint_activations(model)
    return model.train()


def test_recomputed_blocks_use_the_same_arithmetic(native):
    clips = torch.randint(0, 255, (2, 4, 3, 32, 32), dtype=torch.uint8)
    grads = []
    for checkpointed in (False, True):
        model = _model(checkpointed)
        torch.manual_seed(0)
        model(clips).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_float32_is_left_alone(monkeypatch):
    monkeypatch.setattr(precision, "_has_bfloat16", lambda: False)
    x, layer = torch.randn(2, 16), nn.Linear(16, 8)
    with precision.bfloat16_arithmetic(x, layer):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("kernel", "size"), [(3, (2, 4, 4)), (3, (4, 4, 4)), ((5, 1, 1), (3, 6, 6)), ((3, 1, 1), (2, 8, 8)), (3, (1, 1, 1))]
)
def test_gradients_of_kernels_longer_than_their_input(native, kernel, size, autocast):
    """oneDNN's own are wrong, and others each time: memory that was freed before is made not a number for it to be found there."""
    torch.manual_seed(0)
    whole = nn.Conv3d(32, 64, kernel, padding=tuple(k // 2 for k in nn.Conv3d(1, 1, kernel).kernel_size))
    whole.weight.data = whole.weight.data.bfloat16().float()
    x = torch.randn(2, 32, *size).bfloat16()
    want = torch.randn(2, 64, *size).bfloat16()
    whole(x.float()).backward(want.float())
    layer = nn.Conv3d(32, 64, kernel, padding=whole.padding)
    layer.load_state_dict(whole.state_dict())
    layer = layer if autocast else layer.bfloat16()
    for _ in range(4):
        del [torch.full((200_000,), torch.nan) for _ in range(20)][:]
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), precision.bfloat16_arithmetic(x, layer):
            got = layer(x.float() if autocast else x)
        got.backward(want)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(layer.weight.grad.float(), whole.weight.grad, rtol=0.02, atol=0.05)
