"""A small video backbone of matches: what moved where between neighbouring frames, and how it moved as a whole.

Axes: B clips, T frames, C channels, H height, W width, N = T - 1 tokens, D width; G = H / 4 cells a side, P = G x G cells,
R displacements of a match, S slots, V values of a slot. For the demo and for tests: it learns motions from about a thousand videos.

Comes in: normalised clips. Goes out: one token for each pair of neighbouring frames. A strided convolution gives each cell a
descriptor; a local correlation volume (Dosovitskiy et al. 2015, FlowNet, arXiv:1504.06852, section 3; as a learned motion feature:
Kwon et al. 2020, MotionSqueeze, arXiv:2007.09933) with a soft argmax gives its displacement; residual convolutions that shift
channels in time (Lin et al. 2019, TSM, arXiv:1811.08383) mix cells; slots with soft masks take the first and second moments of
positions and values (mean place, mean displacement, their covariance: its trace is growth, its antisymmetric part rotation).
Of our own making in this combination; not published, no pretrained weights.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vidfuse.models.parts import Tokens

STRIDE = 4
"""Pixels of a cell's side."""


class Match(nn.Module):
    """Where each cell of a frame went in the next one.

    Args:
        grid: G.
        radius: Largest displacement, in cells.
    """

    cell: Tensor
    outside: Tensor
    offset: Tensor

    def __init__(self, grid: int, radius: int) -> None:
        super().__init__()
        self.channels = 4 + (2 * radius + 1) ** 2
        rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
        steps = torch.arange(-radius, radius + 1)
        down, right = (step.flatten() for step in torch.meshgrid(steps, steps, indexing="ij"))
        row, column = rows.flatten()[:, None] + down, columns.flatten()[:, None] + right
        inside = (row >= 0) & (row < grid) & (column >= 0) & (column < grid)
        self.register_buffer("cell", row.clamp(0, grid - 1) * grid + column.clamp(0, grid - 1), persistent=False)
        self.register_buffer("outside", ~inside, persistent=False)
        self.register_buffer("offset", torch.stack([right, down], dim=1).float() / radius, persistent=False)
        self.log_sharpness = nn.Parameter(torch.tensor([math.log(20.0)]))

    def forward(self, here: Float[Tensor, "B C P"], there: Float[Tensor, "B C P"]) -> Float[Tensor, "B R P"]:
        """Displacement (right, down), its confidence and its correlation, then the whole distribution, for each cell."""
        correlation = torch.gather(here.transpose(1, 2) @ there, 2, self.cell.expand(len(here), -1, -1))
        share = (correlation * self.log_sharpness.exp()).masked_fill(self.outside, -1e4).softmax(dim=-1)
        flow = share @ self.offset.to(share.dtype) * 3
        parts = [flow, share.amax(-1, keepdim=True), (share * correlation).sum(-1, keepdim=True), share * 4]
        return torch.cat(parts, dim=-1).transpose(1, 2)


class Mix(nn.Module):
    """Residual convolution over cells, after a quarter of the channels each came from the next and the previous pair."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.point = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "B N C G G"]) -> Float[Tensor, "B N C G G"]:
        """The mixed cells."""
        quarter = x.shape[2] // 4
        later = F.pad(x[:, 1:, :quarter], (0, 0, 0, 0, 0, 0, 0, 1))
        earlier = F.pad(x[:, :-1, quarter : 2 * quarter], (0, 0, 0, 0, 0, 0, 1, 0))
        shifted = torch.cat([later, earlier, x[:, :, 2 * quarter :]], dim=2).flatten(0, 1)
        return x + self.point(F.gelu(self.wide(self.norm(shifted)))).unflatten(0, x.shape[:2])


class Moments(nn.Module):
    """Slots: soft masks over cells, and the moments of positions and values under each.

    Args:
        channels: C of the cells.
        grid: G.
        slots: S.
        values: V that are read from the cells, besides the displacement.
    """

    place: Tensor

    def __init__(self, channels: int, grid: int, slots: int, values: int) -> None:
        super().__init__()
        self.slots = slots
        self.mask = nn.Conv2d(channels, slots, 1)
        self.read = nn.Conv2d(channels, slots * values, 1)
        axis = (torch.arange(grid) + 0.5) / grid * 2 - 1
        down, right = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("place", torch.stack([right, down]).flatten(1), persistent=False)
        self.width = slots * (2 + (values + 2) * 3 + 2)

    def forward(self, cells: Float[Tensor, "B C G G"], flow: Float[Tensor, "B 2 P"]) -> Float[Tensor, "B D"]:
        """Mean place, mean values, covariance of both, spread and concentration of every slot, side by side."""
        mask = (self.mask(cells).flatten(2) * 2).softmax(dim=-1)
        own = rearrange(self.read(cells), "b (s v) h w -> b s v (h w)", s=self.slots)
        values = torch.cat([own, flow[:, None].expand(-1, self.slots, -1, -1)], dim=2)
        place = self.place.to(mask.dtype)
        mean_place = torch.einsum("bsp,cp->bsc", mask, place)
        mean_value = torch.einsum("bsp,bsvp->bsv", mask, values)
        together = torch.einsum("bscp,bsvp->bscv", mask[:, :, None] * place, values)
        covariance = together - mean_place[..., None] * mean_value[:, :, None]
        spread = mask @ place.square().sum(0)[:, None] - mean_place.square().sum(-1, keepdim=True)
        parts = [mean_place, mean_value, covariance.flatten(2) * 4, spread, mask.square().sum(-1, keepdim=True)]
        return torch.cat(parts, dim=-1).flatten(1)


class OverTime(nn.Module):
    """Residual convolution over the pairs of a clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.wide, self.point = nn.Conv1d(width, width, 3, padding=1), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """The mixed tokens."""
        return x + self.point(F.gelu(self.wide(self.norm(x).transpose(1, 2))).transpose(1, 2))


