"""Tokens averaged in the cells of a grid over the clip: fewer of them, on a scale that streams can share.

Axes: B clips, N tokens, G cells, D width. Comes in: a stream's `Tokens`. Goes out: one token a cell, time slowest.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vidfuse.models.parts import Tokens

Grid = tuple[int, int, int]
"""Cells along time, height, width."""


def pool(tokens: Tokens, grid: Grid) -> Tokens:
    """The mean of the tokens in each cell, in float32, at the mean of their positions; padding does not count.

    A cell is an equal part of the clip, and a token belongs to the one that its centre is in. A cell of which a clip has no real
    token is padding in it.

    Raises:
        ValueError: a cell without any token: the grid is finer than the stream's own.
    """
    cells = _cells(tokens.positions, grid)
    count = grid[0] * grid[1] * grid[2]
    member = torch.zeros(count, len(cells))
    member[cells, torch.arange(len(cells))] = 1
    sizes = member.sum(1)
    if bool((sizes == 0).any()):
        own = tuple(len(torch.unique(tokens.positions[:, axis])) for axis in range(3))
        raise ValueError(
            f"a grid of {_words(grid)} cells (time x height x width) has cells without a token: the stream's tokens are at "
            f"{_words(own)} different places; take no more cells than that along any axis"
        )
    positions = member @ tokens.positions / sizes[:, None]
    member, sizes = member.to(tokens.values.device), sizes.to(tokens.values.device)
    values, dtype = tokens.values.float(), tokens.values.dtype
    if tokens.mask is None:
        return Tokens(_sums(values, member, sizes[:, None]).to(dtype), positions)
    real = tokens.mask.float()
    sizes = real @ member.T
    sums = _sums(values * real[..., None], member, sizes.clamp(min=1)[..., None])
    return replace(tokens, values=sums.to(dtype), positions=positions, mask=sizes > 0)


def _sums(values: Float[Tensor, "B N D"], member: Float[Tensor, "G N"], sizes: Tensor) -> Float[Tensor, "B G D"]:
    return (member @ values) / sizes


def _cells(positions: Float[Tensor, "N 3"], grid: Grid) -> Int[Tensor, " N"]:
    """The cell of each token; a centre on a border, where rounding decides, is in the later one."""
    wanted = torch.tensor(grid)
    at = torch.minimum((positions.double() * wanted + 1e-6).floor().long(), wanted - 1)
    return (at[:, 0] * grid[1] + at[:, 1]) * grid[2] + at[:, 2]


def _words(grid: tuple[int, ...]) -> str:
    return " x ".join(map(str, grid))
