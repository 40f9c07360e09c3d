"""Searches: Optuna proposes values for a space, Ray Tune runs the trials, each a training as any other, and weak ones end early.

Comes in: a config, a space and how much may be tried. Goes out: a study and the trials' runs, below `<run.storage>/<run.name>-<space>/`:

    study.log        Optuna's journal (on a folder; of an s3:// storage it is on this machine, see `Search.journal`)
    trials/<name>/   a trial's run; its name is the hash of its values

A search that was killed goes on: finished trials are in the study, those that were under way are proposed again with the same values,
so that each continues from its own last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
import ray
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from tuning.spaces import Space, Values, settings
from tuning.trial import COST, EPOCH, FAULT, METRIC, trainable
from vidfuse import presets
from vidfuse.config import Config, ConfigError, SearchConfig, override, read_file
from vidfuse.on_ray import fit, preflight
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.room import resources
from vidfuse.on_ray.storage import StorageError, join, open_storage
from vidfuse.on_ray.waiting import wait_for_room

log = logging.getLogger(__name__)

SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
EPOCHS = "epochs"
"""Note of a trial: how many it had."""
CONTINUED = "continued"
"""Mark of a trial that was under way when its search was killed; another one goes on with its values."""


@dataclass(frozen=True)
class Search:
    """A search that is planned."""

    base: Config
    space: Space
    options: SearchConfig

    @property
    def name(self) -> str:
        """Of the study, and the folder's."""
        return f"{self.base.run.name}-{self.space.name}"

    @property
    def url(self) -> str:
        """Folder of the search."""
        return join(self.base.run.storage, self.name)

    @property
    def journal(self) -> Path:
        """The journal file: in the search's folder, or where this process runs if that is on object storage."""
        folder = Path("searches") if "://" in self.url else Path(self.url)
        return folder / ("study.log" if "://" not in self.url else f"{self.name}.log")

    @property
    def grace_epochs(self) -> int:
        """Epochs that each trial has before it may be ended."""
        train = self.base.train
        share = math.ceil(train.epochs / self.options.reduction)
        return self.options.grace_epochs or min(max(share, train.validate_every_epochs), train.epochs)

    def config(self, values: Values) -> Config:
        """A trial's config.

        Raises:
            ConfigError: values that do not go together.
        """
        own = [f"run.name={trial_name(values)}", f"run.storage={join(self.url, 'trials')}"]
        shared = [f"features.url={self.base.features.url or join(self.base.run.storage, 'features')}"]
        return override(self.base, [*settings(values), *own, *shared])


def trial_name(values: Values) -> str:
    """Name of a trial's run."""
    return f"trial-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]}"


def check(search: Search) -> None:
    """Refuse, before any trial, what cannot be searched.

    Raises:
        ConfigError, DataError, StorageError, CheckpointError: one clear message.
    """
    train, grace = search.base.train, search.grace_epochs
    least = min(train.validate_every_epochs, train.epochs)  # the last epoch is always validated
    if not least <= grace <= train.epochs:
        raise ConfigError(
            f"--grace-epochs: {grace}; from train.validate_every_epochs = {least} to train.epochs = {train.epochs} are possible: "
            "trials are judged by validation"
        )
    preflight.check(search.base)
    firsts(search)
    study_of(search)


def room(search: Search) -> int:
    """Trials that run at a time; Ray is initialised.

    Raises:
        ConfigError: more are asked for than fit, or none does.
    """
    one = resources(search.base)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    per_worker = (
        search.base.cluster.cpus_per_worker + search.base.data.cpus_per_task
    )  # a worker that nobody reads for waits for ever
    rooms = [int(node.get("CPU", 0) / per_worker + 1e-9) for node in nodes]
    if one.gpu:
        rooms = [min(int(node.get("GPU", 0)), cpus) for node, cpus in zip(nodes, rooms, strict=True)]
    fits = sum(rooms) // one.most
    asked = search.options.together
    if asked is not None and asked > fits:
        raise ConfigError(
            f"--together: {asked} trials of {one.most} workers do not fit at a time, {fits} do; lower it, cluster.workers or "
            "cluster.cpus_per_worker, or add nodes"
        )
    return asked or max(fits, 1)


