"""Losses of single samples; weighing and averaging are the step's.

Axes: B samples, K classes.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Float[Tensor, "B K"], labels: Int[Tensor, "B"], *, smoothing: float = 0.0) -> Float[Tensor, "B"]:
    """Cross-entropy of each sample, with label smoothing (Szegedy et al. 2015, section 7); rows without a label count as class 0.

    Args:
        logits: fp32.
        labels: class, or -1 (such a row has weight 0 and is multiplied away).
        smoothing: share of the target spread over all classes.
    """
    return F.cross_entropy(logits, labels.clamp(min=0), reduction="none", label_smoothing=smoothing)
