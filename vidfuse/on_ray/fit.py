"""Config -> Ray Train -> a trained run on its storage.

Comes in: a config; Ray is initialised. Goes out: the run's figures; checkpoints and records are on `run.storage`. Giving the
same config again continues from the last checkpoint. What can be refused is refused by `check`, before a worker starts.
"""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidfuse.config import Config, ConfigError, DataConfig
from vidfuse.data.draws import Draws, Values, balanced, read_values
from vidfuse.data.feed import Feed, PackedSet
from vidfuse.data.flips import check_directions
from vidfuse.data.sampling import World
from vidfuse.data.shards import DataError, SplitIndex, check_classes, read_index, read_manifest
from vidfuse.models import weights
from vidfuse.models.recognizer import Recognizer
from vidfuse.on_ray import features
from vidfuse.on_ray.featurizing import compute
from vidfuse.on_ray.monitor import Monitor
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.recovery import keep_statistics_here
from vidfuse.on_ray.room import check_buffer, ray_settings, reading, resources
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.standby import stand_by
from vidfuse.on_ray.standing import Heartbeat
from vidfuse.on_ray.storage import StorageError, check_storage, is_file, open_storage, read_bytes
from vidfuse.on_ray.stream import pull_through_ray
from vidfuse.on_ray.trainer import Trainer
from vidfuse.on_ray.waiting import Waiting
from vidfuse.on_ray.weights import local
from vidfuse.on_ray.worker import LoneWorker, RayWorker
from vidfuse.train import plan, tracking
from vidfuse.train.checkpoint import STATE, State, check_matches
from vidfuse.train.errors import CheckpointError, ModelError, RunError
from vidfuse.train.loop import Result, run
from vidfuse.train.model import continued, started
from vidfuse.train.worker import Progress

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3
"""Between two looks at the monitor."""


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


def fit(config: Config, *, facts: Mapping[str, str], on_progress: Progress, stop: threading.Event) -> dict[str, Any]:
    """Train.

    Args:
        config: of the run; `check` has passed.
        facts: about the run, for its records.
        on_progress: is given progress events, a few a second.
        stop: set it to have the run end with a checkpoint.

    Returns:
        What result.json holds.

    Raises:
        ConfigError: the cluster has no room.
        RunError: the run ended by a fault that restarts did not mend.
    """
    done = finished(config)
    if done is not None:
        return done
    room = resources(config)
    places = features_of(config, on_progress)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # it outlives other nodes
    monitor = Monitor.options(scheduling_strategy=here).remote(config.run.name)  # type: ignore[attr-defined]
    told = {**facts, **_named(places)}
    settings = {"config": config.model_dump(mode="json"), "facts": told, "monitor": monitor, "features": places}
    settings["operations"] = operations(config, gpu=room.gpu)
    keep_statistics_here()
    trainer = Trainer(
        _train_worker,
        train_loop_config=settings,
        reading_cpus=config.data.cpus_per_task,
        monitor=monitor,
        **ray_settings(config, room, config.run.storage, config.run.name),
    )
    log.info("%s: %s", config.run.name, room)
    limited = reading(config, room.most, ray.cluster_resources())
    if limited is not None:
        log.info("%s: %s", config.run.name, limited)
    board = Board("driver", run=config.run.name)
    board.set("world_size_wanted", room.most)
    waiting = Waiting(room.asked(config), lambda line: log.warning("%s %s", config.run.name, line))
    with contextlib.closing(board), _beating(config, on_progress) as hear, _following(monitor, hear, stop, board, waiting):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise RunError(_reason(monitor, error)) from error
    fault = ray.get(monitor.fault.remote())
    if fault is not None:
        raise RunError(fault)
    return RunFolder.of(config.run).json("result.json") or {}


def fit_alone(
    config: Config, *, facts: Mapping[str, str], on_progress: Progress, stop: threading.Event | None = None
) -> dict[str, Any]:
    """Train with one worker, this process: no other is started, and what it has imported serves the next run, too.

    The same training as that of `fit` with one worker; who asks sees to it that it is tried again if this process dies. What the
    arguments are, see `fit`; an exception of `on_progress` ends the run where it is, less what came after the last checkpoint.

    Raises:
        ConfigError: the stream has no room.
        DataError, CheckpointError, ModelError, RunError: faults that another try does not mend.
    """
    done = finished(config)
    if done is not None:
        return done
    check_buffer(config, 1)
    places = features_of(config, on_progress)
    of_clip = operations(config, gpu=bool(ray.get_gpu_ids()))
    with _beating(config, on_progress) as hear:
        asked = stop or threading.Event()
        worker = LoneWorker(config.run, hear, asked, precision=config.train.precision, operations=of_clip)
        _train(config, worker, {**facts, **_named(places)}, places)
    return RunFolder.of(config.run).json("result.json") or {}


