"""Pretrained weights: locate, verify, rename, load strictly.

Comes in: a module and a source (a local file, or a published one: see `hubs`). Goes out: the module with every one of its weights
replaced, or a ValueError that lists what did not fit. Nothing in a file is executed: safetensors, or `torch.load(weights_only=True)`.
Storage URLs are made local files before they come here (`on_ray.weights`).
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import torch
from einops import repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vidfuse.models.hubs import Published, named, sha256_of
from vidfuse.models.hubs import from_hub as from_hub
from vidfuse.models.hubs import from_url as from_url

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "model_state")
"""Keys under which training scripts nest the weights in a `.pth`."""
ENDINGS = (".safetensors", ".pt", ".pth", ".pyth", ".bin")
"""Of files that are read; `.bin` is what older repositories of the Hugging Face hub hold, and `torch.load` reads it."""
SHOWN = 4
"""Names listed of each kind of fault."""


@dataclass(frozen=True)
class Loaded:
    """Where a module's weights are from."""

    said: str
    """The file, in words."""
    sha256: str | None
    """Its hash. `None`: not computed (a dry run)."""
    missing: Published | None = None
    """What a dry run found not to be on this machine, so that nothing of it is checked yet."""


def load(
    module: nn.Module,
    source: str | Path | Published | None,
    *,
    sha256: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Replace all weights of `module` by those of a file.

    A module that has `published_state(state) -> state` gets to translate the names its publisher uses; one that has a text
    `licence` has it logged. On the meta device nothing is fetched or copied, and everything is checked of a file that is here.

    Args:
        module: What the weights are for.
        source: `.safetensors`, `.pt`, `.pth`, `.pyth` or `.bin` file, or the name of a published one (`hubs.named`);
            `...#sha256=HEX` also states its hash. `None`: nothing is done.
        sha256: Hash that the file must have, as hexadecimal text.
        rename: Prefixes of names in the file and what to put in their place (`{"module.": ""}` strips one).

    Raises:
        ValueError: no such file, unreadable, another hash, names and shapes of another architecture, or it cannot be fetched.
    """
    if source is None:
        return
    tell(module)
    file, stated = resolve(source)
    dry = any(value.is_meta for value in module.state_dict().values())
    path = file if isinstance(file, Path) else file.here() if dry else file.fetch()
    said = str(file) if isinstance(file, Path) else file.said
    if path is None:
        note(module, Loaded(said, None, cast(Published, file)))
        return
    state, digest = read(path, sha256=sha256 or stated, hashed=not dry)
    state = _counted(module, _translated(module, _renamed(state, rename or {}), path))
    check(module, state, said=str(path))
    if not dry:
        module.load_state_dict(state)
    note(module, Loaded(said, digest))


def split(source: str) -> tuple[str, str | None]:
    """A source without its `#sha256=...`, and the hash that it states.

    Raises:
        ValueError: what is stated is no sha256.
    """
    place, separator, stated = source.partition("#sha256=")
    if separator and not re.fullmatch("[0-9a-fA-F]{64}", stated):
        raise ValueError(f"weights {place}: a sha256 has 64 hexadecimal digits, given {stated!r}")
    return place, stated.lower() or None


def resolve(source: str | Path | Published) -> tuple[Path | Published, str | None]:
    """The file that a source names, and the hash that it states.

    Raises:
        ValueError: no source (see `hubs.named`).
    """
    if not isinstance(source, str | Path):
        return source, None
    place, stated = split(str(source))
    local = urlsplit(place).path if place.startswith("file://") else place
    return named(place, sha256=stated) or Path(local).expanduser(), stated


def note(module: nn.Module, loaded: Loaded) -> None:
    """Have a module say where its weights are from."""
    module.loaded_weights = loaded  # type: ignore[assignment]


def loaded(module: nn.Module) -> Loaded | None:
    """Where a module's weights are from; `None`: they are random."""
    found = getattr(module, "loaded_weights", None)
    return found if isinstance(found, Loaded) else None


def check(module: nn.Module, state: Mapping[str, Tensor], *, said: str) -> None:
    """Hold a state against a module: the same names and shapes on both sides.

    Args:
        module: What the state is for.
        state: Weights by name.
        said: What to call the state in an error.

    Raises:
        ValueError: counts and first names of what is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    faults = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, needed {tuple(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {kind}: {_few(keys)}" for kind, keys in faults.items() if keys)
        raise ValueError(
            f"weights {said} look like another architecture than {type(module).__name__} "
            f"({len(own)} tensors): {listed}. Give the file of this backbone and variant"
        )


def tell(module: nn.Module) -> None:
    """Log what the user of a module's published weights must know of their licence."""
    licence = getattr(module, "licence", None)
    if licence:
        log.warning("%s", licence)


def read(path: Path, *, sha256: str | None = None, hashed: bool = False) -> tuple[dict[str, Tensor], str | None]:
    """Tensors of a file by name, on the CPU, and the file's hash if it is stated or `hashed`.

    Raises:
        ValueError: no such file, another hash, or it cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist; give a {', '.join(ENDINGS)} file, `pretrained` or null")
    if path.suffix not in ENDINGS:
        raise ValueError(f"weights file {path} ends in {path.suffix!r}; {', '.join(ENDINGS)} are read")
    digest = sha256_of(path) if sha256 or hashed else None
    if sha256 and digest != sha256.lower():
        raise ValueError(f"weights file {path} has sha256 {digest}, stated is {sha256}; it is another file or damaged")
    try:
        return (load_file(path) if path.suffix == ".safetensors" else _unwrapped(path)), digest
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"weights file {path} cannot be read: {reason[0]}") from error


def _unwrapped(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    while isinstance(content, dict) and (key := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)):
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"weights file {path} holds no mapping of names to tensors")
    return cast(dict[str, Tensor], dict(content))


def inflated(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A 2-D network's state, under the names of `module`, with filters in time wherever `module` has them.

    A filter answers a still clip as it answers a picture: it is repeated in time and divided by its length. Carreira and Zisserman
    2017 (arXiv:1705.07750), section 2.1.
    """
    own = module.state_dict()

    def fitted(key: str, value: Tensor) -> Tensor:
        if value.ndim != 4 or key not in own or own[key].ndim != 5:
            return value
        time = own[key].shape[2]
        return repeat(value / time, "O I h w -> O I t h w", t=time)

    return {key: fitted(key, value) for key, value in state.items()}


def _renamed(state: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    def new(key: str) -> str:
        old = max((p for p in rename if key.startswith(p)), key=len, default=None)
        return key if old is None else rename[old] + key[len(old) :]

    return {new(key): value for key, value in state.items()}


def _counted(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the module's own counts of batches if it has none: before PyTorch 0.4.1 batch norm did not count them."""
    counts = {key: value for key, value in module.state_dict().items() if key.endswith(".num_batches_tracked")}
    return state if any(key in state for key in counts) else {**state, **counts}


def _translated(module: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    translate = getattr(module, "published_state", None)
    if translate is None:
        return state
    try:
        return translate(state)
    except (KeyError, RuntimeError, IndexError, AttributeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"weights {path} look like another architecture than {type(module).__name__}: {type(error).__name__} {error}"
        ) from error


def _few(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (" ..." if len(keys) > SHOWN else "")
