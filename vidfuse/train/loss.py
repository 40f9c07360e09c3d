"""Losses of single samples; weighing and averaging are the step's, so the mean is over the global batch whatever the loss.

Axes: B samples, K classes. A target is a class or, after mixing, a distribution over classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from vidfuse.config import TrainConfig

Targets = Int[Tensor, " B"] | Float[Tensor, "B K"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], targets) -> losses [B]."""


def loss_of(train: TrainConfig, labels: npt.NDArray[np.integer], classes: int, device: torch.device) -> Loss:
    """The loss that a config asks for.

    Args:
        train: label smoothing, focal loss, balance of classes.
        labels: of the training split; -1 where there is none.
        classes: K.
        device: of the logits.
    """
    weights = None
    if train.class_balance is not None:
        counts = np.bincount(labels[labels >= 0], minlength=classes)
        weights = balanced_weights(torch.from_numpy(counts), train.class_balance).to(device)
    if train.focal_gamma is not None:
        return partial(focal, gamma=train.focal_gamma, smoothing=train.label_smoothing, class_weights=weights)
    return partial(cross_entropy, smoothing=train.label_smoothing, class_weights=weights)


def cross_entropy(
    logits: Float[Tensor, "B K"], targets: Targets, *, smoothing: float = 0.0, class_weights: Float[Tensor, " K"] | None = None
) -> Float[Tensor, " B"]:
    """Cross-entropy of each sample, with label smoothing (Szegedy et al. 2015, section 7); rows without a label count as class 0.

    Args:
        logits: fp32.
        targets: classes, or -1 (such a row has weight 0 and is multiplied away); or distributions.
        smoothing: share of the target spread over all classes.
        class_weights: factor of each class's part.
    """
    known = targets if targets.is_floating_point() else targets.clamp(min=0)
    return F.cross_entropy(logits, known, weight=class_weights, reduction="none", label_smoothing=smoothing)


def focal(
    logits: Float[Tensor, "B K"],
    targets: Targets,
    *,
    gamma: float,
    smoothing: float = 0.0,
    class_weights: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, " B"]:
    """Focal loss of each sample (Lin et al. 2017, arXiv:1708.02002) over a softmax: each class's part times (1 - p) ** gamma.

    Args:
        logits: fp32.
        targets: as in `cross_entropy`.
        gamma: 0 is cross-entropy; the larger, the less is left of samples that are known well.
        smoothing: share of the target spread over all classes.
        class_weights: factor of each class's part.
    """
    classes = logits.shape[-1]
    known = targets if targets.is_floating_point() else F.one_hot(targets.clamp(min=0), classes).to(logits.dtype)
    known = known * (1 - smoothing) + smoothing / classes
    log_p = logits.log_softmax(-1)
    far = (1 - log_p.exp()).clamp(min=torch.finfo(log_p.dtype).eps)  # at 0 a power below 1 has no gradient
    parts = known * far**gamma * -log_p
    return (parts if class_weights is None else parts * class_weights).sum(-1)


def soft_targets(
    labels: Int[Tensor, " B"], others: Int[Tensor, " B"], shares: Float[Tensor, " B"], classes: int
) -> Float[Tensor, "B K"]:
    """Targets of mixed rows: `shares` of the row's own class, the rest of the other's; rows without a label count as class 0."""
    own, other = (F.one_hot(part.clamp(min=0), classes).float() for part in (labels, others))
    return torch.lerp(other, own, shares[:, None])


def balanced_weights(counts: Int[Tensor, " K"], beta: float) -> Float[Tensor, " K"]:
    """Factors of classes by the effective number of their samples (Cui et al. 2019, arXiv:1901.05555, equation 3).

    Args:
        counts: samples of each class; one without samples weighs nothing.
        beta: 0: all classes weigh the same; towards 1: as the inverse of their samples.

    Returns:
        fp32, with a sum of as many as there are classes with samples.
    """
    effective = (1 - beta ** counts.double()) / (1 - beta)
    weights = torch.where(counts > 0, 1 / effective, 0.0)
    return (weights * (counts > 0).sum() / weights.sum()).float()
