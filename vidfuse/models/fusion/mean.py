"""The mean of the streams: the simplest fusion, and with one stream and `width=null` a plain baseline.

Axes: B clips, N tokens, D width.
Comes in: tokens of one or two streams. Goes out: the average of each stream's mean over its real tokens, projected to one
width. R3D-18 with `width=null` and a linear head is the published R3D-18: average pooling and a classifier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vidfuse.models.layers import masked_mean
from vidfuse.models.parts import Fused, Tokens


class Mean(nn.Module):
    """Masked mean of each stream, projected, averaged."""

    blocks: Sequence[nn.Module] = ()

    def __init__(self, projections: Mapping[str, nn.Module], width: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.ModuleDict(projections)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature [B, width]; there is no attention to return."""
        features = [project(masked_mean(streams[name])) for name, project in self.project.items()]
        return Fused(torch.stack(features).mean(dim=0), {})


def build(*, widths: Mapping[str, int], width: int | None = 512) -> Mean:
    """Build the fusion.

    Args:
        widths: D of each stream's tokens, by its name.
        width: D of the feature, to which each stream is projected. `None`: no projection; the streams must be equally wide.

    Raises:
        ValueError: no projection is asked for and the streams differ in width.
    """
    if width is not None:
        return Mean({name: nn.Linear(d, width) for name, d in widths.items()}, width)
    if len(set(widths.values())) != 1:
        said = ", ".join(f"{name} {d}" for name, d in widths.items())
        raise ValueError(
            f"fusion mean with width=null averages streams of one width, given {said}; give it a width, such as 512"
        )
    return Mean({name: nn.Identity() for name in widths}, next(iter(widths.values())))
