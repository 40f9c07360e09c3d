"""The interfaces a recogniser is put together from.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width of a token, K classes.
Comes in: clips. Goes out: `Tokens` of a backbone, a feature of a fusion, logits of a head. An implementation is an
`nn.Module` that has these members; nothing inherits from here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@runtime_checkable
class Fusion(Protocol):
    """Streams of tokens to one feature."""

    width: int
    """D of the feature."""
    blocks: Sequence[nn.Module]
    """Units of activation checkpointing; may be empty."""

    def __call__(self, streams: Mapping[str, Tokens], *, return_attention: bool = False) -> Fused: ...


@runtime_checkable
class Head(Protocol):
    """A feature to logits."""

    def __call__(self, feature: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]: ...
