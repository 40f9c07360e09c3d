"""Blocks that more than one file of this room needs.

Axes: B clips, T frames, C channels, H height, W width, N tokens (Q of queries, K of keys), D width of a token, h heads.
Comes in: clips or tokens. Goes out: tokens, features, positions. No file of `backbones/` or `fusion/` imports another one;
what two of them share is here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from vidfuse.models.checks import check_share
from vidfuse.models.parts import Branches, Tokens, Underway

log = logging.getLogger(__name__)

SAME_PLACE = 1e-4
"""Distances that differ by less, in clips, are equal: rounding of positions is below it, grids of up to 1000 cells above."""
LONGEST_WAVE = 2.0
"""Longest wavelength of `encode_positions`, in clips: ends of a clip never coincide."""
VIT_BLOCKS: Mapping[str, int] = MappingProxyType({"s": 12, "b": 12, "l": 24, "h": 32, "g": 40})
"""Blocks of the image transformers by the letter of their size (Zhai et al. 2022, arXiv:2106.04560, table 2; DINOv2's g is 40 deep)."""
SHORTEST_WAVE = 1 / 16
"""Shortest wavelength of `encode_positions`, in clips: tells neighbours in a grid of up to 32 apart."""


class Normalize(nn.Module):
    """uint8 RGB to the zero mean and unit variance a backbone was trained with.

    The constants stay float32 whatever an engine casts the model to: rounding `mean` to bfloat16 alone moves the input by
    0.4 % of its deviation. They are not in the state dict.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self._place(None)

    def forward(self, clip: UInt8[Tensor, "B T C H W"], dtype: torch.dtype) -> Float[Tensor, "B T C H W"]:
        """`(clip / 255 - mean) / std` in `dtype`, computed in float32."""
        return (clip.float() * self.scale + self.shift).to(dtype)

    def _place(self, device: torch.device | None) -> None:
        mean, std = (torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (self.mean, self.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalize:
        super()._apply(fn, recurse)
        self._place(self.scale.device)
        return self


class FrameViT(nn.Module):
    """A timm vision transformer applied to each frame: the tokens after its last norm, registers dropped.

    Args:
        vit: timm model without pooling or head, so that calling it gives its normed tokens. It is called, not its
            `forward_features`: ZeRO-3 gathers a module's own parameters (class token, positions) when the module is called.
        tokens: `all` the class token and the patches of each frame, `class` or `patch` only these.
        adapt: Turns a published file's state into that of `vit` (timm's own `checkpoint_filter_fn`).
        licence: What a user of the published weights must know; told when weights are loaded. `None`: nothing.
        frame_stride: Of so many frames in a row the last stands for all of them, at their centre.
        later: Blocks of a published file that come after the model's and are not used.
    """

    def __init__(
        self,
        vit: nn.Module,
        *,
        tokens: Literal["all", "class", "patch"],
        adapt: Callable[..., dict[str, Tensor]],
        licence: str | None = None,
        frame_stride: int = 1,
        later: Sequence[int] = (),
    ) -> None:
        super().__init__()
        timm_model = cast(Any, vit)
        timm_model.forward = partial(_all_or_embedding, timm_model, timm_model.forward)
        self.vit = vit
        self.frame_stride = frame_stride
        self._later = tuple(f"blocks.{number}." for number in later)
        self.tokens = tokens
        self.width: int = timm_model.embed_dim
        self.mean: tuple[float, float, float] = tuple(timm_model.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(timm_model.pretrained_cfg["std"])
        self.patch: int = timm_model.patch_embed.patch_size[0]
        self.licence = licence
        self._adapt = adapt

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks."""
        return tuple(cast(nn.ModuleList, self.vit.blocks))

    @property
    def branches(self) -> Sequence[Branches]:
        """Attention and feed-forward part of each block; LayerScale, where a model has it, comes after them."""
        return tuple(Branches({"attn": block.attn}, (block.mlp,)) for block in cast(Sequence[Any], self.blocks))

    @property
    def halfway(self) -> Sequence[nn.Module]:
        """Of each block the last module of its attention's branch, stochastic depth or nothing."""
        return tuple(block.drop_path1 for block in cast(Sequence[Any], self.blocks))

    @property
    def patches_count(self) -> bool:
        """Whether patches are given."""
        return self.tokens != "class"

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """Tokens frame by frame; in a frame the class token first, then patches row by row."""
        frames = self._frames(clip)
        return self._tokens(self.vit(rearrange(frames, "B T C H W -> (B T) C H W")), self._grid(frames))

    def begin(self, clip: Float[Tensor, "B T C H W"]) -> Underway:
        """Each frame's tokens before the first block."""
        frames = self._frames(clip)
        values, *rotary = self.vit(rearrange(frames, "B T C H W -> (B T) C H W"), embedding_only=True)
        return Underway(
            values,
            self._grid(frames),
            rows=frames.shape[1],
            prefix=cast(int, self.vit.num_prefix_tokens),
            keywords={"rope": rotary[0]} if rotary else {},
        )

    def end(self, underway: Underway) -> Tokens:
        """Tokens as of a call, of values after the last block."""
        return self._tokens(cast(nn.Module, self.vit.norm)(underway.values), underway.grid)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of a published file (timm's or the authors') under this module's names, without its classifier."""
        if all(key.startswith("vit.") for key in state):
            return dict(state)
        adapted = without(self._adapt(dict(state), self.vit), ("head.", *self._later), said=type(self.vit).__name__)
        return {f"vit.{key}": value for key, value in adapted.items()}

    def _kept(self, values: Float[Tensor, "F n D"]) -> Float[Tensor, "F m D"]:
        prefix = cast(int, self.vit.num_prefix_tokens)
        chosen = {"class": values[:, :1], "patch": values[:, prefix:]}
        return torch.cat(tuple(chosen.values()), dim=1) if self.tokens == "all" else chosen[self.tokens]

    def _frames(self, clip: Float[Tensor, "B T C H W"]) -> Float[Tensor, "B t C H W"]:
        return clip[:, self.frame_stride - 1 :: self.frame_stride]

    def _grid(self, frames: Float[Tensor, "B t C H W"]) -> tuple[int, int, int]:
        return frames.shape[1], frames.shape[3] // self.patch, frames.shape[4] // self.patch

    def _tokens(self, values: Float[Tensor, "F n D"], grid: tuple[int, int, int]) -> Tokens:
        kept = rearrange(self._kept(values), "(B T) n D -> B (T n) D", T=grid[0])
        return Tokens(kept, frame_positions(*grid, tokens=self.tokens))


