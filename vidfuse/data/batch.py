"""What a loader hands to a step.

Axes: B rows (a row is one view of one sample), T frames, C colour channels (3), H height, W width, N tokens, D width of a token.
Comes in: columns of a stream's block. Goes out: a `Batch` of uint8 clips, of cached tokens, or of both; normalisation happens on the
device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
class Features:
    """Cached tokens of a stream."""

    values: Float[Tensor, "B N D"]
    positions: Float[Tensor, "N 3"]
    """(time, height, width) of each token in the clip; on the CPU."""


@dataclass(frozen=True)
class Batch:
    """Rows of clips with what a step needs to know of each."""

    clips: UInt8[Tensor, "B T C H W"]
    """RGB, 0..255. T is 0 where the tokens of all streams are cached: nothing was decoded."""
    labels: Int[Tensor, " B"]
    """Class, 0..K-1; -1 where the split has no labels."""
    weights: Float[Tensor, " B"]
    """1, or 0 for padding and for a video that could not be read."""
    samples: Int[Tensor, " B"]
    """Row of the sample in its split's index; -1 for padding."""
    errors: tuple[SampleError, ...] = ()
    """Videos of this batch that could not be read; their rows are here with weight 0."""
    features: Mapping[str, Features] = field(default_factory=dict)
    """Cached tokens by stream."""

    def to(self, device: torch.device) -> Batch:
        """The batch with clips, cached tokens, labels and weights on `device` (`samples` stays on the CPU)."""
        move = {n: getattr(self, n).to(device, non_blocking=True) for n in ("clips", "labels", "weights")}
        features = {n: replace(f, values=f.values.to(device, non_blocking=True)) for n, f in self.features.items()}
        return replace(self, **move, features=features)
