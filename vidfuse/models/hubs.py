"""Published weights: what a name means, where its file is on this machine, and words for when it cannot be had.

Comes in: `hf:OWNER/REPOSITORY[@REVISION][/FILE]`, `timm:MODEL[.TAG]`, `torchvision:ENUM.NAME` or an `https://` address. Goes out:
a `Published` file, which is looked for in its hub's own cache (so that files that are there already, or were put there by hand,
need no network) and fetched once a machine. Nothing here waits for minutes: where there is no answer within `ANSWER_SECONDS` it
says so. `HF_HUB_OFFLINE=1` keeps all of it off the network.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

log = logging.getLogger(__name__)

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names that a repository of the Hugging Face hub gives its weights, the preferred first."""
ANSWER_SECONDS = 10.0
"""How long a server may take to answer, and then to send the next bytes."""
HASHED_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
"""How torchvision writes the beginning of a file's sha256 into its name."""


@runtime_checkable
class Published(Protocol):
    """A file that a hub publishes."""

    @property
    def said(self) -> str:
        """The file and its address, in words."""
        ...

    def here(self) -> Path | None:
        """The file if it is on this machine; the network is not asked."""
        ...

    def ask(self) -> None:
        """Ask the hub for the file, without fetching it.

        Raises:
            ValueError: it cannot be fetched; one message that says what to do.
        """
        ...

    def fetch(self) -> Path:
        """The file, fetched if it is not here.

        Raises:
            ValueError: it cannot be fetched; one message that says what to do.
        """
        ...


@dataclass(frozen=True)
class HubFile:
    """The first of some files that a repository of the Hugging Face hub has."""

    repository: str
    files: tuple[str, ...] = HUB_FILES
    revision: str | None = None
    """Branch, tag or commit. `None`: the hub's default."""

    @property
    def said(self) -> str:
        at = f"/tree/{self.revision}" if self.revision else ""
        return f"{self.files[0]} of https://huggingface.co/{self.repository}{at}"

    def here(self) -> Path | None:
        import huggingface_hub as hub

        found = (hub.try_to_load_from_cache(self.repository, name, revision=self.revision) for name in self.files)
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def ask(self) -> None:
        with fetching(self.repository, file=self.said, address=f"https://huggingface.co/{self.repository}"):
            self._there()

    def fetch(self) -> Path:
        import huggingface_hub as hub

        found = self.here()
        if found is not None:
            return found
        with fetching(self.repository, file=self.said, address=f"https://huggingface.co/{self.repository}"):
            return Path(hub.hf_hub_download(self.repository, self._there(), revision=self.revision))

    def _there(self) -> str:
        """The file that the repository has. Asked without retries: the client would repeat a failing request for 25 seconds."""
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError

        for name in self.files[:-1]:
            with suppress(EntryNotFoundError):
                hub.get_hf_file_metadata(hub.hf_hub_url(self.repository, name, revision=self.revision))
                return name
        hub.get_hf_file_metadata(hub.hf_hub_url(self.repository, self.files[-1], revision=self.revision))
        return self.files[-1]


@dataclass(frozen=True)
class WebFile:
    """A file at an `https://` address."""

    url: str
    what: str
    """Name of the weights, for people."""
    digest: str | None = None
    """The file's sha256 or its beginning. `None`: not known."""
    shared: bool = True
    """Whether it is kept where `torch.hub` keeps files, by name alone; otherwise its address decides about its place, too."""

    @property
    def said(self) -> str:
        return self.url

    def here(self) -> Path | None:
        return self._place() if self._place().is_file() else None

    def ask(self) -> None:
        with fetching(self.what, file=self.url), _answer(self.url):
            pass

    def fetch(self) -> Path:
        place = self._place()
        with fetching(self.what, file=self.url), locked(place):
            if not place.is_file():
                self._download(place)
        return place

    def _download(self, place: Path) -> None:
        part = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
        try:
            with _answer(self.url) as answer, part.open("xb") as file:
                log.info("fetching %s to %s", self.url, place)
                shutil.copyfileobj(answer, file, 2**20)
                stated, written = answer.headers.get("Content-Length"), file.tell()
            if stated is not None and written != int(stated):
                raise OSError(f"the connection ended after {written:,} of {int(stated):,} bytes")
            if self.digest and not (found := sha256_of(part)).startswith(self.digest.lower()):
                raise ValueError(f"what came has sha256 {found}, stated is {self.digest}")
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)

    def _place(self) -> Path:
        name = Path(urlsplit(self.url).path).name
        if self.shared:
            return _torch_hub() / "checkpoints" / name
        return cache_folder() / "web" / hashlib.sha256(f"{self.url} {self.digest}".encode()).hexdigest()[:16] / name


def from_hub(repository: str, *files: str, revision: str | None = None) -> HubFile:
    """The first of `files` (`HUB_FILES` if none are given) that a repository of the Hugging Face hub has."""
    return HubFile(repository, files or HUB_FILES, revision)