def _all_or_embedding(
    vit: Any, forward: Callable[..., Tensor], frames: Float[Tensor, "F C H W"], *, embedding_only: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """A timm transformer's own forward, or what it begins with: tokens before the first block, and their rotary positions.

    The class token and positions are the transformer's own parameters, so that both have to be calls of it (ZeRO-3).
    """
    if not embedding_only:
        return forward(frames)
    placed = vit._pos_embed(vit.patch_embed(frames))
    values, *rotary = placed if isinstance(placed, tuple) else (placed,)
    return vit.norm_pre(values), *(r for r in rotary if r is not None)


def without(state: Mapping[str, Tensor], prefixes: tuple[str, ...], *, said: str) -> dict[str, Tensor]:
    """A published state less the tensors of parts that are not here, which are counted in the log."""
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    if len(kept) < len(state):
        found = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)]
        log.info("%s: %d tensors of the file are not used (%s)", said, len(state) - len(kept), ", ".join(found))
    return kept


def ranks(times: Float[Tensor, " N"]) -> Int[Tensor, " N"]:
    """Number of different earlier times, of each."""
    ordered, order = times.sort()
    steps = torch.cat((torch.zeros_like(order[:1]), (ordered.diff() > SAME_PLACE).long().cumsum(0)))
    return torch.zeros_like(order).scatter(0, order, steps)


def masked_mean(tokens: Tokens) -> Float[Tensor, "B D"]:
    """Mean of each clip's real tokens, accumulated in float32; zero for a clip without any."""
    if tokens.mask is None:
        return tokens.values.mean(dim=1, dtype=torch.float32).to(tokens.values.dtype)
    real = tokens.mask[..., None]
    total = tokens.values.masked_fill(~real, 0).sum(dim=1, dtype=torch.float32)
    return (total / real.sum(dim=1).clamp(min=1)).to(tokens.values.dtype)


def without_padding(tokens: Tokens) -> Tokens:
    """The tokens with padded values set to zero, so that whatever was there (not a number, too) reaches nothing."""
    if tokens.mask is None:
        return tokens
    return replace(tokens, values=tokens.values.masked_fill(~tokens.mask[..., None], 0))


def grid_positions(frames: int, height: int, width: int) -> Float[Tensor, "N 3"]:
    """Centres of the cells of a grid over the clip, as (time, height, width) in 0..1, time slowest."""
    axes = [(torch.arange(n, device="cpu", dtype=torch.float32) + 0.5) / n for n in (frames, height, width)]
    return rearrange(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1), "t h w a -> (t h w) a")


def frame_positions(
    frames: int, height: int, width: int, *, tokens: Literal["all", "class", "patch"] = "all"
) -> Float[Tensor, "N 3"]:
    """Positions of tokens frame by frame: the class token at the frame's centre, then its patches row by row."""
    patches = rearrange(grid_positions(frames, height, width), "(T n) a -> T n a", T=frames)
    classes = grid_positions(frames, 1, 1)[:, None]
    chosen = {"class": classes, "patch": patches}
    kept = torch.cat((classes, patches), dim=1) if tokens == "all" else chosen[tokens]
    return rearrange(kept, "T n a -> (T n) a")


def encode_positions(positions: Float[Tensor, "N 3"], width: int, device: torch.device | None = None) -> Float[Tensor, "N D"]:
    """Sines and cosines of continuous (time, height, width), a third of `width` each, the rest zero, on `device`.

    The 3-D form of Vaswani et al. 2017 (arXiv:1706.03762, section 3.5) with wavelengths in clips, from `LONGEST_WAVE` to
    `SHORTEST_WAVE`, so that grids of different strides share one scale.

    Raises:
        ValueError: `width` is below 6, a sine and a cosine for each axis.
    """
    if width < 6:
        raise ValueError(f"positions in three axes need a width of 6 or more, given {width}")
    positions = positions.to(device)
    steps = torch.linspace(0, 1, width // 6, device=positions.device)
    waves = LONGEST_WAVE * (SHORTEST_WAVE / LONGEST_WAVE) ** steps
    angles = rearrange(2 * math.pi * positions[..., None] / waves, "N a f -> N (a f)")
    encoded = torch.cat((angles.sin(), angles.cos()), dim=-1)
    return F.pad(encoded, (0, width - encoded.shape[-1]))


def drop_rates(highest: float, blocks: int) -> list[float]:
    """Stochastic depth of each block: from none in the first to `highest` in the last, in equal steps.

    Huang et al. 2016 (arXiv:1603.09382, section 3), from zero as in DeiT (Touvron et al. 2021, arXiv:2012.12877) and timm.

    Raises:
        ValueError: `highest` is no share.
    """
    check_share("stochastic_depth", highest)
    return [highest * i / max(blocks - 1, 1) for i in range(blocks)]
