"""Parameter groups and the learning rate.

Comes in: a model, a `TrainConfig`, samples seen. Goes out: groups of parameters, an AdamW over them, a learning rate. The
schedule counts samples, not steps, so that nothing about it depends on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from vidfuse.config import TrainConfig
from vidfuse.models.parts import Backbone, Interleaved
from vidfuse.models.recognizer import Recognizer


@dataclass(frozen=True)
class Group:
    """What the parameters of one of the optimizer's groups have in common."""

    stream: str | None
    """The stream that is trained later than the rest, and that they belong to; `None`: they are trained from the start."""
    share: float
    """Their learning rate, as a share of the run's."""
    decayed: bool
    """Whether they have weight decay: not biases, norms and everything else of one dimension or fewer."""


Groups = dict[Group, list[nn.Parameter]]


def parameter_groups(model: Recognizer, *, layer_decay: float | None = None, late: Collection[str] = ()) -> Groups:
    """All trainable parameters, by what distinguishes them, in the order of the optimizer's groups.

    Args:
        model: frozen streams and fixed parameters are marked already.
        layer_decay: share of the learning rate from one block of a backbone to the one before it, as in BEiT (Bao et al. 2021,
            arXiv:2106.08254, appendix): block i of n has `layer_decay ** (n - i)`, what comes before the blocks
            `layer_decay ** (n + 1)`, what comes after them, fusion and head 1. An exchange between blocks has the share of a block
            of the pair that it is in, counted in pairs.
        late: streams that are trained from a later epoch on.

    Raises:
        ValueError: nothing is trainable.
    """
    shares = dict(_shares(model, layer_decay)) if layer_decay is not None else {}
    of_late = {id(p): name for name in late for p in model.streams[name].parameters()}
    groups: Groups = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = Group(of_late.get(id(parameter)), shares.get(id(parameter), 1.0), parameter.ndim > 1)
            groups.setdefault(group, []).append(parameter)
    if not groups:
        raise ValueError("nothing is trainable: every stream is frozen and neither fusion nor head has parameters")
    return dict(sorted(groups.items(), key=lambda item: (item[0].stream or "", -item[0].share, not item[0].decayed)))


def _shares(model: Recognizer, layer_decay: float) -> Iterator[tuple[int, float]]:
    for stream in model.streams.values():
        blocks = cast(Backbone, stream).blocks
        number = {id(p): i for i, block in enumerate(blocks) for p in block.parameters()}
        first = next((i for i, p in enumerate(stream.parameters()) if id(p) in number), 0)
        for place, parameter in enumerate(stream.parameters()):
            outside = len(blocks) + 1 if place < first else 0
            power = len(blocks) - number[id(parameter)] if id(parameter) in number else outside
            yield id(parameter), layer_decay**power
    if model.interleaved:
        exchanges = cast(Interleaved, model.fusion).exchanges
        pairs = min(len(cast(Backbone, stream).blocks) for stream in model.streams.values())
        for pair, exchange in exchanges.items():
            for parameter in exchange.parameters():
                yield id(parameter), layer_decay ** (pairs + 1 - pair)


def adamw(groups: Groups, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), a group of its own for each group."""
    settings = [{"params": list(p), "weight_decay": train.weight_decay if g.decayed else 0.0} for g, p in groups.items()]
    return torch.optim.AdamW(settings, lr=train.learning_rate, betas=train.betas)


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
