"""Config -> Ray Train -> a trained run on its storage.

Comes in: a config; Ray is initialised. Goes out: the run's figures; checkpoints and records are on `run.storage`. Giving the
same config again continues from the last checkpoint. What can be refused is refused by `preflight.check`, before a worker starts.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidfuse.config import Config, ConfigError
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.data.shards import DataError
from vidfuse.on_ray import features
from vidfuse.on_ray.featurizing import compute
from vidfuse.on_ray.monitor import Monitor
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.preflight import check_model, open_set
from vidfuse.on_ray.recovery import keep_statistics_here
from vidfuse.on_ray.room import check_buffer, ray_settings, reading, resources
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.standby import stand_by
from vidfuse.on_ray.standing import Heartbeat
from vidfuse.on_ray.stream import pull_through_ray
from vidfuse.on_ray.trainer import Trainer
from vidfuse.on_ray.waiting import Waiting
from vidfuse.on_ray.worker import LoneWorker, RayWorker
from vidfuse.train import plan
from vidfuse.train.errors import CheckpointError, ModelError, RunError
from vidfuse.train.loop import Result, run
from vidfuse.train.worker import Progress

log = logging.getLogger(__name__)
POLL_SECONDS = 0.3
"""Between two looks at the monitor."""


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
