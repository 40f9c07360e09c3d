"""Every sample of a split scored once, over all ranks.

Axes: N samples, K classes, V views. Comes in: a model and the rank's share of batches. Goes out: probabilities [N, K], averaged
over views, with the samples that could not be read marked. Every rank must call it; each gets the whole result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from vidfuse.data.batch import Batch, SampleError
from vidfuse.data.flips import Classes
from vidfuse.evaluate.metrics import Scores, average_views, scores
from vidfuse.train.ahead import ahead
from vidfuse.train.forward import forward


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
    model: Callable[..., torch.Tensor],
    batches: Iterable[Batch],
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    views: int,
    device: torch.device,
    mirrored: Classes | None = None,
    mean: Literal["probabilities", "logits"] = "probabilities",
) -> Scored:
    """Score a split.

    Args:
        model: a recogniser, in evaluation mode, on `device`.
        batches: this rank's share; every rank has as many.
        labels: [N] of the whole split.
        classes: K.
        views: rows that each sample has.
        device: of the model.
        mirrored: [K] class of a class's mirrored clip, where every second view is the one before mirrored. `None`: none is.
        mean: what is averaged over views.

    Raises:
        RuntimeError: a sample was scored more or less often than `views` times, which a correct stream cannot do.
    """
    sums = torch.zeros(len(labels), classes, device=device)
    rows = torch.zeros(len(labels), 2, device=device)  # readable, all
    errors: list[SampleError] = []
    seen = 0
    for (batch,) in ahead(((batch,) for batch in batches), device):
        real = batch.samples >= 0
        samples = batch.samples[real].to(device)
        logits = forward(model, batch.to(device)).float()
        if mirrored is not None:
            turned = (torch.arange(len(logits), device=device) + seen) % 2 == 1
            logits = torch.where(turned[:, None], logits[:, torch.from_numpy(mirrored).to(device)], logits)
            seen += len(logits)
        answers = (logits if mean == "logits" else logits.softmax(-1))[real.to(device)]
        weights = batch.host_weights[real].to(device)
        sums.index_add_(0, samples, answers * weights[:, None])
        rows.index_add_(0, samples, torch.stack([weights, torch.ones_like(weights)], 1))
        errors += batch.errors
    dist.all_reduce(sums)
    dist.all_reduce(rows)
    _check_once(rows[:, 1].cpu(), views)
    everyone: list[list[SampleError]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, errors)
    readable = rows[:, 0].cpu().numpy() == views
    means = sums / views
    return Scored(
        probabilities=(means.softmax(-1) if mean == "logits" else means).cpu().numpy() * readable[:, None],
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


def together(parts: Sequence[Scored], *, mean: Literal["probabilities", "logits"]) -> Scored:
    """An ensemble: what several models say of the same split, averaged; a sample that one could not read is unreadable.

    Args:
        parts: of the models; the samples are the same, in the same order.
        mean: what is averaged.
    """
    unreadable = np.any([part.unreadable for part in parts], axis=0)
    logits = np.stack([_logits(part) for part in parts], axis=1)
    joined = np.exp(average_views(logits, mean=mean))
    probabilities = (joined / joined.sum(-1, keepdims=True) * ~unreadable[:, None]).astype(np.float32)
    errors = tuple(sorted({error for part in parts for error in part.errors}, key=lambda e: (e.shard, e.key)))
    return Scored(probabilities, parts[0].labels, unreadable, errors)


def _logits(scored: Scored) -> npt.NDArray[np.float64]:
    return np.log(np.clip(scored.probabilities.astype(np.float64), 1e-30, None))


def judged(scored: Scored, classes: tuple[str, ...]) -> Scores:
    """The figures of a scored split."""
    return scores(_logits(scored), scored.labels, scored.unreadable, classes)
