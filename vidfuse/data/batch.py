"""What a loader hands to a step.

Axes: B rows (a row is one view of one sample), T frames, C colour channels (3), H height, W width.
Comes in: columns of a stream's block. Goes out: a `Batch` of uint8 clips; normalisation happens on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True)
class SampleError:
    """A video that could not be read: which one and why."""

    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Rows of clips with what a step needs to know of each."""

    clips: UInt8[Tensor, "B T C H W"]
    """RGB, 0..255."""
    labels: Int[Tensor, " B"]
    """Class, 0..K-1; -1 where the split has no labels."""
    weights: Float[Tensor, " B"]
    """1, or 0 for padding and for a video that could not be read."""
    samples: Int[Tensor, " B"]
    """Row of the sample in its split's index; -1 for padding."""
    errors: tuple[SampleError, ...] = ()
    """Videos of this batch that could not be read; their rows are here with weight 0."""

    def to(self, device: torch.device) -> Batch:
        """The batch with clips, labels and weights on `device` (`samples` stays on the CPU)."""
        move = {n: getattr(self, n).to(device, non_blocking=True) for n in ("clips", "labels", "weights")}
        return replace(self, **move)
