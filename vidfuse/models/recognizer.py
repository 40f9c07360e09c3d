"""One or two backbones, a fusion and a head: every model here, baselines too, is this one thing.

Axes: B clips, T frames, C colour channels (3), H height, W width, N tokens, D width, K classes.
Comes in: uint8 clips. Goes out: float32 logits and, if asked, attention. Beside the module: what an engine needs to know of
it (parts and their sizes, what is trained, the frozen streams' digest) and how its activations are recomputed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, cast, overload

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from vidfuse.models import adapt, lockstep
from vidfuse.models.checks import check_share
from vidfuse.models.grid import Grid, pool
from vidfuse.models.layers import Normalize
from vidfuse.models.parts import Backbone, Fused, Fusion, Interleaved, Stepwise, Tokens
from vidfuse.models.precision import bfloat16_arithmetic

Cached = Mapping[str, Tokens]
"""Tokens by stream."""


class LinearHead(nn.Module):
    """Dropout and a linear classifier."""

    def __init__(self, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        check_share("head_dropout", dropout)
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width, classes)

    def forward(self, feature: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Logits."""
        return self.linear(self.drop(feature))


class Recognizer(nn.Module):
    """Clips to logits.

    Args:
        streams: Backbones by name, `semantic` and `motion` or one of them.
        fusion: Joins the streams' tokens.
        head: Classifies the feature.
        frozen: Streams that are not trained: no gradients, evaluation mode also under `train()`.
        grids: Cells in which a stream's tokens are averaged (see `grid.pool`).

    Frozen streams that were given adapters or LoRA are `adapted`: these parts of them are trained, and gradients pass through the
    rest. `held` streams are trained later: for now they run as frozen ones do (see `hold`).

    With an `Interleaved` fusion the streams run in step, exchanges between their blocks. Then gradients pass through frozen streams,
    to what was exchanged earlier, and their blocks are among those that recompute their activations.
    """

    def __init__(
        self,
        streams: Mapping[str, nn.Module],
        fusion: nn.Module,
        head: nn.Module,
        *,
        frozen: Collection[str] = (),
        grids: Mapping[str, Grid] | None = None,
    ) -> None:
        super().__init__()
        self.grids = dict(grids or {})
        self.streams = nn.ModuleDict(streams)
        self.normalize = nn.ModuleDict({name: _normalizer(stream) for name, stream in streams.items()})
        self.fusion = fusion
        self.head = head
        self.frozen = frozenset(frozen)
        self.held: frozenset[str] = frozenset()
        self.adapted = frozenset(name for name in self.frozen if adapt.added(streams[name]))
        self.interleaved = isinstance(fusion, Interleaved)
        self.recomputes_steps = False
        for name in self.frozen:
            self.streams[name].requires_grad_(False)
        for part in self._added(self.adapted):
            part.requires_grad_(True)
        self.train(self.training)

    @overload
    def forward(self, clips: Tensor, cached: Cached | None = None, *, return_attention: Literal[False] = False) -> Tensor: ...
    @overload
    def forward(
        self, clips: Tensor, cached: Cached | None = None, *, return_attention: Literal[True]
    ) -> tuple[Tensor, Mapping[str, Tensor]]: ...
    def forward(
        self, clips: UInt8[Tensor, "B T C H W"], cached: Cached | None = None, *, return_attention: bool = False
    ) -> Float[Tensor, "B K"] | tuple[Float[Tensor, "B K"], Mapping[str, Tensor]]:
        """Float32 logits, or with `return_attention` the pair of them and the fusion's attention by name.

        Arithmetic is that of the parameters' dtype (an engine may have cast them), or autocast's.

        Args:
            clips: What the streams see.
            cached: What `tokens` gave of these clips; the streams that are here do not run.
            return_attention: Whether attention is wanted.
        """
        with bfloat16_arithmetic(clips, self):
            streams, exchanged = self._tokens_of_all(clips, cached or {}, return_attention)
            fused: Fused = self.fusion(streams, return_attention=return_attention)
            logits = self.head(fused.feature).float()
        return (logits, {**exchanged, **fused.attention}) if return_attention else logits

    def train(self, mode: bool = True) -> Recognizer:
        """Set training mode, except for frozen and held streams; of adapted ones for what was added."""
        super().train(mode)
        for name in self.frozen | self.held:
            self.streams[name].eval()
        for part in self._added(self.adapted - self.held):
            part.train(mode)
        return self

    def check_hold(self, names: Collection[str]) -> None:
        """Refuse streams that are to wait and cannot.

        Raises:
            ValueError: streams run in step, so that gradients pass through them.
        """
        if names and self.interleaved:
            raise ValueError(
                f"{' and '.join(sorted(names))} cannot wait for a later epoch (train_from_epoch) where the fusion exchanges between "
                "blocks: gradients pass through both streams from the start; train from epoch 0, or freeze"
            )

    def hold(self, names: Collection[str]) -> None:
        """Have these streams, and no others, wait: until the next call they run without gradients, in evaluation mode.

        Raises:
            ValueError: they cannot (see `check_hold`).
        """
        self.check_hold(names)
        self.held = frozenset(names)
        self.train(self.training)

    @torch.no_grad()
    def tokens(self, name: str, clips: UInt8[Tensor, "B T C H W"]) -> Tokens:
        """What a fixed stream says of clips, for `forward`'s `cached`.

        Raises:
            ValueError: it is not fixed (see `check_cacheable`).
        """
        self.check_cacheable([name])
        with bfloat16_arithmetic(clips, self):
            return self._tokens(name, clips)

    @property
    def cacheable(self) -> tuple[str, ...]:
        """Streams whose tokens of a clip never change: frozen, nothing put into them, nothing exchanged on the way."""
        return () if self.interleaved else tuple(sorted(self.frozen - self.adapted))

    def check_cacheable(self, names: Collection[str]) -> None:
        """Refuse streams whose tokens change while the model is trained.

        Raises:
            ValueError: one is trained, or streams run in step.
        """
        changing = sorted(set(names) - set(self.cacheable))
        if changing and self.interleaved:
            raise ValueError(
                "the fusion exchanges between the streams' blocks, so that their tokens change while it is trained"
            )
        if changing:
            raise ValueError(f"tokens of the {' and '.join(changing)} stream change while it is trained; only frozen ones stay")

    def _tokens_of_all(
        self, clips: Tensor, cached: Cached, return_attention: bool
    ) -> tuple[dict[str, Tokens], Mapping[str, Tensor]]:
        """Tokens of each stream, and attention that was paid on the way."""
        if not self.interleaved:
            dtype = _dtype(self.fusion, self.head)
            given = {name: replace(tokens, values=tokens.values.to(dtype)) for name, tokens in cached.items()}
            return {name: given[name] if name in given else self._tokens(name, clips) for name in self.streams}, {}
        self.check_cacheable(cached)
        streams, exchanges = _in_step(self)
        inputs = {name: self.normalize[name](clips, _dtype(self.streams[name])) for name in streams}
        tokens, seen = lockstep.run_in_step(streams, inputs, exchanges, run=self._step, return_attention=return_attention)
        dtype = _dtype(self.fusion, self.head)
        return {name: self._pooled(name, replace(t, values=t.values.to(dtype))) for name, t in tokens.items()}, seen

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A step of streams that run in step, computed again in backward if so wished."""
        if not (self.recomputes_steps and self.training and torch.is_grad_enabled()):
            return step(*args, **kwargs)
        return checkpoint(_as_in_forward(self, step), *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    def _tokens(self, name: str, clips: Tensor) -> Tokens:
        stream = self.streams[name]
        with torch.no_grad() if name in (self.frozen - self.adapted) | self.held else nullcontext():
            tokens: Tokens = stream(self.normalize[name](clips, _dtype(stream)))
        return self._pooled(name, replace(tokens, values=tokens.values.to(_dtype(self.fusion, self.head))))

    def _pooled(self, name: str, tokens: Tokens) -> Tokens:
        try:
            return pool(tokens, self.grids[name]) if name in self.grids else tokens
        except ValueError as error:
            raise ValueError(f"{name}.grid: {error}") from None

    def _added(self, names: Collection[str]) -> list[nn.Module]:
        return [part for name in sorted(names) for part in adapt.added(self.streams[name])]


class Part(NamedTuple):
    """Parameters of a part of a recogniser."""

    name: str
    total: int
    trainable: int


def parameter_table(model: Recognizer) -> list[Part]:
    """Parameters of each stream, the fusion and the head: all, and those that are trained (whole ones under ZeRO-3)."""
    parts = {**dict(model.streams.items()), "fusion": model.fusion, "head": model.head}
    return [Part(name, _count(part.parameters()), _count(_trained(part))) for name, part in parts.items()]


def frozen_digest(model: Recognizer) -> dict[str, str]:
    """SHA-256 of what is fixed of each stream: names, shapes and float32 bytes of its state, without parameters that are trained.

    Of a stream that is not frozen it is of the fixed parameters alone (see `trained_blocks`), since its buffers may move. Of an
    adapted one it is the plain backbone's.

    Taken before an engine casts or partitions the model: casting to bfloat16 loses what the digest is to prove, so a model
    that was cast (or is on the meta device) is refused rather than hashed to something else.

    Raises:
        ValueError: a frozen weight is not float32, or has no values.
    """
    partly = {name for name, stream in model.streams.items() if not all(p.requires_grad for p in stream.parameters())}
    return {name: _digest(name, model.streams[name], buffers=name in model.frozen) for name in sorted(partly | model.frozen)}


def stream_digest(model: Recognizer, name: str) -> str:
    """SHA-256 of a whole stream, as `frozen_digest` has it of one that is frozen (and the same conditions)."""
    return _digest(name, model.streams[name], buffers=True, whole=True)


def trainable_state(model: Recognizer) -> dict[str, Tensor]:
    """What a checkpoint must hold: the state dict without the frozen streams' fixed weights.

    That is all parameters that are trained, and of streams that are not frozen also fixed parameters and buffers (running
    statistics). Tensors are the model's own; under ZeRO-3 only the names are of use.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fixed = tuple(f"streams.{name}." for name in model.frozen)
    return {name: value for name, value in model.state_dict().items() if name in trained or not name.startswith(fixed)}


