"""Blocks that more than one file of this room needs.

Axes: B clips, T frames, C channels, H height, W width, N tokens (Q of queries, K of keys), D width of a token, h heads.
Comes in: clips or tokens. Goes out: tokens, features, positions. No file of `backbones/` or `fusion/` imports another one;
what two of them share is here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


class _OwnBatchNorm(_BatchNorm):
    """Batch norm in the precision of its running statistics, whatever an engine casts its parameters to.

    DeepSpeed casts parameters and leaves buffers in float32 (running statistics of bfloat16 would not move by a tenth of a
    difference); torch's own batch norm refuses that mixture.
    """

    def forward(self, input: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        """The input normalised, in its own dtype."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        assert mean is not None and self.momentum is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(input, mean, var, weight, bias, self.training, self.momentum, self.eps)


class BatchNorm2d(_OwnBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in the precision of its running statistics."""


class BatchNorm3d(_OwnBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in the precision of its running statistics."""


OWN_BATCH_NORM: Mapping[type[nn.Module], type[_OwnBatchNorm]] = {nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
"""What `with_own_batch_norm` puts in the place of torch's."""


def with_own_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every batch norm of torch inside replaced by ours, under the same names, with the same tensors."""
    for name, child in module.named_children():
        if own_type := OWN_BATCH_NORM.get(type(child)):
            norm = cast(_BatchNorm, child)
            own = own_type(norm.num_features, norm.eps, norm.momentum).train(norm.training)
            own._parameters, own._buffers = norm._parameters, norm._buffers
            module.add_module(name, own)
        else:
            with_own_batch_norm(child)
    return module


class FreezableBatchNorm(nn.Module):
    """A network whose batch norm may be frozen: statistics and affine parameters stay as they are, also in training mode."""

    batch_norm: Literal["train", "frozen"] = "train"

    def set_batch_norm(self, mode: Literal["train", "frozen"]) -> None:
        """Choose; called once the network's parts are there."""
        self.batch_norm = mode
        if mode == "frozen":
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> FreezableBatchNorm:
        """Set training mode, except for batch norm that is frozen."""
        super().train(mode)
        if self.batch_norm == "frozen":
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, _BatchNorm)]


def sliding_windows(frames: int, segments: int) -> tuple[slice, ...]:
    """`segments` windows at equal distances from the first frame to the last, each twice as long as a segment's share.

    Raises:
        ValueError: fewer frames than segments, or no segment.
    """
    if not 1 <= segments <= frames:
        raise ValueError(f"a clip of {frames} frames has 1 to {frames} segments, given {segments}")
    length = min(-(-2 * frames // segments), frames)
    starts = [round(i * (frames - length) / max(segments - 1, 1)) for i in range(segments)]
    return tuple(slice(start, start + length) for start in starts)


def cells_of(blocks: Iterable[nn.Module], clip: Float[Tensor, "B T C H W"]) -> Tokens:
    """Blocks of 3-D convolutions in order; a token at the centre of each cell of what the last one gives, time slowest."""
    x = rearrange(clip, "B T C H W -> B C T H W")
    for block in blocks:
        x = block(x)
    t, h, w = x.shape[2:]
    return Tokens(rearrange(x, "B D t h w -> B (t h w) D"), grid_positions(t, h, w))


def without(state: Mapping[str, Tensor], prefixes: tuple[str, ...], *, said: str) -> dict[str, Tensor]:
    """A published state less the tensors of parts that are not here, which are counted in the log."""
    kept = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    if len(kept) < len(state):
        found = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in state)]
        log.info("%s: %d tensors of the file are not used (%s)", said, len(state) - len(kept), ", ".join(found))
    return kept


