"""A recogniser that starts from the weights which another run exported.

Comes in: a recogniser and a checkpoint's `model.safetensors`. Goes out: the recogniser with all that the file holds, and a `Start`
for the new run's own checkpoints. What the other run had frozen is not in its file: it is what this run's own settings make it, and
its hash, which the file has in its header, is compared. A head of another number of classes is made anew; all else is strict.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidfuse.models import weights
from vidfuse.models.recognizer import Recognizer, frozen_digest, stream_digest

log = logging.getLogger(__name__)

HEAD = ("head.linear.weight", "head.linear.bias")


@dataclass(frozen=True)
class Start:
    """What a run took from another run's weights."""

    sha256: str | None
    """Of the file. `None`: not computed (a dry run)."""
    fixed: tuple[str, ...]
    """Streams that have weights of the file which are not trained, and so are not in the new run's checkpoints."""

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint's state holds of it."""
        return asdict(self)


def header(model: Recognizer, frozen: Mapping[str, str]) -> dict[str, str]:
    """What the header of an exported file says of the frozen streams, which are not in it: their hashes (`frozen_digest`)."""
    return {"format": "pt", "frozen": json.dumps({name: frozen[name] for name in sorted(model.frozen)})}


def start(model: Recognizer, source: str | Path) -> Start:
    """Put the weights that another run exported into a recogniser; on the meta device all but the values is checked.

    Args:
        model: What the weights are for, before an engine casts or shards it.
        source: Local file of a checkpoint, `model.safetensors`; `FILE#sha256=HEX` also states its hash.

    Raises:
        ValueError: no such file, another hash, names and shapes of another model, or frozen streams with other weights than
            those that the file was trained with.
    """
    path, stated = _path(source)
    dry = any(value.is_meta for value in model.state_dict().values())
    state, sha256 = weights.read(path, sha256=stated, hashed=not dry)
    frozen = _frozen(path)
    state = _fitting_head(model, state, path)
    absent = _absent(model, state, frozen)
    own = model.state_dict()
    weights.check(model, {**state, **{key: own[key] for key in absent}}, said=str(path))
    if not dry:
        _check_frozen(model, state, frozen, path)
        model.load_state_dict(state, strict=False)
    return Start(sha256, _fixed(model, state))


def restart(model: Recognizer, source: str | Path, begun: Mapping[str, Any]) -> None:
    """Put back, into a recogniser that a checkpoint will be loaded into, what the checkpoint does not hold of the file.

    Args:
        model: As it was before `start`.
        source: The file, wherever it is now.
        begun: The checkpoint's `Start`, as JSON.

    Raises:
        ValueError: no such file, or another one.
    """
    prefixes = tuple(f"streams.{name}." for name in begun.get("fixed", ()))
    if prefixes:
        path, _ = _path(source)
        state, _ = weights.read(path, sha256=begun["sha256"])
        model.load_state_dict({key: value for key, value in state.items() if key.startswith(prefixes)}, strict=False)


def _path(source: str | Path) -> tuple[Path, str | None]:
    file, stated = weights.resolve(source)
    if not isinstance(file, Path) or file.suffix != ".safetensors":
        raise ValueError(f"model.weights: {source}: give the model.safetensors of a run's checkpoint")
    return file, stated


def _frozen(path: Path) -> dict[str, str]:
    """Hashes in the file's header; those of a file of an older run are not known."""
    try:
        with safe_open(path, framework="pt") as file:
            found: dict[str, str] = json.loads((file.metadata() or {}).get("frozen", "{}"))
            return found
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"weights file {path} cannot be read: {error}") from error


def _fitting_head(model: Recognizer, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state with the model's own head where the file's is of another number of classes."""
    own = model.state_dict()
    if not all(key in state and key in own and state[key].shape[1:] == own[key].shape[1:] for key in HEAD):
        return state
    theirs, ours = (len(each[HEAD[0]]) for each in (state, own))
    if theirs == ours:
        return state
    log.warning("%s: its head is of %d classes, this model has %d: the head is made anew", path, theirs, ours)
    return {**state, **{key: own[key] for key in HEAD}}


def _absent(model: Recognizer, state: Mapping[str, Tensor], frozen: Collection[str]) -> list[str]:
    """Names that may be missing from the file: those of streams that were frozen when it was written."""
    held = {name for name in model.streams if any(key.startswith(f"streams.{name}.") for key in state)}
    free = tuple(f"streams.{name}." for name in model.streams if name not in held or name in frozen)
    absent = [key for key in model.state_dict() if key not in state and key.startswith(free)] if free else []
    for prefix in free:
        if any(key.startswith(prefix) for key in absent):
            log.info(
                "the %s stream was frozen in the other run: its weights are those of its own setting", prefix.split(".")[1]
            )
    return absent


def _check_frozen(model: Recognizer, state: Mapping[str, Tensor], frozen: Mapping[str, str], path: Path) -> None:
    own = frozen_digest(model)
    for name in (n for n in frozen if n in model.streams):
        if name not in model.frozen and any(key.startswith(f"streams.{name}.") for key in state):
            continue  # trained parts were added to a frozen stream there, and here all of it is trained: no hash is of the same
        found = own[name] if name in model.frozen else stream_digest(model, name)
        if found != frozen[name]:
            raise ValueError(
                f"{path} was trained with other weights of the frozen {name} stream (sha256 {frozen[name][:12]}, here "
                f"{found[:12]}): give model.{name}.weights as the other run had them (and, where they were random, its seed)"
            )


def _fixed(model: Recognizer, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    def partly(name: str) -> bool:
        return name in model.frozen or not all(p.requires_grad for p in model.streams[name].parameters())

    return tuple(name for name in model.streams if partly(name) and any(key.startswith(f"streams.{name}.") for key in state))
