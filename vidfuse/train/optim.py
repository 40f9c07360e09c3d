"""Parameter groups and the learning rate.

Comes in: a model, a `TrainConfig`, samples seen. Goes out: an AdamW over two groups, a learning rate. The schedule counts
samples, not steps, so that nothing about it depends on the number of workers.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from vidfuse.config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters with weight decay, and those without: biases, norms, everything of one dimension or fewer."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the trainable parameters.

    Raises:
        ValueError: nothing is trainable.
    """
    groups = parameter_groups(model, train.weight_decay)
    if not groups:
        raise ValueError("nothing is trainable: every stream is frozen and neither fusion nor head has parameters")
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=train.betas)


def learning_rate(train: TrainConfig, samples_seen: int, samples_per_epoch: int) -> float:
    """Linear warmup, then a cosine down to `final_learning_rate_share` of the peak.

    Args:
        train: peak, warmup and epochs.
        samples_seen: samples used before this step.
        samples_per_epoch: samples of the training split.
    """
    warmup = train.warmup_epochs * samples_per_epoch
    total = train.epochs * samples_per_epoch
    if samples_seen < warmup:
        return train.learning_rate * (samples_seen + train.global_batch) / (warmup + train.global_batch)
    progress = min((samples_seen - warmup) / max(total - warmup, 1), 1.0)
    share = train.final_learning_rate_share + (1 - train.final_learning_rate_share) * 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate * share
