"""The streams' sum or product, element by element: the simplest joint features.

Axes: B clips, N tokens, D width.
Comes in: tokens of the two streams. Goes out: their masked means, projected to one width, added or multiplied. Sum and product
of two streams' features are compared by Feichtenhofer et al. 2016 (arXiv:1604.06573, section 3.1: sum fusion) and 2017 (CVPR,
"Spatiotemporal Multiplier Networks": multiplicative interaction), there inside the networks, here at their end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from vidfuse.models.checks import check_two_streams
from vidfuse.models.layers import masked_mean
from vidfuse.models.parts import Fused, Tokens


class Elementwise(nn.Module):
    """Masked mean of each stream, projected; then their sum or product."""

    blocks: Sequence[nn.Module] = ()

    def __init__(self, widths: Mapping[str, int], *, width: int, operation: Literal["sum", "product"]) -> None:
        super().__init__()
        self.width = width
        self.operation = operation
        self.project = nn.ModuleDict({name: nn.Linear(d, width) for name, d in widths.items()})

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature [B, width]; there is no attention to return."""
        features = torch.stack([project(masked_mean(streams[name])) for name, project in self.project.items()])
        return Fused(features.sum(dim=0) if self.operation == "sum" else features.prod(dim=0), {})


def build(*, widths: Mapping[str, int], width: int = 512, operation: Literal["sum", "product"] = "sum") -> Elementwise:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        width: D of the feature, to which each stream is projected.
        operation: `sum` or `product` of the two.

    Raises:
        ValueError: not exactly the two streams, or no width.
    """
    check_two_streams("elementwise", widths)
    if width < 1:
        raise ValueError(f"width >= 1 is needed, given {width=}")
    return Elementwise(widths, width=width, operation=operation)
