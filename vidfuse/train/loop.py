"""The main path: restore, step, report, save, validate, stop.

Comes in: a config, a `Worker` and a `Feed`. Goes out: checkpoints, records and a `Result`. It runs under Ray Train, under
torchrun and in a notebook; how a step is made is in `step.py`, how a model is wrapped in `engine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidfuse.config import Config
from vidfuse.data.feed import Feed
from vidfuse.train.ahead import ahead
from vidfuse.train.run import Run
from vidfuse.train.step import train_step
from vidfuse.train.worker import Worker


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    state: str
    """`finished`, `stopped_early` (no gain) or `stopped` (asked to; the same command continues)."""
    values: Mapping[str, Any]
    """What result.json holds."""


def run(config: Config, worker: Worker, feed: Feed, *, folder: Path, facts: Mapping[str, str]) -> Result:
    """Train to the end, from the newest checkpoint if there is one. All ranks call it.

    Args:
        config: of the run.
        worker: of this rank.
        feed: of this rank.
        folder: local folder for the run's records (rank 0 writes them).
        facts: about the run: git revision, command.

    Raises:
        CheckpointError: the run's checkpoints are of another config, set or backbone, or cannot be read.
        ModelError: the model cannot be built on this machine.
        ConfigError: `tracking.mlflow` cannot be reached from rank 0's machine.
    """
    with Run(config, worker, feed, folder=folder, facts=facts) as training:
        for epoch in range(training.state.epoch, config.train.epochs):
            training.begin_epoch(epoch)
            for micro_batches in training.clock.timed(ahead(feed.train(epoch, training.left()), worker.device)):
                result = train_step(training.engine, micro_batches, config.train, feed.world, **training.before_step())
                training.after_step(micro_batches, result)
                if training.asked_to_stop():
                    training.save()
                    return Result("stopped", training.finish("stopped"))
                if training.checkpoint_due():
                    training.save()
            training.end_epoch()
            if training.validation_due(epoch):
                training.validate()
                training.save()
            elif training.checkpoint_due():
                training.save()
            if training.gains_no_more():
                return Result("stopped_early", training.finish("stopped_early"))
        return Result("finished", training.finish("finished"))
