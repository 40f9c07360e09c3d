"""Pretrained weights: locate, verify, rename, load strictly.

Comes in: a module and a source (a local file). Goes out: the module with every one of its weights replaced, or a ValueError
that lists what did not fit. Nothing in a file is executed: safetensors, or `torch.load(weights_only=True)`. Storage URLs are
made local files before they come here; published weights come from a hub (`from_hub`) or by their library inside `fetching`.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "model_state")
"""Keys under which training scripts nest the weights in a `.pth`."""
ENDINGS = (".safetensors", ".pt", ".pth", ".pyth", ".bin")
"""Of files that are read; `.bin` is what older repositories of the Hugging Face hub hold, and `torch.load` reads it."""
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that a repository of the hub gives its weights, the preferred first."""
SHOWN = 4
"""Names listed of each kind of fault."""


def load(
    module: nn.Module,
    source: str | Path | None,
    *,
    sha256: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Replace all weights of `module` by those of a file.

    A module that has `published_state(state) -> state` gets to translate the names its publisher uses; one that has a text
    `licence` has it logged. On the meta device everything is checked and nothing is copied.

    Args:
        module: What the weights are for.
        source: `.safetensors`, `.pt`, `.pth`, `.pyth` or `.bin` file; `FILE#sha256=HEX` also states its hash. `None`: nothing is done.
        sha256: Hash that the file must have, as hexadecimal text.
        rename: Prefixes of names in the file and what to put in their place (`{"module.": ""}` strips one).

    Raises:
        ValueError: no such file, unreadable, another hash, or names and shapes of another architecture.
    """
    if source is None:
        return
    name, _, stated = str(source).partition("#sha256=")
    path = Path(name)
    state = _renamed(_read(path, sha256 or stated or None), rename or {})
    state = _translated(module, state, path)
    check(module, state, said=str(path))
    if not any(value.is_meta for value in module.state_dict().values()):
        module.load_state_dict(state)
    tell(module)


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


def from_hub(repository: str, *files: str) -> Path:
    """Local copy of the first of `files` (`HUB_FILES` if none are given) that a repository of the Hugging Face hub has.

    One that is in the client's cache needs no network.

    The client by itself repeats a failing request for 25 seconds. Here an answer is asked for once before it is left to that,
    so that a machine without network is told at once.

    Raises:
        ValueError: the file cannot be fetched.
    """
    import huggingface_hub as hub
    from huggingface_hub.errors import EntryNotFoundError

    names = files or HUB_FILES
    with fetching(repository, file=f"{names[0]} of https://huggingface.co/{repository}"):
        for name in names:
            cached = hub.try_to_load_from_cache(repository, name)
            if isinstance(cached, str):
                return Path(cached)
        for name in names[:-1]:
            with suppress(EntryNotFoundError):
                hub.get_hf_file_metadata(hub.hf_hub_url(repository, name))
                return Path(hub.hf_hub_download(repository, name))
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, names[-1]))
        return Path(hub.hf_hub_download(repository, names[-1]))


@contextmanager
def fetching(what: str, *, file: str) -> Iterator[None]:
    """Turn whatever a hub's client raises inside into one ValueError that says what to do.

    Args:
        what: Name of the weights.
        file: Where a person finds the file to download by hand.

    Raises:
        ValueError: anything was raised inside; the cause is chained.
    """
    try:
        yield
    except Exception as error:  # clients of hubs raise OSError, HTTPError, RuntimeError and their own; all mean "not fetched"
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"published weights of {what} cannot be fetched ({reason[0][:200]}). Where there is no network, put the file "
            f"{file} on this machine and give weights=<its path>; weights=null starts from random ones"
        ) from error


def _read(path: Path, sha256: str | None) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"weights file {path} does not exist; give a {', '.join(ENDINGS)} file, `pretrained` or null")
    if path.suffix not in ENDINGS:
        raise ValueError(f"weights file {path} ends in {path.suffix!r}; {', '.join(ENDINGS)} are read")
    if sha256 and (found := _sha256(path)) != sha256.lower():
        raise ValueError(f"weights file {path} has sha256 {found}, stated is {sha256}; it is another file or damaged")
    try:
        return load_file(path) if path.suffix == ".safetensors" else _unwrapped(path)
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _renamed(state: Mapping[str, Tensor], rename: Mapping[str, str]) -> dict[str, Tensor]:
    def new(key: str) -> str:
        old = max((p for p in rename if key.startswith(p)), key=len, default=None)
        return key if old is None else rename[old] + key[len(old) :]

    return {new(key): value for key, value in state.items()}


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