def checkpoint_activations(model: Recognizer) -> int:
    """Make the blocks of trained and adapted streams and of the fusion recompute their activations in backward; returns their number.

    Modules and parameters keep their names. Non-reentrant, with the random state kept, so that losses and gradients are those
    of the plain model; only in training mode with gradients enabled. Running statistics of batch norm are updated once, in
    forward. Calling it again changes nothing.

    Of streams that run in step these are the steps, frozen streams' too: a block, or two with the exchange between their halves.
    """
    if model.interleaved:
        model.recomputes_steps = True
        return lockstep.steps(*_in_step(model))
    parts = [stream for name, stream in model.streams.items() if name not in model.frozen - model.adapted] + [model.fusion]
    blocks = [block for part in parts for block in cast(Backbone | Fusion, part).blocks]
    for block in blocks:
        if getattr(block.forward, "func", None) is not _recompute:
            block.forward = partial(_recompute, block, block.forward)
    return len(blocks)


def _in_step(model: Recognizer) -> tuple[dict[str, Stepwise], Mapping[int, nn.Module]]:
    streams = {name: cast(Stepwise, stream) for name, stream in model.streams.items()}
    return streams, cast(Interleaved, model.fusion).exchanges


def _recompute(block: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not (torch.is_grad_enabled() and any(m.training for m in block.modules())):  # of an adapted block the adapters alone are
        return forward(*args, **kwargs)
    extra: dict[str, Any] = {}
    if any(isinstance(m, _BatchNorm) for m in block.modules()):
        extra["context_fn"] = lambda: (nullcontext(), _statistics_kept(block))
    return checkpoint(_as_in_forward(block, forward), *args, use_reentrant=False, preserve_rng_state=True, **extra, **kwargs)


def _as_in_forward(block: nn.Module, forward: Any) -> Any:
    """The forward of a block in the arithmetic of the recogniser's forward, also when backward computes it again."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with bfloat16_arithmetic(torch.empty(0, device=_device(args)), block):
            return forward(*args, **kwargs)

    return run


def _device(values: Any) -> torch.device:
    """Device of the first tensor in nested values; the CPU if there is none."""
    tensors = (v for v in tree_leaves(values) if isinstance(v, Tensor))
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norm inside normalises by the batch as before and leaves its running statistics alone."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    kept = [(m.momentum, m.num_batches_tracked) for m in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _normalizer(stream: nn.Module) -> Normalize:
    backbone = cast(Backbone, stream)
    return Normalize(backbone.mean, backbone.std)


def _dtype(*parts: nn.Module) -> torch.dtype:
    """Dtype of the first floating parameter: also right where ZeRO-3 has left parameters empty."""
    return next((p.dtype for part in parts for p in part.parameters() if p.is_floating_point()), torch.float32)


def _count(parameters: Collection[nn.Parameter] | Iterator[nn.Parameter]) -> int:
    return sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def _trained(part: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in part.parameters() if p.requires_grad)


def _digest(name: str, stream: nn.Module, *, buffers: bool, whole: bool = False) -> str:
    parameters = dict(stream.named_parameters())
    trained = {n for n, p in parameters.items() if p.requires_grad and not whole}
    sharded = {n for n, p in stream.named_parameters() if hasattr(p, "ds_numel")}  # ZeRO-3 has taken their values
    digest = hashlib.sha256()
    state = stream.state_dict()
    for name_here, key in sorted((adapt.plain_name(key), key) for key in state):
        value = state[key]
        if key in trained or not (buffers or key in parameters):
            continue
        if value.is_meta or (value.is_floating_point() and value.dtype != torch.float32) or key in sharded:
            raise ValueError(
                f"digest of {name}.{key}: it is {value.dtype} on {value.device}; take it before the engine casts or shards the model"
            )
        digest.update(f"{name_here} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
