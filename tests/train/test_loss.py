"""Losses against torch's, timm's and torchvision's own, and the figures of the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from vidfuse.config import TrainConfig
from vidfuse.train.loss import balanced_weights, cross_entropy, focal, loss_of, soft_targets

B, K = 12, 5


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, K, generator=torch.Generator().manual_seed(0)) * 3


LABELS = torch.arange(B) % K
OTHERS, SHARES = (torch.arange(B) * 3 + 1) % K, torch.linspace(0, 1, B)


def test_smoothing_is_timms(logits):
    from timm.loss import LabelSmoothingCrossEntropy

    assert cross_entropy(logits, LABELS, smoothing=0.1).mean().item() == pytest.approx(
        LabelSmoothingCrossEntropy(0.1)(logits, LABELS).item(), rel=1e-6
    )


def test_soft_targets_are_timms(logits):
    """Mixed and smoothed, as timm's `Mixup` with `label_smoothing` and its `SoftTargetCrossEntropy` do it."""
    from timm.data.mixup import one_hot
    from timm.loss import SoftTargetCrossEntropy

    on, off = 0.9 + 0.1 / K, 0.1 / K
    parts = [one_hot(labels, K, on_value=on, off_value=off) for labels in (LABELS, OTHERS)]
    reference = parts[0] * SHARES[:, None] + parts[1] * (1 - SHARES[:, None])
    targets = soft_targets(LABELS, OTHERS, SHARES, K)
    assert torch.allclose(targets.sum(-1), torch.ones(B))
    ours = cross_entropy(logits, targets, smoothing=0.1).mean()
    assert ours.item() == pytest.approx(SoftTargetCrossEntropy()(logits, reference).item(), rel=1e-6)


def test_a_row_that_is_not_mixed_has_its_own_target(logits):
    targets = soft_targets(LABELS, LABELS, torch.ones(B), K)
    assert torch.equal(targets.argmax(-1), LABELS)
    assert torch.allclose(
        cross_entropy(logits, targets, smoothing=0.1), cross_entropy(logits, LABELS, smoothing=0.1), atol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_of_two_classes_is_torchvisions(gamma):
    score = torch.linspace(-6, 6, 25)
    for label in (0, 1):
        ours = focal(torch.stack([torch.zeros(25), score], -1), torch.full((25,), label), gamma=gamma)
        reference = sigmoid_focal_loss(score, torch.full((25,), float(label)), alpha=-1, gamma=gamma)
        assert torch.allclose(ours, reference, atol=1e-6)


def test_focal_without_gamma_is_cross_entropy(logits):
    weights = torch.linspace(0.5, 2, K)
    for targets in (LABELS, soft_targets(LABELS, OTHERS, SHARES, K)):
        both = [
            f(logits, targets, smoothing=0.1, class_weights=weights)
            for f in (cross_entropy, lambda *a, **k: focal(*a, gamma=0.0, **k))
        ]
        assert torch.allclose(*both, atol=1e-5)


def test_focal_has_gradients_where_a_class_is_certain():
    logits = torch.tensor([[60.0, 0.0]], requires_grad=True)
    focal(logits, torch.tensor([0]), gamma=0.5).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_class_weights_are_torchs(logits):
    weights = torch.linspace(0.5, 2, K)
    assert torch.allclose(
        cross_entropy(logits, LABELS, class_weights=weights), F.cross_entropy(logits, LABELS, weights, reduction="none")
    )


def test_balanced_weights_are_the_papers():
    counts = torch.tensor([5000, 500, 50, 0])
    beta = 0.999
    effective = np.array([(1 - beta**n) / (1 - beta) for n in (5000, 500, 50)])
    expected = 3 / effective / (1 / effective).sum()
    weights = balanced_weights(counts, beta)
    assert np.allclose(weights[:3].numpy(), expected) and weights[3] == 0 and weights.sum().item() == pytest.approx(3)
    assert torch.equal(balanced_weights(counts, 0.0)[:3], torch.ones(3))
    inverse = balanced_weights(counts, 1 - 1e-9)[:3]  # towards the inverse of the counts
    assert torch.allclose(inverse / inverse[0], torch.tensor([1.0, 10.0, 100.0]), rtol=1e-3)


def test_rows_without_a_label_are_finite(logits):
    labels = torch.full((B,), -1)
    for gamma in (None, 2.0):
        loss = loss_of(
            TrainConfig(focal_gamma=gamma, class_balance=0.9), np.array([0, 0, 1, 2, 3, 4, -1]), K, torch.device("cpu")
        )
        assert (
            torch.isfinite(loss(logits, labels)).all()
            and torch.isfinite(loss(logits, soft_targets(labels, labels, SHARES, K))).all()
        )


def test_the_config_says_which(logits):
    labels = np.array([0, 0, 0, 1, 2, 3, 4])
    plain = loss_of(TrainConfig(), labels, K, torch.device("cpu"))
    assert torch.equal(plain(logits, LABELS), F.cross_entropy(logits, LABELS, reduction="none", label_smoothing=0.1))
    both = loss_of(TrainConfig(focal_gamma=2.0, class_balance=0.9), labels, K, torch.device("cpu"))
    weights = balanced_weights(torch.bincount(torch.from_numpy(labels)), 0.9)
    assert torch.equal(both(logits, LABELS), focal(logits, LABELS, gamma=2.0, smoothing=0.1, class_weights=weights))
