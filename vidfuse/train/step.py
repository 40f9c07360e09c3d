"""Micro batches to gradients: one optimizer step.

Axes: B rows of a micro batch. Comes in: the micro batches of one rank's step. Goes out: a `StepResult` summed over all ranks.

The loss of a step is the sum over samples of weight x loss, divided by the sum of weights over all ranks and micro batches: so
padding changes nothing, and the gradient is that of one large batch at every world size. DeepSpeed divides by accumulation and
averages over ranks; both are multiplied back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vidfuse.config import TrainConfig
from vidfuse.data.batch import Batch
from vidfuse.data.sampling import World
from vidfuse.train.engine import Engine
from vidfuse.train.loss import cross_entropy


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks of a step; read it late, since reading waits for the device."""

    sums: Tensor
    """[5] weighted loss, correct, weight, ranks that were asked to stop, ranks that ask for a checkpoint."""
    grad_norm: float

    @property
    def loss(self) -> float:
        """Mean loss of the samples."""
        return float(self.sums[0] / self.sums[2].clamp(min=1))

    @property
    def accuracy(self) -> float:
        """Share of samples whose class has the highest logit."""
        return float(self.sums[1] / self.sums[2].clamp(min=1))

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self.sums[3] > 0)

    @property
    def save(self) -> bool:
        """Whether any rank asks for a checkpoint."""
        return bool(self.sums[4] > 0)


def train_step(
    engine: Engine,
    micro_batches: tuple[Batch, ...],
    train: TrainConfig,
    world: World,
    *,
    seed: int,
    step: int,
    stop: bool,
    save: bool = False,
) -> StepResult:
    """One optimizer step over all ranks.

    Args:
        engine: of this rank.
        micro_batches: `world.accumulation` of them.
        train: loss and precision.
        world: how the global batch is cut.
        seed: of the run.
        step: number of the step; dropout is drawn from (seed, step, rank), so that a resumed run draws the same.
        stop: whether this rank was asked to stop.
        save: whether this rank asks for a checkpoint.
    """
    engine.train()
    torch.manual_seed((seed * 1_000_003 + step) * 4_099 + world.rank)
    device = engine.device
    batches = [batch.to(device) for batch in micro_batches]
    total = torch.stack([batch.weights.sum() for batch in batches]).sum()
    dist.all_reduce(total)
    scale = world.accumulation * world.size / total.clamp(min=1)
    sums = torch.zeros(5, device=device)
    for batch in batches:
        logits = engine(batch.clips)
        losses = cross_entropy(logits, batch.labels, smoothing=train.label_smoothing) * batch.weights
        engine.backward(losses.sum() * scale)
        engine.step()
        correct = ((logits.argmax(-1) == batch.labels) * batch.weights).sum()
        sums[:3] += torch.stack([losses.detach().sum(), correct.detach(), batch.weights.sum()])
    sums[3], sums[4] = float(stop), float(save)
    dist.all_reduce(sums)
    return StepResult(sums, float(engine.get_global_grad_norm() or 0.0))
