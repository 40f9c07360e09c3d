"""The interfaces a recogniser is put together from.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width of a token, K classes.
Comes in: clips. Goes out: `Tokens` of a backbone, a feature of a fusion, logits of a head. An implementation is an
`nn.Module` that has these members; nothing inherits from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """What a backbone says of a clip."""

    values: Float[Tensor, "B N D"]
    positions: Float[Tensor, "N 3"]
    """Centre of each token in the clip as (time, height, width), each 0..1. A class token of a frame is at its centre.
    On the CPU, whatever device the values are on: they are the same for every clip."""
    mask: Bool[Tensor, "B N"] | None = None
    """True where a token is real; `None`: all are."""


@dataclass(frozen=True)
class Fused:
    """What a fusion makes of its streams."""

    feature: Float[Tensor, "B D"]
    attention: Mapping[str, Float[Tensor, "B heads Q K"]]
    """Attention weights by name (`layer0.semantic_to_motion`: semantic queries look at motion keys); empty unless asked for."""


@runtime_checkable
class Backbone(Protocol):
    """Normalised clips to tokens."""

    width: int
    """D of its tokens."""
    mean: tuple[float, float, float]
    """Mean of each channel of its input, for values 0..1."""
    std: tuple[float, float, float]
    """Standard deviation of each channel of its input, for values 0..1."""
    blocks: Sequence[nn.Module]
    """Its stages in order: the units of activation checkpointing (and, later, of unfreezing and of layer-wise exchange)."""

    def __call__(self, clip: Float[Tensor, "B T C H W"]) -> Tokens: ...


@dataclass(frozen=True)
class Branches:
    """The residual branches of a transformer's block, as modules that it calls."""

    attentions: Mapping[str, nn.Module]
    """By name what gives an attention's part of the tokens: a tensor, or a tuple that begins with it."""
    mlp: tuple[nn.Module, ...]
    """The feed-forward part: the module that does it, or the first, which is given the normed tokens, and the last of two."""


@runtime_checkable
class VisionTransformer(Protocol):
    """A backbone of equal blocks at one width, which may be given adapters or LoRA."""

    width: int
    blocks: Sequence[nn.Module]
    branches: Sequence[Branches]
    """Of each block."""


@dataclass(frozen=True)
class Underway:
    """Clips on their way through a backbone's blocks, as these take them."""

    values: Float[Tensor, "R n D"]
    """Rows of tokens: a row is a clip, or a frame where blocks look at frames one by one."""
    grid: tuple[int, int, int]
    """Of a clip's patches (time, height, width); they lie row after row, time slowest."""
    rows: int = 1
    """Rows of a clip."""
    prefix: int = 0
    """Tokens of a row before its patches: class token, registers."""
    keywords: Mapping[str, Tensor] = field(default_factory=dict)
    """What each block is called with beside the values."""


@runtime_checkable
class Stepwise(Protocol):
    """A backbone whose blocks can be run one by one, which is what an exchange between blocks needs.

    Each block adds attention's part to its tokens, then that of its feed-forward part. `begin` and `end` are for the modules in
    them what the backbone's own call is: those that own parameters are called.
    """

    blocks: Sequence[nn.Module]
    halfway: Sequence[nn.Module]
    """Of each block the module whose first output in a call is what attention adds: a tensor, or a tuple that begins with it."""
    patches_count: bool
    """Whether `end` gives patches; if not, what is added to patches alone in the last block is lost."""

    def begin(self, clip: Float[Tensor, "B T C H W"]) -> Underway: ...

    def end(self, underway: Underway) -> Tokens: ...


@runtime_checkable
class Fusion(Protocol):
    """Streams of tokens to one feature."""

    width: int
    """D of the feature."""
    blocks: Sequence[nn.Module]
    """Units of activation checkpointing; may be empty."""

    def __call__(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused: ...


@runtime_checkable
class Interleaved(Protocol):
    """A fusion that exchanges between the blocks of two `Stepwise` streams before it joins their tokens.

    Whoever runs the streams calls the exchanges (see `lockstep`), and the fusion with the tokens that come out.
    """

    exchanges: Mapping[int, nn.Module]
    """By the number, from 1, of the pair of blocks that they are in; each is an `exchange.BottleneckExchange`, or like one."""


@runtime_checkable
class Head(Protocol):
    """A feature to logits."""

    def __call__(self, feature: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]: ...
