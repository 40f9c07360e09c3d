"""What a loader hands to a step.

Axes: B rows (a row is one view of one sample), T frames, C colour channels (3), H height, W width, N tokens, D width of a token.
Comes in: columns of a stream's block. Goes out: a `Batch` of uint8 clips, of cached tokens, or of both; normalisation happens on the
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

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

    counted: Float[Tensor, " B"] | None = None
    """The weights on the CPU; None: they are there."""

    @property
    def host_weights(self) -> Float[Tensor, " B"]:
        """The weights on the CPU, wherever the batch is."""
        return self.weights if self.counted is None else self.counted

    def to(self, device: torch.device) -> Batch:
        """The batch with clips, cached tokens, labels and weights on `device` (`samples` stays on the CPU)."""
        return replace(self._each(lambda tensor: tensor.to(device, non_blocking=True)), counted=self.host_weights)

    def pinned(self) -> Batch:
        """The batch in memory from which a GPU copies while it computes."""
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Have the memory on a GPU not be used anew before `stream` is done with it."""
        self._each(lambda tensor: tensor.record_stream(stream) or tensor)  # type: ignore[func-returns-value]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in ("clips", "labels", "weights")}
        features = {name: replace(of, values=change(of.values)) for name, of in self.features.items()}
        return replace(self, **changed, features=features)
