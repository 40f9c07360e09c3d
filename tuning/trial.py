"""A trial: a training whose validations Ray Tune hears, and that it may end early.

Comes in: values of a space. Goes out: a result after each validation, the last one marked as done. With one worker the process of the
trial trains by itself and then takes the next trial: nothing is imported twice. Several workers are Ray Train's, in a placement group of
their own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ray import tune

from tuning.spaces import Values
from vidfuse.config import Config, ConfigError
from vidfuse.data.shards import DataError
from vidfuse.on_ray import fit, preflight
from vidfuse.on_ray.room import resources
from vidfuse.train.errors import CheckpointError, EndedError, ModelError, RunError

METRIC = "top1"
"""Validation top-1, the best so far of a trial."""
COST = "trainable"
"""Parameters that are trained."""
EPOCH = "epoch"
FAULT = "fault"
"""Why a trial has no figure, and another try would not have one."""
_ALMOST_NOTHING = {"CPU": 0, "memory": 1}
"""What Tune reserves for the process of a trial that does not train itself: a byte."""
_LASTING = (ConfigError, DataError, CheckpointError, ModelError, RunError)
"""Faults that another try does not mend."""


def trainable(base: Config, config_of: Callable[[Values], Config], facts: Mapping[str, str]) -> Any:
    """What Tune runs, with what it needs; Ray is initialised.

    Args:
        base: config that trials change.
        config_of: a trial's config.
        facts: for the records of runs.
    """
    room = resources(base)
    own = {"CPU": base.cluster.cpus_per_worker, **({"GPU": 1} if room.gpu else {})}
    alone = room.most == 1
    given = tune.with_parameters(Trial, config_of=config_of, facts=dict(facts), alone=alone)
    return tune.with_resources(given, own if alone else _ALMOST_NOTHING)


class Trial(tune.Trainable):
    """A training in a thread, and its validations, one a step."""

    _reported: dict[str, Any]

    def setup(self, config: Values, config_of: Any = None, facts: Any = None, alone: bool = True) -> None:
        """Begin the first trial of this process."""
        self._config_of, self._facts, self._alone = config_of, facts, alone
        self._threads = ThreadPoolExecutor(1, "vidfuse-trial")
        self._begin(config)

    def reset_config(self, new_config: Values) -> bool:
        """Begin another one."""
        self._end()
        self._begin(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next validation."""
        event = self._heard.get()
        if event is None:  # no validation was due any more: one that had finished before, or ends for want of gain
            return self._last()
        self._reported = {METRIC: event["best_top1"], COST: self._trained, EPOCH: event[EPOCH], "name": self._run.run.name}
        return self._reported if event[EPOCH] < self._run.train.epochs else self._last()

    def cleanup(self) -> None:
        """End the training."""
        self._end()
        self._threads.shutdown()

    def _begin(self, values: Values) -> None:
        self._heard: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._stop, self._trained = threading.Event(), 0
        self._reported = {}
        self._training: Future[dict[str, Any]] = self._threads.submit(self._train, values, self._heard, self._stop)

    def _train(
        self, values: Values, heard: queue.SimpleQueue[Mapping[str, Any] | None], stop: threading.Event
    ) -> dict[str, Any]:
        def hear(event: Mapping[str, Any]) -> None:
            if METRIC in event:
                heard.put(event)
            if stop.is_set() and self._alone:  # its last validation's checkpoint is there
                raise EndedError

        try:
            self._run = self._config_of(values)
            self._trained = sum(p.numel() for p in preflight.check_model(self._run).parameters() if p.requires_grad)
            fitting = fit.fit_alone if self._alone else fit.fit
            return fitting(self._run, facts=self._facts, on_progress=hear, stop=stop)
        finally:
            heard.put(None)

    def _last(self) -> dict[str, Any]:
        """Wait for the training's end; its last result."""
        try:
            done = self._training.result()
        except _LASTING as error:
            return {METRIC: 0.0, EPOCH: 0, **self._reported, FAULT: str(error), "done": True}
        return {METRIC: done["best_top1"], COST: self._trained, EPOCH: done["epochs"], "name": self._run.run.name, "done": True}

    def _end(self) -> None:
        """Have the training end, and wait for it; what it raises concerns nobody any more."""
        self._stop.set()
        self._training.exception()