def from_url(url: str, what: str, *, hashed: bool = False) -> WebFile:
    """A file that a backbone's publisher has on the web.

    Args:
        url: Its address.
        what: Name of the weights, for people.
        hashed: Whether its name holds the beginning of its sha256, as torchvision's do; it is then verified.
    """
    match = HASHED_NAME.search(url) if hashed else None
    return WebFile(url, what, match[1] if match else None)


def named(name: str, *, sha256: str | None = None) -> Published | None:
    """What a source names that is no file of this machine; `None`: a path.

    Args:
        name: `hf:`, `timm:`, `torchvision:` and a name, or an address.
        sha256: Hash that the file must have, if it is stated.

    Raises:
        ValueError: no such name, an incomplete one, or an address that is not read here.
    """
    kind, separator, rest = name.partition(":")
    if separator and kind in HUBS:
        return HUBS[kind](rest)
    if "://" not in name or kind == "file":
        return None
    if kind not in ("https", "http"):
        raise ValueError(
            f"weights {name}: {kind}:// is not read here. Training and scoring jobs fetch s3://; everywhere there are: a local path, "
            f"https://, {', '.join(f'{hub}:NAME' for hub in HUBS)}"
        )
    parts = urlsplit(name)
    if "@" in parts.netloc or not Path(parts.path).suffix:
        raise ValueError(
            f"weights {kind}://{parts.netloc.rpartition('@')[2]}{parts.path}: give an address of a file, without a user in it"
        )
    if kind == "http" and sha256 is None:
        raise ValueError(
            f"weights {name}: what http:// brings can be altered on its way; give https://, or add #sha256=<64 hex digits>"
        )
    return WebFile(name, Path(parts.path).name, sha256, shared=False)


def _hugging_face(name: str) -> HubFile:
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+))?", name)
    if match is None:
        raise ValueError(
            f"weights hf:{name}: give hf:OWNER/REPOSITORY, hf:OWNER/REPOSITORY/FILE or hf:OWNER/REPOSITORY@REVISION/FILE"
        )
    return from_hub(match[1], *((match[3],) if match[3] else ()), revision=match[2])


def _timm(name: str) -> Published:
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"weights timm:{name}: {error}; timm.list_pretrained() lists the names") from None
    if found is not None and found.hf_hub_id:
        repository, _, revision = str(found.hf_hub_id).partition("@")
        files = (str(found.hf_hub_filename),) if found.hf_hub_filename else ()
        return from_hub(repository if repository != "timm/" else f"timm/{name}", *files, revision=revision or None)
    if found is None or not isinstance(found.url, str) or not found.url:
        raise ValueError(f"weights timm:{name}: timm publishes none of this name; timm.list_pretrained() lists them")
    return from_url(found.url, f"timm:{name}", hashed=True)


def _torchvision(name: str) -> WebFile:
    from torchvision.models import get_weight

    try:
        return from_url(str(get_weight(name).url), f"torchvision:{name}", hashed=True)
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"weights torchvision:{name}: {error}; a name looks like R3D_18_Weights.KINETICS400_V1") from None


HUBS: Mapping[str, Callable[[str], Published]] = {"hf": _hugging_face, "timm": _timm, "torchvision": _torchvision}
"""What may stand before a name."""


@contextmanager
def fetching(what: str, *, file: str, address: str | None = None) -> Iterator[None]:
    """Turn whatever a hub's client raises inside into one ValueError that says what to do.

    Args:
        what: Name of the weights.
        file: Where a person finds the file to download by hand.
        address: Page on which a person may ask for access, if the hub has such pages.

    Raises:
        ValueError: anything was raised inside; the cause is chained.
    """
    try:
        yield
    except Exception as error:  # clients of hubs raise OSError, HTTPError, RuntimeError and their own; all mean "not fetched"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        gated = address is not None and type(error).__name__ == "GatedRepoError"
        advice = (
            f"They are gated: accept their licence at {address}, then run `hf auth login` or set HF_TOKEN. " if gated else ""
        )
        raise ValueError(
            f"published weights of {what} cannot be fetched ({reason}). {advice}Where there is no network, put the file "
            f"{file} on this machine and give weights=<its path>; weights=null starts from random ones"
        ) from error


@contextmanager
def locked(place: Path) -> Iterator[None]:
    """Keep other processes of this machine from making a file at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_name(f".{place.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Where files are kept that no hub's client keeps; below `TORCH_HOME`, as torch has it."""
    return _torch_hub() / "vidfuse"


def sha256_of(path: Path) -> str:
    """Hash of a file's content, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _torch_hub() -> Path:
    import torch

    return Path(torch.hub.get_dir())


def _answer(url: str) -> Any:
    """The server's answer, to be read. The seconds are those that any single wait may take."""
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise OSError("HF_HUB_OFFLINE is set")
    return urlopen(Request(url, headers={"User-Agent": "vidfuse"}), timeout=ANSWER_SECONDS)
