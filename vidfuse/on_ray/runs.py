"""A run's folder on its storage: records, checkpoints, which is the last and which the best.

Comes in: `RunConfig`, or a run's URL. Goes out: its config, its checkpoints' names, local copies of what is needed of them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from vidfuse.config import Config, ConfigError, RunConfig, from_mapping
from vidfuse.data.shards import DataError
from vidfuse.on_ray.storage import check_storage, exists, join, list_files, open_storage, read_bytes, write_bytes
from vidfuse.train.checkpoint import STATE, WEIGHTS, State, read_state
from vidfuse.train.journal import JOURNAL
from vidfuse.train.record import METRICS
from vidfuse.train.worker import CHECKPOINTS


@dataclass(frozen=True)
class RunFolder:
    """A run on its storage."""

    filesystem: Any
    root: str
    """Path of the run on the file system."""
    url: str
    """For people."""

    @classmethod
    def of(cls, run: RunConfig) -> RunFolder:
        """The folder of a run that is to be written."""
        filesystem, root = open_storage(run.storage, write=True)
        return cls(filesystem, join(root, run.name), join(run.storage, run.name))

    @classmethod
    def at(cls, url: str) -> RunFolder:
        """The folder of a run that exists.

        Raises:
            StorageError: the storage cannot be read.
            DataError: it holds no run.
        """
        check_storage(url)
        filesystem, root = open_storage(url)
        folder = cls(filesystem, root, url.rstrip("/"))
        if not exists(filesystem, join(root, "config.yaml")):
            raise DataError(f"{url} holds no run (it has no config.yaml): give the folder of a run, its run.storage/run.name")
        return folder

    def config(self) -> Config:
        """The config that the run saved."""
        from omegaconf import OmegaConf

        content = read_bytes(self.filesystem, join(self.root, "config.yaml")).decode()
        tree = OmegaConf.to_container(OmegaConf.create(content))
        if not isinstance(tree, dict):
            raise ConfigError(f"{self.url}/config.yaml is no config")
        return from_mapping(tree, source=f"{self.url}/config.yaml")  # type: ignore[arg-type]

    def checkpoints(self) -> dict[str, Any]:
        """`{"last", "best", "scores"}`, empty for a fresh run."""
        path = join(self.root, CHECKPOINTS)
        if not exists(self.filesystem, path):
            return {"last": None, "best": None, "scores": {}}
        record: dict[str, Any] = json.loads(read_bytes(self.filesystem, path))
        return record

    def note(self, checkpoints: Mapping[str, Any]) -> None:
        """Write the record of checkpoints."""
        write_bytes(self.filesystem, join(self.root, CHECKPOINTS), json.dumps(checkpoints, indent=1).encode())

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; `None` if it is not there."""
        path = join(self.root, name)
        return json.loads(read_bytes(self.filesystem, path)) if exists(self.filesystem, path) else None

    def keep(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the run."""
        write_bytes(self.filesystem, join(self.root, name), json.dumps(content).encode())

    def kept(self, folder: str) -> list[str]:
        """Names of the files in a folder of the run, sorted."""
        return list(list_files(self.filesystem, join(self.root, folder)))

    def journal(self) -> list[dict[str, Any]]:
        """What the run's tries wrote down, in order."""
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda name: self.json(join(JOURNAL, name)) or {}, self.kept(JOURNAL)))

    def records(self, to: Path) -> None:
        """Fetch the metrics of the run so far, for a run that continues."""
        path = join(self.root, METRICS)
        if exists(self.filesystem, path):
            to.mkdir(parents=True, exist_ok=True)
            (to / METRICS).write_bytes(read_bytes(self.filesystem, path))

    def fetch(self, checkpoint: str, names: Iterable[str], to: Path) -> Path:
        """Fetch files of a checkpoint into a folder."""
        folder = to / checkpoint
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_bytes(read_bytes(self.filesystem, join(self.root, checkpoint, name)))
        return folder

    def weights(self, checkpoint: str, to: Path) -> Path:
        """Fetch what scoring needs of a checkpoint: its state and its weights."""
        return self.fetch(checkpoint, (STATE, WEIGHTS), to)

    def state(self, checkpoint: str) -> State:
        """The state of a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            return read_state(self.fetch(checkpoint, (STATE,), Path(folder)))

    def put(self, folder: Path, below: str = "") -> None:
        """Copy a local folder's files into the run's folder (or one below it)."""
        target = join(self.root, below) if below else self.root
        self.filesystem.create_dir(target, recursive=True)
        pyarrow.fs.copy_files(
            str(folder), target, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=self.filesystem
        )
