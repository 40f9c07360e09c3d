"""Every sample of a split scored once, over all ranks.

Axes: N samples, K classes, V views. Comes in: a model and the rank's share of batches. Goes out: probabilities [N, K], averaged
over views, with the samples that could not be read marked. Every rank must call it; each gets the whole result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from vidfuse.data.batch import Batch, SampleError


@dataclass(frozen=True)
class Scored:
    """A split as the model sees it."""

    probabilities: npt.NDArray[np.float32]
    """[N, K]; rows of unreadable samples are 0."""
    labels: npt.NDArray[np.int64]
    """[N]"""
    unreadable: npt.NDArray[np.bool_]
    """[N]"""
    errors: tuple[SampleError, ...]

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the readable samples, without label smoothing."""
        rows = np.flatnonzero(~self.unreadable)
        chosen = self.probabilities[rows, self.labels[rows]]
        return float(-np.log(np.clip(chosen, 1e-12, None)).mean()) if len(rows) else float("nan")


@torch.no_grad()
def score(
    model: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[Batch],
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    views: int,
    device: torch.device,
) -> Scored:
    """Score a split.

    Args:
        model: clips to logits, in evaluation mode.
        batches: this rank's share; every rank has as many.
        labels: [N] of the whole split.
        classes: K.
        views: rows that each sample has.
        device: of the model.

    Raises:
        RuntimeError: a sample was scored more or less often than `views` times, which a correct stream cannot do.
    """
    sums = torch.zeros(len(labels), classes, device=device)
    rows = torch.zeros(len(labels), 2, device=device)  # readable, all
    errors: list[SampleError] = []
    for batch in batches:
        real = batch.samples >= 0
        samples = batch.samples[real].to(device)
        probabilities = model(batch.clips.to(device)).softmax(-1)[real.to(device)]
        weights = batch.weights[real].to(device)
        sums.index_add_(0, samples, probabilities * weights[:, None])
        rows.index_add_(0, samples, torch.stack([weights, torch.ones_like(weights)], 1))
        errors += batch.errors
    dist.all_reduce(sums)
    dist.all_reduce(rows)
    _check_once(rows[:, 1].cpu(), views)
    everyone: list[list[SampleError]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, errors)
    readable = rows[:, 0].cpu().numpy() == views
    return Scored(
        probabilities=(sums / views).cpu().numpy() * readable[:, None],
        labels=labels,
        unreadable=~readable,
        errors=tuple(sorted({e for part in everyone for e in part}, key=lambda e: (e.shard, e.key))),
    )


def _check_once(rows: torch.Tensor, views: int) -> None:
    wrong = torch.nonzero(rows != views).flatten()
    if len(wrong):
        raise RuntimeError(
            f"{len(wrong)} of {len(rows)} samples were not scored exactly once ({views} views each); the first is sample "
            f"{int(wrong[0])} with {int(rows[wrong[0]])} views: nothing is reported from this pass"
        )
