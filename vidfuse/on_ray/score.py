"""A run's checkpoint over a split, on Ray Train workers.

Comes in: a run's URL and an `EvaluateConfig`. Goes out: a `Scored` split, each sample exactly once, with unreadable videos
marked.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
from ray.train.v2.api.exceptions import TrainingFailedError

from vidfuse.config import Config
from vidfuse.data.batch import SampleError
from vidfuse.data.feed import Feed
from vidfuse.data.flips import check_directions, mirrored_classes
from vidfuse.data.sampling import World
from vidfuse.data.shards import DataError
from vidfuse.models.recognizer import frozen_digest
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.preflight import open_set
from vidfuse.on_ray.room import ray_settings, resources
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import join, read_bytes
from vidfuse.on_ray.stream import pull_through_ray
from vidfuse.on_ray.trainer import Trainer
from vidfuse.on_ray.waiting import wait_for_room
from vidfuse.on_ray.weights import local
from vidfuse.train.checkpoint import load_weights, read_state
from vidfuse.train.errors import RunError
from vidfuse.train.model import DTYPES, continued
from vidfuse.train.validate import Scored, score


def score_run(folder: RunFolder, config: Config, checkpoint: str) -> Scored:
    """Score a checkpoint over `evaluate.split`.

    Args:
        folder: the run.
        config: the run's, with the wanted `evaluate` section.
        checkpoint: name, from `RunFolder.checkpoints`.

    Raises:
        DataError: a split without labels.
        ConfigError: mirrored views, which the classes do not allow.
        RunError: a worker failed.
    """
    split = split_of(config)
    packed = open_set(config, split)
    if (packed.indices[split].label < 0).any():
        raise DataError(f"split {split!r} of {config.data.url} has videos without a label: there is nothing to score against")
    check_directions(packed.manifest.classes, flip=config.evaluate.flip)
    parts = folder.url.rpartition("/")
    settings = {"config": config.model_dump(mode="json"), "run": folder.url, "checkpoint": checkpoint}
    room = resources(config)
    trainer = Trainer(
        _score_worker, train_loop_config=settings, **ray_settings(config, room, folder.url, join("evaluate", split))
    )
    wait_for_room(room.asked(config))
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise RunError(f"scoring {parts[2]} failed: {error}") from error
    return _read(folder, split, packed.indices[split].label.astype(np.int64))


def split_of(config: Config) -> str:
    """The split that is scored."""
    return config.evaluate.split or config.data.validation_split


def _score_worker(settings: dict[str, Any]) -> None:
    config = Config.model_validate(settings["config"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    folder, split, view = RunFolder.at(settings["run"]), split_of(config), config.evaluate
    with tempfile.TemporaryDirectory(prefix="vidfuse-weights-") as scratch:
        checkpoint = folder.weights(settings["checkpoint"], Path(scratch))
        model = continued(config, read_state(checkpoint).start, local)
        load_weights(model, checkpoint, frozen_digest(model))
    model = model.to(device, DTYPES[config.train.precision]).eval()
    micro_batch = view.micro_batch or config.train.micro_batch
    world = World(context.get_world_size(), context.get_world_rank(), context.get_world_size() * micro_batch, micro_batch)
    packed = open_set(config, split)
    board = Board("worker", run=config.run.name, rank=str(world.rank))
    feed = Feed(config, packed, world, pull_through_ray(config.data, workers=world.size, board=board))
    scored = score(
        model,
        feed.score(split, clips=view.clips, crops=view.crops, flip=bool(view.flip), micro_batch=micro_batch),
        packed.indices[split].label.astype(np.int64),
        classes=config.data.classes,
        views=view.clips * view.crops * (1 + bool(view.flip)),
        device=device,
        mirrored=mirrored_classes(packed.manifest.classes, view.flip) if view.flip else None,
        mean=view.mean,
    )
    if world.rank == 0:
        _write(folder, split, scored)


def _write(folder: RunFolder, split: str, scored: Scored) -> None:
    with tempfile.TemporaryDirectory(prefix="vidfuse-scored-") as scratch:
        np.save(Path(scratch) / "probabilities.npy", scored.probabilities)
        np.save(Path(scratch) / "unreadable.npy", scored.unreadable)
        (Path(scratch) / "unreadable.json").write_text(json.dumps([asdict(error) for error in scored.errors], indent=1))
        folder.put(Path(scratch), join("evaluate", split))


def _read(folder: RunFolder, split: str, labels: Any) -> Scored:
    import io

    def content(name: str) -> bytes:
        return read_bytes(folder.filesystem, join(folder.root, "evaluate", split, name))

    errors = tuple(SampleError(**error) for error in json.loads(content("unreadable.json")))
    probabilities = np.load(io.BytesIO(content("probabilities.npy")), allow_pickle=False)
    unreadable = np.load(io.BytesIO(content("unreadable.npy")), allow_pickle=False)
    return Scored(probabilities, labels, unreadable, errors)
