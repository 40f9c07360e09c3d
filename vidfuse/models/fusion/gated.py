"""A gate for each element of the feature that says which stream it is taken from: the gated multimodal unit.

Axes: B clips, N tokens, D width.
Comes in: tokens of the two streams. Goes out: `z * tanh(Ws s) + (1 - z) * tanh(Wm m)` with `z = sigmoid(Wz [s; m])`, where s
and m are the masked means of semantic and motion. Source: Arevalo et al. 2017 (arXiv:1702.01992), the bimodal unit, equations
1-4 and figure 2b; without biases, as in the equations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vidfuse.models.checks import check_two_streams
from vidfuse.models.layers import masked_mean
from vidfuse.models.parts import Fused, Tokens


class Gated(nn.Module):
    """Masked means of both streams, each through a linear layer and tanh, mixed by a gate that sees both."""

    blocks: Sequence[nn.Module] = ()

    def __init__(self, widths: Mapping[str, int], *, width: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.ModuleDict({name: nn.Linear(widths[name], width, bias=False) for name in ("semantic", "motion")})
        self.gate = nn.Linear(sum(widths.values()), width, bias=False)

    def forward(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused:
        """The feature [B, width]; there is no attention to return."""
        means = {name: masked_mean(streams[name]) for name in self.hidden}
        semantic, motion = (hidden(means[name]).tanh() for name, hidden in self.hidden.items())
        gate = self.gate(torch.cat(tuple(means.values()), dim=-1)).sigmoid()
        return Fused(gate * semantic + (1 - gate) * motion, {})


def build(*, widths: Mapping[str, int], width: int = 512) -> Gated:
    """Build the fusion.

    Args:
        widths: D of the tokens of `semantic` and `motion`.
        width: D of the feature.

    Raises:
        ValueError: not exactly the two streams, or no width.
    """
    check_two_streams("gated", widths)
    if width < 1:
        raise ValueError(f"width >= 1 is needed, given {width=}")
    return Gated(widths, width=width)
