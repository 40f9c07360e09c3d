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

from vidfuse.config import Mixing, TrainConfig
from vidfuse.data.batch import Batch
from vidfuse.data.mixing import Pair, mix, pairs
from vidfuse.data.sampling import World
from vidfuse.train.engine import Engine
from vidfuse.train.forward import forward
from vidfuse.train.loss import Loss, soft_targets


@dataclass(frozen=True)
class StepResult:
    """Sums over all ranks of a step; read it late, since reading waits for the device."""

    sums: Tensor
    """[6] weighted loss, correct, weight, ranks that were asked to stop, ranks that ask for a checkpoint, unreadable rows."""
    grad_norm: float

    @property
    def loss(self) -> float:
        """Mean loss of the samples."""
        return float(self.sums[0] / self.sums[2].clamp(min=1))

    @property
    def accuracy(self) -> float:
        """Share of samples whose class (of a mixed one: the larger part's) has the highest logit."""
        return float(self.sums[1] / self.sums[2].clamp(min=1))

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self.sums[3] > 0)

    @property
    def save(self) -> bool:
        """Whether any rank asks for a checkpoint."""
        return bool(self.sums[4] > 0)

    @property
    def unreadable(self) -> Tensor:
        """Rows of videos that could not be read; still on the device."""
        return self.sums[5]


def train_step(
    engine: Engine,
    micro_batches: tuple[Batch, ...],
    train: TrainConfig,
    world: World,
    *,
    loss: Loss,
    seed: int,
    step: int,
    stop: bool,
    save: bool = False,
) -> StepResult:
    """One optimizer step over all ranks.

    Args:
        engine: of this rank.
        micro_batches: `world.accumulation` of them.
        train: what is mixed.
        world: how the global batch is cut.
        loss: of single samples.
        seed: of the run.
        step: number of the step; dropout is drawn from (seed, step, rank), so that a resumed run draws the same; mixing from
            (seed, step) and the place in the global batch.
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
    sums = torch.zeros(6, device=device)
    for number, batch in enumerate(batches):
        mixed = None
        if train.mixing is not None:
            place = (number * world.size + world.rank) * world.micro_batch
            mixed = mix(batch, _pairs(batch, train.mixing, place, world, (seed, step)))
        logits = forward(engine, batch, None if mixed is None else mixed.clips)
        targets = batch.labels if mixed is None else soft_targets(batch.labels, mixed.others, mixed.shares, logits.shape[-1])
        losses = loss(logits, targets) * batch.weights
        engine.backward(losses.sum() * scale)
        engine.step()
        right = targets if targets.ndim == 1 else targets.argmax(-1)
        correct = ((logits.argmax(-1) == right) * batch.weights).sum()
        sums[:3] += torch.stack([losses.detach().sum(), correct.detach(), batch.weights.sum()])
    sums[3], sums[4] = float(stop), float(save)
    sums[5] = sum(int(((batch.samples >= 0) & (batch.host_weights == 0)).sum()) for batch in batches)
    dist.all_reduce(sums)
    return StepResult(sums, float(engine.get_global_grad_norm() or 0.0))


def _pairs(batch: Batch, mixing: Mixing, place: int, world: World, key: tuple[int, int]) -> list[Pair]:
    """Who is mixed with whom."""
    rows, frames, _, height, width = batch.clips.shape
    repeats = rows // world.micro_batch
    return list(pairs(batch.host_weights, mixing, shape=(frames, height, width), place=place, repeats=repeats, key=key))
