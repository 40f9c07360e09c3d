"""Mixup and CutMix: clips of two videos become one, and so do their labels.

Axes: B rows of a micro batch, T frames, C colours, H height, W width. Comes in: a micro batch and where it is in the global batch.
Goes out: clips and, for each row, the label it was mixed with and the share of its own.

Who is mixed with whom does not depend on the number of workers: video 2i of a step's global batch is paired with video 2i + 1, and
their draws are keyed to (seed, step, i). A micro batch is a run of neighbouring videos of the global batch, of even length and so
at an even place, whatever rank has it: both are always on one rank, and the mixed step is the same function of the global batch for
any number of workers and any even micro batch. The order of an epoch is a random permutation, so neighbours are random pairs. A row
of weight 0 (padding, a video that could not be read) is not mixed, and neither is its partner.

Sources: mixup, Zhang et al. 2017 (arXiv:1710.09412); CutMix, Yun et al. 2019 (arXiv:1905.04899); its cuts in time, VideoMix, Yun et
al. 2020 (arXiv:2012.03457). Shares follow timm's `Mixup` (`mode="pair"`): a cut that leaves the clip is clipped and its share corrected.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vidfuse.config import Mixing
from vidfuse.data.batch import Batch
from vidfuse.data.sampling import generator

MIXING = 4
"""Purpose that keeps these draws apart from others of the same seed."""
AXES = {"spatial": (1, 2), "temporal": (0,), "spatiotemporal": (0, 1, 2)}
"""What each kind of cut cuts, of time, height and width."""


@dataclass(frozen=True)
class Pair:
    """Two rows that are mixed with each other."""

    first: int
    second: int
    share: float
    """Of its own that each row keeps."""
    cut: tuple[slice, slice, slice] | None
    """Frames, rows and columns of pixels that they exchange; `None`: mixup."""


@dataclass(frozen=True)
class Mixed:
    """A micro batch after mixing."""

    clips: UInt8[Tensor, "B T C H W"]
    others: Int[Tensor, " B"]
    """Label of the row that each was mixed with; its own where it was not."""
    shares: Float[Tensor, " B"]
    """Share of its own label; 1 where it was not mixed."""


def pairs(
    weights: Float[Tensor, " B"], mixing: Mixing, *, shape: tuple[int, int, int], place: int, repeats: int, key: tuple[int, ...]
) -> Iterator[Pair]:
    """Which rows of a micro batch are mixed, and how.

    Args:
        weights: of the rows, on the CPU.
        mixing: what is drawn.
        shape: frames, height and width of a clip.
        place: of the micro batch's first video in the global batch; even.
        repeats: rows of a video; the n-th of one is paired with the n-th of the other.
        key: (seed, step).
    """
    assert place % 2 == 0 and len(weights) % (2 * repeats) == 0
    for row in range(0, len(weights), 2 * repeats):
        for repeat in range(repeats):
            first, second = row + repeat, row + repeats + repeat
            if weights[first] > 0 and weights[second] > 0:
                rng = generator(*key, MIXING, (place + row // repeats) // 2, repeat)
                if rng.random() < mixing.probability:
                    yield _drawn(first, second, mixing, shape, rng)


def mix(batch: Batch, chosen: list[Pair]) -> Mixed:
    """Mix the chosen pairs of a micro batch, on the batch's device; the batch is left as it is.

    Mixup is rounded to whole colours (half a level of 255 at most), so that clips stay uint8 until the model normalises them.
    """
    clips, others, shares = batch.clips.clone(), batch.labels.clone(), torch.ones(len(batch.labels))
    for pair in chosen:
        a, b = pair.first, pair.second
        others[a], others[b] = batch.labels[b], batch.labels[a]
        shares[a] = shares[b] = pair.share
        if pair.cut is None:
            one, two = batch.clips[a].float(), batch.clips[b].float()
            clips[a] = torch.lerp(two, one, pair.share).round()
            clips[b] = torch.lerp(one, two, pair.share).round()
        else:
            time, height, width = pair.cut
            clips[a, time, :, height, width] = batch.clips[b, time, :, height, width]
            clips[b, time, :, height, width] = batch.clips[a, time, :, height, width]
    return Mixed(clips, others, shares.to(clips.device))


def _drawn(first: int, second: int, mixing: Mixing, shape: tuple[int, int, int], rng: np.random.Generator) -> Pair:
    both = mixing.mixup_alpha is not None and mixing.cutmix_alpha is not None
    if rng.random() < mixing.switch_probability if both else mixing.mixup_alpha is None:
        assert mixing.cutmix_alpha is not None
        share = float(rng.beta(mixing.cutmix_alpha, mixing.cutmix_alpha))
        cut = _cut(share, AXES[mixing.cut], shape, rng)
        volume = np.prod([(part.stop - part.start) / side for part, side in zip(cut, shape, strict=True)])
        return Pair(first, second, float(1 - volume), cut)
    assert mixing.mixup_alpha is not None
    return Pair(first, second, float(rng.beta(mixing.mixup_alpha, mixing.mixup_alpha)), None)


def _cut(
    share: float, axes: tuple[int, ...], shape: tuple[int, int, int], rng: np.random.Generator
) -> tuple[slice, slice, slice]:
    """A box of 1 - share of the clip around a random place, equally long on each axis that is cut; what is outside is lost."""
    parts = []
    for axis, side in enumerate(shape):
        if axis not in axes:
            parts.append(slice(0, side))
            continue
        length = int(side * (1 - share) ** (1 / len(axes)))
        middle = int(rng.integers(side))
        parts.append(slice(max(middle - length // 2, 0), min(middle + (length + 1) // 2, side)))
    time, height, width = parts
    return time, height, width
