"""A recogniser out of names and options.

Comes in: plain keyword arguments. Goes out: a `Recognizer` whose weights are a function of them alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from vidfuse.models import adapt, select, weights
from vidfuse.models.parts import Backbone, Fusion
from vidfuse.models.recognizer import LinearHead, Recognizer


def build_recognizer(
    *,
    classes: int,
    frames: int,
    size: int,
    semantic: Mapping[str, Any] | None = None,
    motion: Mapping[str, Any] | None = None,
    fusion: Mapping[str, Any],
    head_dropout: float = 0.0,
    seed: int = 0,
) -> Recognizer:
    """Build a recogniser; the same arguments give the same weights, whatever was built or drawn before.

    Each part draws from its own generator, seeded by `seed` and the part's name, so that exchanging the fusion leaves the
    backbones as they are. Build on the CPU (or under `torch.device("meta")` for a dry run, which checks weight files and
    fetches nothing), then move.

    Args:
        classes: K.
        frames: T of a clip.
        size: Height and width of a clip, in pixels.
        semantic: `{"name", "frozen", "trained_blocks", "weights", "options", "adapters", "lora", "grid"}` of the image stream; `weights`
            is `None` (random), `"pretrained"`, a file or a published one (see `weights.load`); of `trained_blocks`, if given, see `_fix`, of
            `adapters` and `lora` `adapt.extend`. `None`: no such stream.
        motion: The same of the video stream.
        fusion: `{"name", "options"}`.
        head_dropout: Dropout before the classifier.
        seed: Source of random weights.

    Raises:
        ValueError: no stream, an unknown component, an option it refuses, weights that do not fit, too many blocks, adapters or
            LoRA in what is no vision transformer or is trained itself.
    """
    wanted = {name: spec for name, spec in (("semantic", semantic), ("motion", motion)) if spec is not None}
    if not wanted:
        raise ValueError("a recogniser has a semantic stream, a motion stream or both; both are None")
    streams = {name: _stream(name, spec, frames=frames, size=size, seed=seed) for name, spec in wanted.items()}
    for name, spec in wanted.items():
        _choose_trained(name, streams[name], spec, seed=seed)
    widths = {name: cast(Backbone, stream).width for name, stream in streams.items()}
    options = dict(fusion.get("options") or {})
    select.check_options("fusion", fusion["name"], options)
    with _seeded(seed, "fusion"):
        fused = select.build("fusion", fusion["name"], widths=widths, streams=streams, **options)
    with _seeded(seed, "head"):
        head = LinearHead(cast(Fusion, fused).width, classes, head_dropout)
    frozen = [name for name, spec in wanted.items() if spec.get("frozen", True)]
    grids = {name: tuple(spec["grid"]) for name, spec in wanted.items() if spec.get("grid") is not None}
    return Recognizer(streams, fused, head, frozen=frozen, grids=grids)


def _stream(part: str, spec: Mapping[str, Any], *, frames: int, size: int, seed: int) -> nn.Module:
    name, source, options = spec["name"], spec.get("weights"), dict(spec.get("options") or {})
    select.check_options("backbones", name, options)
    pretrained = source == "pretrained"
    with _seeded(seed, part):
        stream = select.build("backbones", name, frames=frames, size=size, pretrained=pretrained, **options)
    weights.load(stream, None if pretrained else source)
    return stream


def _choose_trained(name: str, stream: nn.Module, spec: Mapping[str, Any], *, seed: int) -> None:
    """Have of a stream trained what its spec says: some blocks, or what is put into it. Recognizer itself fixes frozen ones.

    Raises:
        ValueError: it has fewer blocks, adapters or LoRA do not go with it, or stochastic depth would never act.
    """
    frozen, last = spec.get("frozen", True), spec.get("trained_blocks")
    added = {kind: dict(spec[kind]) for kind in ("adapters", "lora") if spec.get(kind) is not None}
    blocks = cast(Backbone, stream).blocks
    if last is not None and last > len(blocks):
        raise ValueError(f"the {name} stream has {len(blocks)} blocks; trained_blocks {last} is too many")
    if frozen and (spec.get("options") or {}).get("stochastic_depth"):
        raise ValueError(
            f"stochastic_depth acts on a stream that is trained itself, and the {name} stream is frozen: leave it out"
        )
    if added and not frozen:
        raise ValueError(f"{' and '.join(added)} is for a frozen stream, and the {name} stream is trained itself")
    if added:
        with _seeded(seed, f"{name}/added"):
            adapt.extend(stream, spec["name"], last=last, **added)
    elif not frozen and last is not None:
        _fix(stream, last)


def _fix(stream: nn.Module, trained_blocks: int) -> None:
    """Leave the last `trained_blocks` blocks of a stream trainable and nothing else of it."""
    blocks = cast(Backbone, stream).blocks
    wanted = {id(p) for block in blocks[-trained_blocks:] for p in block.parameters() if p.requires_grad}
    for parameter in stream.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


@contextmanager
def _seeded(seed: int, part: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:7], "big"))
        yield
