"""A run's folder on its storage: records, checkpoints, which is the last and which the best.

Comes in: `RunConfig`, or a run's URL. Goes out: its config, its checkpoints' names, local copies of what is needed of them.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs

from vidfuse.config import Config, ConfigError, RunConfig, from_mapping
from vidfuse.data.shards import DataError
from vidfuse.on_ray.storage import check_storage, exists, join, list_files, open_storage, read_bytes, write_bytes
from vidfuse.train.checkpoint import STATE, WEIGHTS, State, read_state
from vidfuse.train.errors import Damage, DamageError
from vidfuse.train.journal import JOURNAL
from vidfuse.train.record import METRICS
from vidfuse.train.shelf import Shelf, newest_good
from vidfuse.train.tracking import KEPT

SCORED = (STATE, WEIGHTS)
"""What scoring needs of a checkpoint."""

log = logging.getLogger(__name__)


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

    @property
    def shelf(self) -> Shelf:
        """Its checkpoints."""
        return Shelf(self.filesystem, self.root)

    def checkpoints(self) -> dict[str, Any]:
        """`{"last", "best", "scores"}`, empty for a fresh run."""
        return self.shelf.record()

    def choose(self, which: str, only: Collection[str] = SCORED) -> tuple[str | None, tuple[Damage, ...]]:
        """The newest (`last`) or the highest scored (`best`) checkpoint of those whose files `only` are good.

        Returns:
            Its name, `None` if the run has none yet; and those that would have come before it, but are damaged.

        Raises:
            CheckpointError: there are checkpoints and none is good.
        """
        record, names = self.shelf.record(), self.shelf.names()[::-1]
        if which == "best":
            scores = record["scores"]
            names = sorted((name for name in names if name in scores), key=lambda name: scores[name], reverse=True)

        def attempt(name: str) -> Damage | None:
            try:
                self.shelf.verify(name, only)
            except DamageError as error:
                return error.damage
            return None

        chosen, damaged = newest_good(names, attempt, ever_whole=record[which] is not None)
        for damage in damaged:
            log.error("%s; %s is used instead", damage, chosen)
        return chosen, damaged

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
        """Fetch what a run that continues adds to: its metrics so far, and which MLflow run it is."""
        for name in (METRICS, KEPT):
            path = join(self.root, name)
            if exists(self.filesystem, path):
                to.mkdir(parents=True, exist_ok=True)
                (to / name).write_bytes(read_bytes(self.filesystem, path))

    def weights(self, checkpoint: str, to: Path) -> Path:
        """Fetch what scoring needs of a checkpoint: its state and its weights, verified.

        Raises:
            DamageError: they are not what was written.
        """
        return self.shelf.fetch(checkpoint, to, SCORED)

    def state(self, checkpoint: str) -> State:
        """The state of a checkpoint, verified.

        Raises:
            DamageError: it is not what was written.
        """
        with tempfile.TemporaryDirectory() as folder:
            return read_state(self.shelf.fetch(checkpoint, Path(folder), (STATE,)))

    def put(self, folder: Path, below: str = "") -> None:
        """Copy a local folder's files into the run's folder (or one below it)."""
        target = join(self.root, below) if below else self.root
        self.filesystem.create_dir(target, recursive=True)
        pyarrow.fs.copy_files(
            str(folder), target, source_filesystem=pyarrow.fs.LocalFileSystem(), destination_filesystem=self.filesystem
        )