class VideoResNet(FreezableBatchNorm):
    """Stages of a torchvision video residual network, under its own parameter names, up to the one that is asked for.

    Args:
        network: torchvision's model.
        stage: Last stage; later ones and the classifier are left out.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
        mean: Mean of each channel of its input, for values 0..1.
        std: Standard deviation of each channel of its input, for values 0..1.
        frames: T of a clip.
        segments: Number of windows that slide over the clip, each overlapping its neighbours by half or more; a window goes through
            the network by itself, and its output is averaged over time. `None`: the clip goes through as a whole.

    Raises:
        ValueError: fewer frames than segments.
    """

    widths: Mapping[str, int] = MappingProxyType({"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512})

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        batch_norm: Literal["train", "frozen"],
        mean: Sequence[float],
        std: Sequence[float],
        frames: int,
        segments: int | None,
    ) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.width = self.widths[stage]
        self.windows = () if segments is None else sliding_windows(frames, segments)
        self.stages = ("stem", *(name for name in self.widths if name <= stage))
        for name in self.stages:
            self.add_module(name, with_own_batch_norm(network.get_submodule(name)))
        self.set_batch_norm(batch_norm)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Stem and stages."""
        return tuple(self.get_submodule(name) for name in self.stages)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last stage's output; of windows, time slowest."""
        if not self.windows:
            return cells_of(self.blocks, clip)
        parts = torch.stack([clip[:, part] for part in self.windows], dim=1)
        tokens = cells_of(self.blocks, rearrange(parts, "B n T C H W -> (B n) T C H W"))
        places = tokens.positions[tokens.positions[:, 0] == tokens.positions[0, 0]]
        cells = rearrange(tokens.values, "(B n) (t c) D -> B n t c D", n=len(self.windows), c=len(places)).mean(dim=2)
        centres = [(part.start + part.stop) / 2 / clip.shape[1] for part in self.windows]
        positions = places.repeat(len(centres), 1)
        positions[:, 0] = torch.tensor(centres, device=places.device).repeat_interleave(len(places))
        return Tokens(rearrange(cells, "B n c D -> B (n c) D"), positions)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of torchvision's file without the classifier and the stages that are not here."""
        later = tuple(f"{name}." for name in (*self.widths, "fc") if name not in self.stages)
        return without(state, later, said="torchvision's video network")


class Attention(nn.Module):
    """Multi-head attention of one stream's tokens over another's (Vaswani et al. 2017, arXiv:1706.03762, section 3.2).

    Args:
        width: D of queries, keys and result.
        heads: Number of heads; divides `width`.
        dropout: Dropout of the attention weights.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        queries: Float[Tensor, "B Q D"],
        keys: Float[Tensor, "B K D"],
        mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"] | None = None,
        *,
        return_attention: bool = False,
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B h Q K"] | None]:
        """What `queries` read from `keys`, and the weights they did it with (float32, before dropout) if asked for.

        Where `mask` is False a key is not looked at (by that query); with no key to look at a query reads zero with weights
        of zero.
        """
        q = rearrange(self.query(queries), "B Q (h d) -> B h Q d", h=self.heads)
        k, v = rearrange(self.key_value(keys), "B K (two h d) -> two B h K d", two=2, h=self.heads)
        weights = self._weights(q, k, mask) if return_attention else None
        read = self._read(q, k, v, mask) if weights is None else self._dropped(weights).to(v.dtype) @ v
        if mask is not None:
            read = read * _looking(mask)
        return self.out(rearrange(read, "B h Q d -> B Q (h d)")), weights

    def _read(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else _lookable(mask), dropout_p=dropout)

    def _weights(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT).float() / math.sqrt(q.shape[-1])
        if mask is None:
            return scores.softmax(dim=-1)
        return scores.masked_fill(~_lookable(mask), -torch.inf).softmax(dim=-1) * _looking(mask)

    def _dropped(self, weights: Tensor) -> Tensor:
        return F.dropout(weights, self.dropout, self.training)


class Mlp(nn.Sequential):
    """The feed-forward part of a transformer block: wide, GELU, back."""

    def __init__(self, width: int, ratio: float, dropout: float = 0.0) -> None:
        hidden = int(width * ratio)
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))


class AttentivePool(nn.Module):
    """One learned query reads all tokens (the attentive probe of V-JEPA: Bardes et al. 2024, arXiv:2404.08471, section 4.2).

    Args:
        width: D of the tokens.
        heads: Attention heads; they divide `width`.
        mlp_ratio: Hidden width of the feed-forward part after it, as a multiple of `width`.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.LayerNorm(width), Mlp(width, mlp_ratio))

    def forward(self, tokens: Tokens) -> Float[Tensor, "B D"]:
        """The clip's feature; padded tokens are not looked at."""
        query = self.query.expand(len(tokens.values), -1, -1)
        x = query + self.attention(query, self.norm(without_padding(tokens).values), tokens.mask)[0]
        return (x + self.mlp(x))[:, 0]