class TinyMotion(nn.Module):
    """Matches, mixing, moments, mixing over time.

    Args:
        grid: G.
        width: D.
        channels: Channels of the cells.
        radius: Largest displacement between neighbouring frames, in cells.
        slots: S.
        values: V.
    """

    mean, std = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)

    def __init__(self, grid: int, *, width: int, channels: int, radius: int, slots: int, values: int) -> None:
        super().__init__()
        self.width, self.grid = width, grid
        describe = 32
        self.describe = nn.Conv2d(3, describe, 2 * STRIDE, STRIDE, STRIDE // 2)
        with torch.no_grad():  # nearly blind to flat colour at first: edges and corners are what can be matched
            self.describe.weight.sub_(self.describe.weight.mean((2, 3), keepdim=True) * 0.7)
        self.match = Match(grid, radius)
        self.enter = nn.Conv2d(self.match.channels + describe, channels, 1)
        self.mix = nn.ModuleList(Mix(channels) for _ in range(2))
        self.moments = Moments(channels, grid, slots, values)
        self.into = nn.Sequential(nn.LayerNorm(self.moments.width), nn.Linear(self.moments.width, width))
        self.over_time = nn.ModuleList(OverTime(width) for _ in range(2))

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The mixing stages: units of activation checkpointing."""
        return (*self.mix, *self.over_time)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each pair of neighbouring frames, at the middle of the pair's time and of the frame."""
        batch, frames = clip.shape[:2]
        cells = self.describe(clip.flatten(0, 1)).flatten(2)
        cells = F.normalize(cells - cells.mean(dim=2, keepdim=True), dim=1).unflatten(0, (batch, frames))
        matches = self.match(cells[:, :-1].flatten(0, 1), cells[:, 1:].flatten(0, 1))
        seen = torch.cat([matches, cells[:, :-1].flatten(0, 1) * 3], dim=1).unflatten(2, (self.grid, self.grid))
        x = self.enter(seen).unflatten(0, (batch, frames - 1))
        for mix in self.mix:
            x = mix(x)
        x = self.into(self.moments(x.flatten(0, 1), matches[:, :2])).unflatten(0, (batch, frames - 1))
        for over_time in self.over_time:
            x = over_time(x)
        times = (torch.arange(1, frames, device="cpu") / frames)[:, None]
        return Tokens(x, torch.cat([times, torch.full((frames - 1, 2), 0.5, device="cpu")], dim=1))


def build(
    *, frames: int, size: int, width: int = 128, channels: int = 48, radius: int = 4, slots: int = 8, values: int = 4
) -> TinyMotion:
    """Build the backbone.

    Args:
        frames: T of a clip, 2 at least.
        size: Height and width of a clip, in pixels; a multiple of 4.
        width: D of the tokens.
        channels: Channels of the cells; a multiple of 4.
        radius: Largest displacement between neighbouring frames, in cells of 4 pixels.
        slots: Soft masks.
        values: Values that each mask reads, besides the displacement.

    Raises:
        ValueError: a clip of one frame, a size or channels that 4 does not divide, or a number below 1.
    """
    if frames < 2:
        raise ValueError(f"tiny_motion compares neighbouring frames: data.frames is 2 or more, given {frames}")
    if size % STRIDE:
        raise ValueError(f"tiny_motion has cells of {STRIDE} pixels: data.size is a multiple of {STRIDE}, given {size}")
    if channels % 4 or min(width, channels, radius, slots, values) < 1:
        raise ValueError(
            f"channels is a multiple of 4 and all are 1 or more: {width=}, {channels=}, {radius=}, {slots=}, {values=}"
        )
    return TinyMotion(size // STRIDE, width=width, channels=channels, radius=radius, slots=slots, values=values)
