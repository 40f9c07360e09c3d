"""The model that a config describes: fresh, as a run begins with it, or as one that continues needs it.

Comes in: a config. Goes out: a `Recognizer`, what it took from other weights, and the epochs from which its streams are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vidfuse.config import Config, Stream
from vidfuse.models import weights
from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import Recognizer
from vidfuse.models.start import restart, start

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of `train.precision`."""


def model_of(config: Config, local: Callable[[str], str] = str) -> Recognizer:
    """The recogniser that a config describes, with fp32 weights on the current default device; `model.weights` is not read.

    Args:
        config: of the run.
        local: makes a weights source one that this machine can read, as `Worker.local`.

    Raises:
        ValueError: a component, an option or weights that do not fit, or a stream that is to be trained later and cannot be.
    """

    def stream(part: Stream | None) -> dict[str, Any] | None:
        if part is None:
            return None
        given = part.model_dump(include={"name", "frozen", "trained_blocks", "adapters", "lora", "grid"})
        return given | {"options": part.options, "weights": None if part.weights is None else local(part.weights)}

    model = build_recognizer(
        classes=config.data.classes,
        frames=config.data.frames,
        size=config.data.size,
        semantic=stream(config.model.semantic),
        motion=stream(config.model.motion),
        fusion={"name": config.model.fusion.name, "options": config.model.fusion.options},
        head_dropout=config.model.head_dropout,
        seed=config.seed,
    )
    model.check_hold(first_epochs(config))
    return model


def started(config: Config, local: Callable[[str], str] = str) -> tuple[Recognizer, dict[str, Any]]:
    """The recogniser that a run begins with, and what it took from `model.weights` for its checkpoints (`State.start`).

    Raises:
        ValueError: as `model_of`, or `model.weights` do not fit.
    """
    model, source = model_of(config, local), config.model.weights
    return model, {} if source is None else start(model, local(source)).to_json()


def continued(config: Config, begun: Mapping[str, Any], local: Callable[[str], str] = str) -> Recognizer:
    """The recogniser that a checkpoint's weights go into, with all that is not in the checkpoint.

    Args:
        config: of the run.
        begun: the checkpoint's `State.start`.
        local: as for `model_of`.

    Raises:
        ValueError: as `model_of`, or weights that the checkpoint needs cannot be had.
    """
    model = model_of(config, local)
    if config.model.weights is not None and begun.get("fixed"):
        restart(model, local(config.model.weights), begun)
    return model


def first_epochs(config: Config) -> dict[str, int]:
    """The streams that are trained from a later epoch than the first, and from which."""
    streams = {"semantic": config.model.semantic, "motion": config.model.motion}
    return {name: s.train_from_epoch for name, s in streams.items() if s is not None and s.trained and s.train_from_epoch}


def origins_of(config: Config, model: Recognizer, begun: Mapping[str, Any]) -> dict[str, str]:
    """Where the weights of each part are from, for the records."""
    streams = {"semantic": config.model.semantic, "motion": config.model.motion}
    loaded = {name: weights.loaded(module) for name, module in model.streams.items()}
    found = {
        f"weights of {name}": f"{part.weights} ({of.said}), sha256 {of.sha256}"
        for name, part in streams.items()
        if part is not None and (of := loaded.get(name)) is not None
    }
    return found | ({"weights of the model": f"{config.model.weights}, sha256 {begun['sha256']}"} if begun else {})