def _lookable(mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"]) -> Bool[Tensor, "B 1 _ K"]:
    """The mask as attention takes it; a query with no key looks at all (softmax of nothing is not a number)."""
    by_query = mask if mask.ndim == 3 else mask[:, None]
    return (by_query | ~by_query.any(dim=-1, keepdim=True))[:, None]


def _looking(mask: Bool[Tensor, "B K"] | Bool[Tensor, "B Q K"]) -> Bool[Tensor, "B 1 _ 1"]:
    """Whether a query has a key to look at."""
    by_query = mask if mask.ndim == 3 else mask[:, None]
    return by_query.any(dim=-1, keepdim=True)[:, None]


def ranks(times: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
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


def check_two_streams(fusion: str, widths: Mapping[str, int]) -> None:
    """Refuse anything but the two streams.

    Raises:
        ValueError: one is missing.
    """
    if set(widths) != {"semantic", "motion"}:
        raise ValueError(
            f"fusion {fusion} joins two streams, semantic and motion, given {' and '.join(widths) or 'none'}; "
            "add the other stream, or take fusion mean or concat for one"
        )


def check_heads(width: int, heads: int) -> None:
    """Refuse heads that do not share the width evenly.

    Raises:
        ValueError: `heads` is no divisor of `width`.
    """
    if heads < 1 or width % heads:
        fitting = [h for h in (1, 2, 4, 6, 8, 12, 16, 32) if width % h == 0]
        raise ValueError(f"heads={heads} does not divide width={width}; heads that do: {', '.join(map(str, fitting))}")


def check_share(name: str, value: float) -> None:
    """Refuse a probability outside [0, 1).

    Raises:
        ValueError: it is outside.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} is a share of at least 0 and below 1, given {value:g}")


def drop_rates(highest: float, blocks: int) -> list[float]:
    """Stochastic depth of each block: from none in the first to `highest` in the last, in equal steps.

    Huang et al. 2016 (arXiv:1603.09382, section 3), from zero as in DeiT (Touvron et al. 2021, arXiv:2012.12877) and timm.

    Raises:
        ValueError: `highest` is no share.
    """
    check_share("stochastic_depth", highest)
    return [highest * i / max(blocks - 1, 1) for i in range(blocks)]


def check_patch(size: int, patch: int) -> None:
    """Refuse a clip that the patches do not tile.

    Raises:
        ValueError: `patch` does not divide `size`; the message has the nearest sizes that do.
    """
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        near = f"{below} and {above}" if below else f"{above}"
        raise ValueError(f"size {size} is not tiled by patches of {patch} x {patch} pixels; nearest that are: {near}")


def check_tubelet(frames: int, tubelet: int) -> None:
    """Refuse a clip whose frames the tubelets do not tile.

    Raises:
        ValueError: `tubelet` does not divide `frames`; the message has the nearest numbers that do.
    """
    if frames < 1 or frames % tubelet:
        below, above = frames // tubelet * tubelet, (frames // tubelet + 1) * tubelet
        near = f"{below} and {above}" if below > 0 else f"{tubelet}"
        raise ValueError(f"{frames} frames are not tiled by tubelets of {tubelet} frames; nearest that are: {near}")


def check_stride(frames: int, frame_stride: int) -> None:
    """Refuse a distance of frames that does not tile the clip.

    Raises:
        ValueError: `frame_stride` does not divide `frames`.
    """
    if frame_stride < 1 or frames % frame_stride:
        fitting = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise ValueError(f"frame_stride={frame_stride} does not divide {frames} frames; those that do: {fitting}")


def kept_blocks(depth: int | None, blocks: int) -> int:
    """How many of a transformer's `blocks` are kept, from the first, when `depth` is asked for; `None`: all.

    Raises:
        ValueError: more than there are, or none.
    """
    if depth is not None and not 1 <= depth <= blocks:
        raise ValueError(f"depth is the number of blocks kept, 1 to {blocks} of this variant, or null for all; given {depth}")
    return blocks if depth is None else depth