def operations(config: Config, *, gpu: bool) -> float | None:
    """Of one clip in training, as the share of GPUs' peak is told from them; `None`: there is none to tell."""
    if not gpu or config.data.features != "off":  # cached features save some of them
        return None
    return plan.training_operations(config, check_model(config))


def _named(places: features.Places) -> dict[str, str]:
    """The caches in use, for a run's records."""
    return {f"features of {stream}, {split}": url for split, some in places.items() for stream, url in some.items()}


def features_of(config: Config, on_progress: Progress) -> features.Places:
    """The caches that a run uses; those that are missing are made first, if the config has it so. Ray is running.

    Raises:
        DataError: one is stale.
        StorageError: its place cannot be used.
    """
    if config.data.features == "off":
        return {}
    packed = open_set(config)

    def make(missing: Sequence[features.Cache]) -> None:
        compute(config, packed, check_model(config), missing, lambda done: on_progress({"features": done.line()}))

    return features.provide(config, packed, make)


def finished(config: Config) -> dict[str, Any] | None:
    """The figures of a run that has already done what the config asks for; `None`: there is something to do."""
    result = RunFolder.of(config.run).json("result.json")
    done = result is not None and result["state"] != "stopped" and result["epochs"] >= config.train.epochs
    early = result is not None and result["state"] == "stopped_early"
    return result if done or early else None


def _train_worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    config = Config.model_validate(settings["config"])
    worker = RayWorker(config.run, settings["monitor"], operations=settings["operations"])
    stand_by()
    try:
        _train(config, worker, settings["facts"], settings["features"])
    except (DataError, ConfigError) as error:  # the same on every rank, and no restart mends it: end the run in order
        ray.get(settings["monitor"].fault.remote(str(error)))
    except (CheckpointError, ModelError) as error:
        ray.get(settings["monitor"].fault.remote(str(error)))
        raise


def _train(config: Config, worker: LoneWorker | RayWorker, facts: Mapping[str, str], places: features.Places) -> Result:
    """One rank's part of a run."""
    train = config.train
    with tempfile.TemporaryDirectory(prefix="vidfuse-run-") as folder:
        records = Path(folder)
        if worker.rank == 0:
            RunFolder.of(config.run).records(records)
        feed = Feed(
            config,
            replace(open_set(config), features=features.opened(places)),
            World(worker.world_size, worker.rank, train.global_batch, train.micro_batch),
            pull_through_ray(config.data, workers=worker.world_size, board=worker.board),
        )
        return run(config, worker, feed, folder=records, facts=facts)


@contextlib.contextmanager
def _beating(config: Config, on_progress: Progress) -> Iterator[Progress]:
    """What hears of progress, and keeps the run's heartbeat by it."""
    heartbeat = Heartbeat(config.run)

    def hear(event: Mapping[str, Any]) -> None:
        heartbeat(event)
        on_progress(event)

    try:
        yield hear
    finally:
        heartbeat.close()


@contextlib.contextmanager
def _following(monitor: Any, on_progress: Progress, stop: threading.Event, board: Board, waiting: Waiting) -> Iterator[None]:
    """Carry events from the monitor to `on_progress`, figures to `board` and whether it waits to `waiting`, and the wish to stop back."""
    done = threading.Event()
    seen: dict[str, Any] = {"event": None, "warnings": 0, "judged": 0, "asked": False}

    def look() -> None:
        if stop.is_set() and not seen["asked"]:
            seen["asked"] = True
            ray.get(monitor.stop.remote(), timeout=5)
        asked = [monitor.latest.remote(), monitor.warnings.remote(), monitor.judged.remote(seen["judged"])]
        event, warnings, judged, figures, placing = ray.get(
            [*asked, monitor.figures.remote(), monitor.placing.remote()], timeout=5
        )
        for name, value in figures.items():
            board.set(name, value)
        for warning in warnings[seen["warnings"] :]:
            log.error("%s", warning)
        seen["warnings"], seen["judged"] = len(warnings), seen["judged"] + len(judged)
        for validation in judged:  # each of them, however short the epochs are
            on_progress(validation)
        if event and event != seen["event"] and "top1" not in event:
            on_progress(event)
        seen["event"] = event
        waiting.look(placing)

    def follow() -> None:
        while not done.wait(POLL_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                look()
        with contextlib.suppress(ray.exceptions.RayError):
            look()  # what came since the last look

    thread = threading.Thread(target=follow, name="vidfuse-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _reason(monitor: Any, error: TrainingFailedError) -> str:
    with contextlib.suppress(ray.exceptions.RayError):
        fault = ray.get(monitor.fault.remote(), timeout=5)
        if fault:
            return str(fault)
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, RunError):  # in words for people already
        return str(failure)
    causes: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"worker {rank}: {fault}" for rank, fault in causes.items()) or str(error)
