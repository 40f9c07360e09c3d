"""What a run carries from step to step: engine, state, ledger, records, clock.

Comes in: what `loop.run` was given. Goes out: the small verbs that the loop is made of.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vidfuse.config import Config, Stream
from vidfuse.data.batch import Batch, SampleError
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import Samples, steps_of
from vidfuse.data.shards import DataError
from vidfuse.evaluate.metrics import Scores, scores
from vidfuse.models.recognizer import Recognizer, build_recognizer, frozen_digest
from vidfuse.train import checkpoint
from vidfuse.train.clock import Clock
from vidfuse.train.engine import begin_groups, build_engine, loss_scale, set_learning_rates
from vidfuse.train.journal import Journal
from vidfuse.train.ledger import Ledger
from vidfuse.train.optim import Group, learning_rate, parameter_groups
from vidfuse.train.record import Record
from vidfuse.train.step import StepResult
from vidfuse.train.validate import Scored, score
from vidfuse.train.worker import Worker

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
"""Between two progress events."""


def model_of(config: Config) -> Recognizer:
    """The recogniser that a config describes, with fp32 weights on the current default device.

    Raises:
        ValueError: a component, an option or weights that do not fit.
    """

    def stream(part: Stream | None) -> dict[str, Any] | None:
        if part is None:
            return None
        given = part.model_dump(include={"name", "frozen", "trained_blocks", "weights"})
        return given | {"options": part.options}

    return build_recognizer(
        classes=config.data.classes,
        frames=config.data.frames,
        size=config.data.size,
        semantic=stream(config.model.semantic),
        motion=stream(config.model.motion),
        fusion={"name": config.model.fusion.name, "options": config.model.fusion.options},
        head_dropout=config.model.head_dropout,
        seed=config.seed,
    )


class Run:
    """One rank's side of a run. A context: it lets the engine and the stream go at the end."""

    def __init__(self, config: Config, worker: Worker, feed: Feed, *, folder: Path, facts: Mapping[str, str]) -> None:
        self.config, self.worker, self.feed = config, worker, feed
        self.epoch_steps = steps_of(feed.train_samples, config.train.global_batch)
        split = feed.packed.manifest.splits[config.data.train_split]
        self._shards = {shard.name: shard.samples for shard in split.shards}
        self._groups: tuple[Group, ...] = ()
        began = time.time()
        with worker.latest_checkpoint() as found:
            self.engine, self.state = self._begin(found, facts.get("git_revision", "unknown"))
        self.ledger = Ledger.from_json(self._shards, self.state.ledger)
        self._used = int(self.ledger.used.sum())
        self._errors = {SampleError(*error) for error in self.state.unreadable}
        self.record = Record(folder, config, facts, step=self.state.step) if worker.rank == 0 else None
        self.journal = Journal(worker, self._shards) if worker.rank == 0 else None
        if self.journal is not None:
            self.journal.start(step=self.state.step, epoch=self.state.epoch, manifest=self.state.manifest, began=began)
        self.clock = Clock()
        self._told = 0.0
        self._scores: Scores | None = None
        self._result: StepResult | None = None
        self._stop_agreed = False

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.feed.close()
        self.engine.destroy()

    # What the loop asks around a step.

    def begin_epoch(self, epoch: int) -> None:
        """Have streams wait whose epoch has not come, and those begin whose has."""
        first = _first_epochs(self.config)
        self.engine.module.hold([name for name, start in first.items() if start > epoch])
        if epoch > 0 and self._used == 0:
            begun = [i for i, group in enumerate(self._groups) if group.stream is not None and first[group.stream] == epoch]
            begin_groups(self.engine, begun)

    def left(self) -> Samples:
        """Samples of the running epoch that are not used yet, in order."""
        return self.ledger.left(self.feed.order(self.ledger.epoch))

    def before_step(self) -> dict[str, Any]:
        """Set the learning rate; the step's own arguments."""
        rate = learning_rate(self.config.train, self.samples, self.feed.train_samples)
        held = self.engine.module.held
        set_learning_rates(self.engine, [0.0 if g.stream in held else rate * g.share for g in self._groups])
        return {"seed": self.config.seed, "step": self.state.step, "stop": self.worker.should_stop()}

    def after_step(self, micro_batches: tuple[Batch, ...], result: StepResult) -> None:
        """Note what was used, and tell people now and then."""
        self.ledger.mark(torch.cat([batch.samples for batch in micro_batches]).numpy())
        self._used = min(self._used + self.config.train.global_batch, self.feed.train_samples)
        self._errors.update(error for batch in micro_batches for error in batch.errors)
        self.state.step += 1
        self._stop_agreed = self._result is not None and self._result.stop
        self._result = result
        if self.journal is not None:
            self.journal.stepped(self.state.step)
        if self.record is not None:
            self._tell(result)

    def asked_to_stop(self) -> bool:
        """Whether a rank was asked to stop; all ranks agree, one step later, without waiting for the device."""
        return self._stop_agreed

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint inside the epoch is due (the end of an epoch has its own)."""
        every = self.config.train.checkpoint_every_steps
        return every is not None and self.state.step % every == 0 and self._used < self.feed.train_samples

    # What the loop asks at the end of an epoch.

    def end_epoch(self) -> None:
        """Close the ledger of the epoch.

        Raises:
            DataError: too many of its videos could not be read.
        """
        self._merge(closed=True)
        missing, repeated = int((self.ledger.merged == 0).sum()), int((self.ledger.merged > 1).sum())
        if missing or repeated:  # a fault of vidfuse; what is done is done, so it is said loudly and the audit names them
            log.error(
                "epoch %d is not exactly once: %d samples were not used, %d more than once; `python -m jobs.audit` names them",
                *(self.ledger.epoch, missing, repeated),
            )
        count, total = len(self._errors), self.feed.train_samples
        if count > self.config.data.unreadable_limit * total:
            raise DataError(
                f"{count} of {total} training videos could not be read in epoch {self.ledger.epoch}, more than "
                f"data.unreadable_limit = {self.config.data.unreadable_limit:g} allows; "
                f"`python -m jobs.check {self.config.data.url}` names them"
            )
        if self.record is not None and count:
            names = sorted(f"{error.shard}/{error.key}" for error in self._errors)
            self.record.add("event", self.state.step, what="unreadable", epoch=self.ledger.epoch, videos=count, names=names)
        self.ledger = self.ledger.next_epoch()
        self._used = 0
        self._errors = set()

    def validation_due(self, epoch: int) -> bool:
        """Whether the epoch that just ended is followed by a validation."""
        return (epoch + 1) % self.config.train.validate_every_epochs == 0 or epoch + 1 == self.config.train.epochs

    def validate(self) -> None:
        """Score the validation split and note it."""
        train, data = self.config.train, self.config.data
        labels = self.feed.packed.indices[data.validation_split].label.astype(np.int64)
        self.engine.eval()
        batches = self.feed.score(data.validation_split, clips=1, crops=1, micro_batch=train.micro_batch)
        scored = score(self.engine, batches, labels, classes=data.classes, views=1, device=self.worker.device)
        self._scores = judged(scored, self.feed.packed.manifest.classes)
        top1 = self._scores.top1.value
        gained = self.state.best_top1 is None or top1 > self.state.best_top1
        self.state.best_top1 = top1 if gained else self.state.best_top1
        self.state.epochs_without_gain = 0 if gained else self.state.epochs_without_gain + train.validate_every_epochs
        if self.record is not None:
            values = {"loss": scored.loss, "top1": top1, "top5": self._scores.top5.value, "unreadable": self._scores.unreadable}
            self.record.add("validation", self.state.step, epoch=self.ledger.epoch, samples=self.samples, **values)
            self.worker.progress(self._event(top1=top1))

    def gains_no_more(self) -> bool:
        """Whether validation has not gained for as long as early stopping waits."""
        limit = self.config.train.early_stopping_epochs
        return limit is not None and self.state.epochs_without_gain >= limit

    def save(self) -> None:
        """Write a checkpoint, then have the records on the storage too."""
        self._merge()
        self.state.ledger = self.ledger.to_json()
        self.state.unreadable = sorted(astuple(error) for error in self._errors)
        validated = self._scores is not None and self._used == 0
        metrics = {"top1": self._scores.top1.value} if validated and self._scores else {}
        self.worker.save(self.state.name, lambda folder: checkpoint.save(self.engine, folder, self.state), metrics)
        if self.record is not None:
            self.record.flush()
            self.worker.publish(self.record.folder)

    def finish(self, how: str) -> dict[str, Any]:
        """Write result.json and report.html; the figures, on rank 0."""
        if self.record is None or self.journal is None:
            return {}
        self.journal.end(step=self.state.step, how=how)
        values: dict[str, Any] = {
            "state": how,
            "steps": self.state.step,
            "epochs": self.ledger.epoch,
            "samples": self.samples,
            "workers": self.worker.world_size,
            "zero_stage": self.config.train.zero_stage,
            "precision": self.config.train.precision,
            "best_top1": self.state.best_top1,
            "seconds_total": round(self.clock.seconds, 2),
            **self.clock.speed(self.config.train.global_batch),
        }
        if self._scores is not None:
            values |= {"top1": self._scores.top1.value, "top5": self._scores.top5.value, "chance": self._scores.chance.best}
        self.record.finish(values, self._scores, sorted(astuple(error) for error in self._errors))
        self.worker.publish(self.record.folder)
        return values

    @property
    def samples(self) -> int:
        """Samples used so far, over all epochs."""
        return self.ledger.epoch * self.feed.train_samples + self._used

    # How.

    def _begin(self, found: Path | None, revision: str) -> tuple[checkpoint.Engine, checkpoint.State]:
        """The engine and the state, fresh or from a checkpoint; shards of another world size are converted first."""
        config, world = self.config, self.feed.world
        manifest = self.feed.packed.manifest.plan
        model = model_of(config)
        groups = parameter_groups(model, layer_decay=config.train.layer_decay, late=_first_epochs(config))
        self._groups = tuple(groups)
        frozen = frozen_digest(model)
        tree = config.model_dump(mode="json")
        if found is None:
            fresh = checkpoint.State(tree, manifest, revision, frozen, world.size)
            return build_engine(model, groups, config.train, world, self.worker.device), fresh
        state = checkpoint.read_state(found)
        checkpoint.check_matches(state, config, manifest=manifest, frozen=frozen)
        elsewhere = state.world_size != world.size and config.train.zero_stage > 0  # without ZeRO nothing is sharded
        shards = checkpoint.shards_of(found, elsewhere=elsewhere, machine=self.worker.machine)
        engine = build_engine(model, groups, config.train, world, self.worker.device, universal=elsewhere)
        checkpoint.restore(engine, found, shards)
        checkpoint.discard(shards, found)
        state.world_size, state.config, state.git_revision = world.size, tree, revision
        return engine, state

    def _merge(self, *, closed: bool = False) -> None:
        """Have every rank know what all ranks used and could not read, and the journal too."""
        fresh = torch.from_numpy(self.ledger.fresh).to(self.worker.device, copy=True)
        dist.all_reduce(fresh)
        uses = fresh.cpu().numpy()
        self.ledger.add(uses)
        everyone: list[set[SampleError]] = [set() for _ in range(self.worker.world_size)]
        dist.all_gather_object(everyone, self._errors)
        self._errors = set().union(*everyone)
        if self.journal is not None and (closed or uses.any()):
            place = {"step": self.state.step, "epoch": self.ledger.epoch}
            self.journal.used(**place, uses=uses, errors=self._errors, closed=closed)

    def _tell(self, result: StepResult) -> None:
        assert self.record is not None
        train = self.config.train
        if self.state.step % train.log_every_steps == 0:
            rate = learning_rate(train, self.samples, self.feed.train_samples)
            values = {"loss": result.loss, "accuracy": result.accuracy, "grad_norm": result.grad_norm, "learning_rate": rate}
            if train.precision == "fp16":
                values["loss_scale"] = loss_scale(self.engine)
            self.record.add(
                "train",
                self.state.step,
                epoch=self.ledger.epoch,
                samples=self.samples,
                **values,
                **self.clock.lap(train.global_batch),
            )
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            self.worker.progress(self._event(loss=result.loss))

    def _event(self, **values: float) -> dict[str, Any]:
        steps = self.epoch_steps * self.config.train.epochs
        speed = self.clock.speed(self.config.train.global_batch)
        done = self.clock.steps
        eta = (steps - self.state.step) * self.clock.seconds / done if done else None
        place = {"epoch": self.ledger.epoch, "epochs": self.config.train.epochs, "step": self.state.step, "steps": steps}
        return {**place, "time": round(time.time(), 3), **values, **speed, "eta_seconds": eta}


def _first_epochs(config: Config) -> dict[str, int]:
    """The streams that are trained from a later epoch than the first, and from which."""
    streams = {"semantic": config.model.semantic, "motion": config.model.motion}
    return {name: s.train_from_epoch for name, s in streams.items() if s is not None and not s.frozen and s.train_from_epoch}


def judged(scored: Scored, classes: tuple[str, ...]) -> Scores:
    """The figures of a scored split."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.clip(scored.probabilities, 1e-30, None))
    return scores(logits, scored.labels, scored.unreadable, classes)