def study_of(search: Search) -> optuna.Study:
    """The study, made if it is not there.

    Raises:
        ConfigError: it is another space's, or of other aims.
        StorageError: its storage cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    directions: list[Literal["minimize", "maximize"]] = ["maximize", "minimize"] if search.options.pareto else ["maximize"]
    wanted = {"space": search.space.to_json(), "config": search.base.digest()}
    try:
        storage, sampler = _storage(search), SAMPLERS[search.options.sampler](search.base.seed)
        found = optuna.create_study(
            storage=storage, sampler=sampler, study_name=search.name, directions=directions, load_if_exists=True
        )
    except OSError as error:
        raise StorageError(f"{search.journal}: the study cannot be written: {error.strerror}") from None
    except Exception as error:
        raise StorageError(
            f"--study {search.options.study}: the study cannot be written: {str(error).splitlines()[0]}"
        ) from None
    known = found.user_attrs.get("vidfuse")
    if known is None:
        found.set_user_attr("vidfuse", wanted)
    elif known != wanted:
        what = "space" if known["space"] != wanted["space"] else "base config"
        raise ConfigError(
            f"the study {search.name!r} was begun with another {what}; give the same, or another --set run.name=..."
        )
    if [d.name.lower() for d in found.directions] != directions:
        raise ConfigError(
            f"the study {search.name!r} was begun {'without' if search.options.pareto else 'with'} --pareto; give another run.name"
        )
    return found


def _storage(search: Search) -> Any:
    if search.options.study is not None:
        return RDBStorage(search.options.study)
    search.journal.parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(str(search.journal)))


def run(search: Search, *, facts: Mapping[str, str], on_told: Callable[[str], None]) -> optuna.Study:
    """Run the trials that are left; Ray is initialised.

    Args:
        search: checked.
        facts: about the search, for its runs' records.
        on_told: is given a line on each trial that ends.

    Raises:
        ConfigError: no room.
        DataError: cached features are stale.
    """
    at_once = room(search)
    study = study_of(search)
    begin(search, study)
    resume(study)
    left = search.options.trials - len(ended(study))
    if left <= 0:
        return study
    fit.features_of(search.base, lambda event: on_told(f"features  {event['features']}"))  # once for all
    searcher = _Searcher(
        space=search.space.suggest,
        metric=[METRIC, COST] if search.options.pareto else METRIC,
        mode=["max", "min"] if search.options.pareto else "max",
        sampler=SAMPLERS[search.options.sampler](search.base.seed),
        study_name=search.name,
        storage=_storage(search),
    )
    open_storage(search.url, write=True)
    filesystem, root = open_storage(search.url)
    board = Board("search", search=search.name)
    tuner = tune.Tuner(
        trainable(search.base, search.config, {**facts, "search": search.name}),
        tune_config=tune.TuneConfig(
            search_alg=searcher, scheduler=_scheduler(search), num_samples=left, max_concurrent_trials=at_once, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=root, storage_filesystem=filesystem, verbose=0,
            callbacks=[_Tell(on_told), _Watched(board, search, study)],
            failure_config=tune.FailureConfig(max_failures=search.base.cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # a run keeps its own
        ),
    )  # fmt: skip
    wait_for_room(resources(search.base).asked(search.base), search.name)
    with contextlib.closing(board):
        tuner.fit()
        board.put()
    return study_of(search)


def _scheduler(search: Search) -> TrialScheduler:
    epochs = search.base.train.epochs
    if search.options.stopping == "asha":
        return ASHAScheduler(
            time_attr=EPOCH, metric=METRIC, mode="max", max_t=epochs + 1, grace_period=search.grace_epochs,
            reduction_factor=search.options.reduction,
        )  # fmt: skip
    if search.options.stopping == "median":
        return MedianStoppingRule(time_attr=EPOCH, metric=METRIC, mode="max", grace_period=search.grace_epochs)
    return FIFOScheduler()


def firsts(search: Search) -> list[Values]:
    """Values to be tried first, each once: the base's own, and those of `SearchConfig.first`.

    Raises:
        ConfigError: there is no such preset or file.
    """
    names = [name.strip() for name in search.options.first.split(",") if name.strip()]
    others = [read_file(name) if name.endswith((".yaml", ".yml")) else presets.get(name) for name in names]
    found = [search.space.within(config) for config in (search.base, *others)]
    return [values for place, values in enumerate(found) if values and values not in found[:place]]


def begin(search: Search, study: optuna.Study) -> None:
    """Have a fresh study propose the first values first."""
    if not study.get_trials(deepcopy=False):
        for values in firsts(search):
            study.enqueue_trial(values)


def resume(study: optuna.Study) -> int:
    """Propose again the trials that were under way when the search was killed; how many."""
    cut_off = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in cut_off:
        study.enqueue_trial(trial.params, skip_if_exists=False)
        study._storage.set_trial_user_attr(trial._trial_id, CONTINUED, True)
        study.tell(trial.number, state=TrialState.FAIL)
    return len(cut_off)


def ended(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count: finished, early or not, or failed by themselves."""
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
    return [trial for trial in study.get_trials(deepcopy=False, states=states) if CONTINUED not in trial.user_attrs]


class _Searcher(OptunaSearch):
    """Ray's, which also notes how far each trial came."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Noted by epoch: Ray counts results, from 1 again after a trial was restarted."""
        super().on_trial_result(trial_id, {**result, "training_iteration": result[EPOCH]})

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result and trial_id in self._ot_trials:
            self._ot_trials[trial_id].set_user_attr(EPOCHS, result.get(EPOCH, 0))
            if FAULT in result:
                self._ot_trials[trial_id].set_user_attr(FAULT, result[FAULT])
        failed = error or (result is not None and FAULT in result)
        super().on_trial_complete(trial_id, None if failed else result, failed)


class _Tell(tune.Callback):
    """A line on each trial that ends."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        at = f"top1 {result[METRIC]:.4f} after {result[EPOCH]} epochs"
        self._tell(trial, f"failed: {result[FAULT]}" if FAULT in result else at)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._tell(trial, "failed")

    def _tell(self, trial: Any, how: str) -> None:
        self._told(f"{trial_name(trial.config)}  {how}  {' '.join(settings(trial.config))}")


class _Watched(tune.Callback):
    """Tells those who watch how far the search is."""

    def __init__(self, board: Board, search: Search, study: optuna.Study) -> None:
        before = ended(study)
        values = [trial.values[0] for trial in before if trial.values]
        self._board, self._best = board, max(values, default=None)
        self._counts = {"running": 0, "finished": len(values), "failed": len(before) - len(values)}
        board.set("search_planned_trials", search.options.trials)
        self._tell()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._count(trials)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        if METRIC in result and FAULT not in result:
            self._best = max(result[METRIC], self._best or 0.0)
        self._count(trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        failed = FAULT in (trial.last_result or {})
        self._counts["failed" if failed else "finished"] += 1
        self._count(trials)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._counts["failed"] += 1
        self._count(trials)

    def _count(self, trials: list[Any]) -> None:
        self._counts["running"] = sum(trial.status == "RUNNING" for trial in trials)
        self._tell()

    def _tell(self) -> None:
        for state, count in self._counts.items():
            self._board.set("search_trials", count, state=state)
        if self._best is not None:
            self._board.set("search_best_top1_ratio", self._best)
