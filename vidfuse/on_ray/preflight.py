"""What a config needs is looked at before long work: its packed set, storage, model and weights, and a run of the same name.

Comes in: a config; Ray is not needed. Goes out: the opened packed set, the model on the meta device, or one clear error.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from vidfuse.config import Config, ConfigError, DataConfig
from vidfuse.data.draws import Draws, Values, balanced, read_values
from vidfuse.data.feed import PackedSet
from vidfuse.data.flips import check_directions
from vidfuse.data.shards import DataError, SplitIndex, check_classes, read_index, read_manifest
from vidfuse.models import weights
from vidfuse.models.recognizer import Recognizer
from vidfuse.on_ray import features
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import StorageError, check_storage, is_file, open_storage, read_bytes
from vidfuse.on_ray.weights import local
from vidfuse.train import tracking
from vidfuse.train.checkpoint import STATE, State, check_matches
from vidfuse.train.model import continued, started


def open_set(config: Config, *splits: str) -> PackedSet:
    """Open the packed set of a config.

    Args:
        config: `data.url`, `data.classes`.
        splits: to be used; default: those for training and validation.

    Raises:
        StorageError: the storage cannot be read.
        DataError: no packed set, another number of classes, no such split.
        ConfigError: no `data.url`.
    """
    data = config.data
    if data.url is None:
        raise ConfigError("data.url: a packed set is needed (folder or s3:// URL); python -m jobs.pack SOURCE URL makes one")
    check_storage(data.url)
    filesystem, root = open_storage(data.url)
    manifest = read_manifest(filesystem, root)
    check_classes(manifest, data.classes)
    wanted = splits or (data.train_split, data.validation_split)
    indices = {s: read_index(filesystem, root, s, manifest=manifest) for s in wanted}
    train = indices.get(data.train_split)
    return PackedSet(filesystem, root, manifest, indices, Draws() if train is None else _draws(data, train))


def _draws(data: DataConfig, index: SplitIndex) -> Draws:
    """How often the samples of the training split are used.

    Raises:
        StorageError: a file cannot be read.
        DataError: it is not of this split, or uses a sample too often.
    """

    def values(field: str, url: str, least: float) -> Values:
        filesystem, path = open_storage(url)
        if not is_file(filesystem, path):
            raise DataError(f"{field}: there is no file {url}")
        return read_values(read_bytes(filesystem, path), index, f"{field}: {url}", least=least)

    weights = difficulty = None
    if data.weighting is not None:
        balance = data.weighting == "balanced"
        weights = balanced(index.label) if balance else values("data.weighting", data.weighting, 0.0)
    if data.curriculum is not None:
        difficulty = values("data.curriculum.difficulty", data.curriculum.difficulty, -math.inf)
    return Draws(weights, difficulty, data.curriculum).check(len(index))


def check(config: Config) -> PackedSet:
    """Refuse, before long work, what cannot train: storage, packed set, model, weights, MLflow, or another run of the same name.

    Returns:
        The opened packed set.

    Raises:
        ConfigError, DataError, StorageError, CheckpointError: one clear message.
    """
    packed = open_set(config)
    _check_labels(config.data, packed)
    check_directions(packed.manifest.classes, reverse=config.data.augment.temporal.reverse > 0, train_flip=config.data.flip)
    check_storage(config.run.storage, write=True)
    tracking.check(config.tracking)
    _check_frame_cache(config.data)
    folder = RunFolder.of(config.run)
    last, _ = folder.choose("last", (STATE,))
    state = None if last is None else folder.state(last)
    model = check_model(config, state)
    check_reachable(model)
    if config.data.features != "off":
        features.check(config, model)
    if state is not None:
        check_matches(state, config, manifest=packed.manifest, frozen=state.frozen, draws=packed.draws.digest)
    return packed


def _check_labels(data: DataConfig, packed: PackedSet) -> None:
    """Refuse splits whose videos have no labels: there is nothing to learn or to score from."""
    for field, split in (("train_split", data.train_split), ("validation_split", data.validation_split)):
        index = packed.indices[split]
        bare = np.flatnonzero(index.label < 0)
        if len(bare):
            raise DataError(
                f"data.{field}: {len(bare)} of the {len(index)} videos of {split!r} have no label, the first is {index.key[bare[0]]!r}; "
                "take a split of which all have one"
            )


def _check_frame_cache(data: DataConfig) -> None:
    """Of this machine; another one that has no such place decodes, with a warning."""
    clip = data.frames * data.size**2 * 3
    if data.frame_cache is None:
        return
    if data.frame_cache_bytes <= clip:
        raise ConfigError(
            f"data.frame_cache_bytes: {data.frame_cache_bytes:,} do not hold one clip of {clip:,} bytes; raise it"
        )
    try:
        check_storage(data.frame_cache, write=True)
    except StorageError as error:
        raise ConfigError(f"data.frame_cache: {error}") from None


def check_model(config: Config, state: State | None = None) -> Recognizer:
    """The model on the meta device: options, weights files and the parameter budget are checked, nothing is allocated.

    Weights on storage are fetched for it; published ones that are not on this machine are not (`check_reachable`).

    Args:
        config: of the run.
        state: of the checkpoint that it continues from. `None`: it is fresh, and `model.weights` are checked, too.

    Raises:
        ConfigError: it cannot be built, nothing is trainable, or too much is.
    """
    try:
        with torch.device("meta"):
            model = started(config, local)[0] if state is None else continued(config, state.start, local)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    if model.grids:
        features.check_grids(config, model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    limit = config.model.max_trainable_parameters
    if not trainable:
        raise ConfigError("model: nothing is trainable; unfreeze a stream or take a fusion with parameters")
    if limit is not None and trainable > limit:
        raise ConfigError(f"model.max_trainable_parameters: {trainable:,} parameters are trainable, {limit:,} are allowed")
    return model


def check_reachable(model: Recognizer) -> None:
    """Ask for published weights that are not on this machine, before workers start that would fetch them.

    Raises:
        ConfigError: the hub does not answer, or does not give them.
    """
    for name, stream in model.streams.items():
        found = weights.loaded(stream)
        if found is not None and found.missing is not None:
            try:
                found.missing.ask()
            except ValueError as error:
                raise ConfigError(f"model.{name}.weights: {error}") from None
