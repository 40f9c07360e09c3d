"""What a run carries from step to step: engine, state, ledger, records, clock.

Comes in: what `loop.run` was given. Goes out: the small verbs that the loop is made of.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from vidfuse.config import Config, ConfigError
from vidfuse.data.batch import Batch, SampleError
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import Samples, steps_of
from vidfuse.data.shards import DataError
from vidfuse.evaluate.metrics import Scores
from vidfuse.models.recognizer import Recognizer, frozen_digest
from vidfuse.train import checkpoint
from vidfuse.train.average import Average
from vidfuse.train.clock import Clock
from vidfuse.train.due import Due
from vidfuse.train.engine import Engine, begin_groups, build_engine, end_engine, loss_scale, set_learning_rates
from vidfuse.train.errors import CheckpointError, EndedError, ModelError
from vidfuse.train.journal import Journal
from vidfuse.train.ledger import Ledger
from vidfuse.train.loss import loss_of
from vidfuse.train.model import continued, first_epochs, origins_of, started
from vidfuse.train.optim import Group, learning_rate, parameter_groups
from vidfuse.train.record import Record
from vidfuse.train.shelf import Found
from vidfuse.train.step import StepResult
from vidfuse.train.tracking import Tracker
from vidfuse.train.validate import judged, score
from vidfuse.train.worker import Worker

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.5
"""Between two progress events."""
LAST_UNREADABLE = 3
"""Names of unreadable videos in a record."""
SETTLE_SECONDS = 60.0
"""How long a run that ends by a fault waits for the checkpoint that is being stored."""
PARTING_SECONDS = 3.0
"""How long it then waits for MLflow."""


class Run:
    """One rank's side of a run. A context: it lets the engine and the stream go at the end."""

    def __init__(self, config: Config, worker: Worker, feed: Feed, *, folder: Path, facts: Mapping[str, str]) -> None:
        self.config, self.worker, self.feed = config, worker, feed
        self.epoch_steps = steps_of(feed.train_samples, config.train.global_batch)
        split = feed.packed.manifest.splits[config.data.train_split]
        self._shards = {shard.name: shard.samples for shard in split.shards}
        self._groups: tuple[Group, ...] = ()
        began = time.time()
        self._average: Average | None = None
        with worker.latest_checkpoint() as found:
            self.engine, self.state, origins = self._begin(found.folder, facts.get("git_revision", "unknown"))
        facts = {**facts, **origins, "packed set": f"{feed.packed.manifest.dataset}, version {feed.packed.manifest.version}"}
        self.ledger = self._ledger(found)
        self._used = int(self.ledger.uses.sum())
        self._errors = dict.fromkeys(SampleError(*error) for error in self.state.unreadable)
        self._lost = torch.tensor(float(len(self._errors)), device=worker.device)
        self.record = Record(folder, config, facts, step=self.state.step) if worker.rank == 0 else None
        self._tracker: Tracker | None = None
        self._track()
        self.journal = Journal(worker, self._shards) if worker.rank == 0 else None
        if self.journal is not None:
            self.journal.start(step=self.state.step, epoch=self.state.epoch, manifest=self.state.manifest, began=began)
        if self.record is not None and not found.name:
            self.worker.publish(self.record.folder)  # who looks for the run finds it before its first checkpoint
        self.clock = Clock()
        self._told, self._nonfinite = 0.0, 0
        self._scores: Scores | None = None
        self._scored_step = -1
        labels = feed.packed.indices[config.data.train_split].label
        self._loss = loss_of(config.train, labels, config.data.classes, worker.device)
        self._result: StepResult | None = None
        self._stop_agreed = False
        self._due = Due(config.train, samples=self.samples)
        if self.record is not None and found.damaged:
            self._tell_of_damage(found)
        if self.record is not None:
            place = {
                "step": self.state.step,
                "epoch": self.ledger.epoch,
                "planned_steps": self.epoch_steps * config.train.epochs,
            }
            self.worker.tell({**place, "world_size": feed.world.size, "accumulation_steps": feed.world.accumulation})

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(CheckpointError):  # the run ended by another fault, which is the one to tell
            self.worker.close(at_most_seconds=SETTLE_SECONDS)
        if self._tracker is not None:
            ended = kind is not None and issubclass(kind, EndedError)
            self._tracker.close("KILLED" if ended else "FAILED", at_most_seconds=PARTING_SECONDS)
        self.feed.close()
        end_engine(self.engine)

    # What the loop asks around a step.

    def begin_epoch(self, epoch: int) -> None:
        """Have streams wait whose epoch has not come, and those begin whose has."""
        first = first_epochs(self.config)
        self.engine.module.hold([name for name, start in first.items() if start > epoch])
        if epoch > 0 and self._used == 0:
            begun = [i for i, group in enumerate(self._groups) if group.stream is not None and first[group.stream] == epoch]
            begin_groups(self.engine, begun)

    def left(self) -> Samples:
        """Entries of the running epoch's order that are not used yet."""
        return self.ledger.left(self.feed.order(self.ledger.epoch))

    def before_step(self) -> dict[str, Any]:
        """Set the learning rate; the step's own arguments."""
        rate = learning_rate(self.config.train, self.samples, self.feed.train_samples)
        held = self.engine.module.held
        set_learning_rates(self.engine, [0.0 if g.stream in held else rate * g.share for g in self._groups])
        save = (self.worker.rank == 0 and self._due.asks()) or self.worker.told_to_save()
        return {
            "loss": self._loss,
            "seed": self.config.seed,
            "step": self.state.step,
            "stop": self.worker.should_stop(),
            "save": save,
        }

    def after_step(self, micro_batches: tuple[Batch, ...], result: StepResult) -> None:
        """Note what was used, and tell people now and then."""
        rows = torch.cat([batch.samples for batch in micro_batches]).numpy()
        self.ledger.mark(rows[:: self.config.data.repeats])  # the clips of a video follow each other
        self._used = min(self._used + self.config.train.global_batch, self.feed.train_samples)
        self._errors.update(dict.fromkeys(error for batch in micro_batches for error in batch.errors))
        self._lost = self._lost + result.unreadable / self.config.data.repeats
        self.state.step += 1
        if self._average is not None:
            self._average.update(self.engine, self.state.step)
        self._stop_agreed = self._result is not None and self._result.stop
        self._due.passed(self.state.step, self.samples, asked=self._result is not None and self._result.save)
        self._result = result
        if self.journal is not None:
            self.journal.stepped(self.state.step)
        if self.record is not None:
            self._note(result)
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._tell(result)

    def asked_to_stop(self) -> bool:
        """Whether a rank was asked to stop; all ranks agree, one step later, without waiting for the device."""
        return self._stop_agreed

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is due; one that falls on the last step of an epoch is due when the epoch has ended."""
        return self._due.now and self._used < self.feed.train_samples

    # What the loop asks at the end of an epoch.

    def end_epoch(self) -> None:
        """Close the ledger of the epoch.

        Raises:
            DataError: too many of its videos could not be read.
        """
        self._merge(closed=True)
        planned = self.feed.uses(self.ledger.epoch)
        missing, repeated = int((self.ledger.merged < planned).sum()), int((self.ledger.merged > planned).sum())
        if missing or repeated:  # a fault of vidfuse; what is done is done, so it is said loudly and the audit names them
            log.error(
                "epoch %d is not exactly as planned: %d samples were used too rarely, %d too often; `python -m jobs.audit` names them",
                *(self.ledger.epoch, missing, repeated),
            )
        if self.record is not None and self._errors:
            names = sorted(f"{error.shard}/{error.key}" for error in self._errors)
            self.record.add(
                "event", self.state.step, what="unreadable", epoch=self.ledger.epoch, videos=len(names), names=names
            )
        self.ledger = self.ledger.next_epoch()
        self._used = 0
        self._errors = {}
        self._lost = torch.zeros_like(self._lost)

    def validation_due(self, epoch: int) -> bool:
        """Whether the epoch that just ended is followed by a validation."""
        return (epoch + 1) % self.config.train.validate_every_epochs == 0 or epoch + 1 == self.config.train.epochs

    def validate(self) -> None:
        """Score the validation split and note it."""
        train, data = self.config.train, self.config.data
        labels = self.feed.packed.indices[data.validation_split].label.astype(np.int64)
        self.engine.eval()
        batches = self.feed.score(data.validation_split, clips=1, crops=1, micro_batch=train.micro_batch)
        with self._average.shown(self.engine) if self._average else contextlib.nullcontext():
            scored = score(self.engine, batches, labels, classes=data.classes, views=1, device=self.worker.device)
        self._scores, self._scored_step = judged(scored, self.feed.packed.manifest.classes), self.state.step
        top1 = self._scores.top1.value
        gained = self.state.best_top1 is None or top1 > self.state.best_top1
        self.state.best_top1 = top1 if gained else self.state.best_top1
        self.state.epochs_without_gain = 0 if gained else self.state.epochs_without_gain + train.validate_every_epochs
        if self.record is not None:
            values = {"loss": scored.loss, "top1": top1, "top5": self._scores.top5.value, "unreadable": self._scores.unreadable}
            self.record.add("validation", self.state.step, epoch=self.ledger.epoch, samples=self.samples, **values)
            self.worker.progress(self._event(top1=top1, best_top1=self.state.best_top1))
            figures = {"loss": scored.loss, "top1_ratio": top1, "top5_ratio": self._scores.top5.value}
            best = {"best_top1_ratio": self.state.best_top1 or 0.0, "epoch": self.ledger.epoch}
            self.worker.tell({**{f"validation_{name}": value for name, value in figures.items()}, **best})

    def gains_no_more(self) -> bool:
        """Whether validation has not gained for as long as early stopping waits."""
        limit = self.config.train.early_stopping_epochs
        return limit is not None and self.state.epochs_without_gain >= limit

    def save(self) -> None:
        """Write a checkpoint; it is stored with the records while training goes on."""
        began = time.monotonic()
        self._merge()
        self.state.ledger = self.ledger.to_json()
        self.state.unreadable = sorted(astuple(error) for error in self._errors)
        validated = self._scores is not None and self._scored_step == self.state.step
        metrics = {"top1": self._scores.top1.value} if validated and self._scores else {}
        if self.record is not None:
            self.record.flush()
        self.worker.save(
            self.state.name,
            lambda folder: checkpoint.save(self.engine, folder, self.state, self._average),
            metrics,
            keep=self.config.train.keep_checkpoints,
            records=self.record.folder if self.record is not None else None,
        )
        self._due.saved(self.state.step, self.samples)
        if self.record is not None:
            stall = round(time.monotonic() - began, 3)
            self.record.add("checkpoint", self.state.step, stall_seconds=stall)
            self.worker.tell({"checkpoint_stall_seconds": stall})

    def finish(self, how: str) -> dict[str, Any]:
        """Have the last checkpoint stored, then write result.json and report.html; the figures, on rank 0."""
        self.worker.settle()
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
            "packed_version": self.state.manifest,
            "best_top1": self.state.best_top1,
            "seconds_total": round(self.clock.seconds, 2),
            **self.clock.speed(self._clips),
        }
        if self._scores is not None:
            values |= {"top1": self._scores.top1.value, "top5": self._scores.top5.value, "chance": self._scores.chance.best}
        self.record.finish(values, self._scores, sorted(astuple(error) for error in self._errors))
        self.worker.publish(self.record.folder)
        if self._tracker is not None:
            files = [self.record.folder / name for name in ("result.json", "report.html")]
            self._tracker.close("KILLED" if how == "stopped" else "FINISHED", files)
        return values

    @property
    def samples(self) -> int:
        """Samples used so far, over all epochs."""
        return self.ledger.epoch * self.feed.train_samples + self._used

    # How.

    @property
    def _clips(self) -> int:
        """Clips of a step; a video counts `data.repeats` times."""
        return self.config.train.global_batch * self.config.data.repeats

    def _begin(self, found: Path | None, revision: str) -> tuple[Engine, checkpoint.State, dict[str, str]]:
        """The engine and the state, fresh or from a checkpoint, and where the weights are from.

        Shards of another world size are converted first.
        """
        config, world = self.config, self.feed.world
        manifest = self.feed.packed.manifest
        state = None if found is None else checkpoint.read_state(found)
        model, begun = self._model(state)
        origins = origins_of(config, model, begun)
        groups = parameter_groups(model, layer_decay=config.train.layer_decay, late=first_epochs(config))
        self._groups = tuple(groups)
        frozen = frozen_digest(model)
        tree = config.model_dump(mode="json")
        if found is None or state is None:
            fresh = checkpoint.State(
                tree, manifest.version, revision, frozen, world.size, start=begun, draws=self.feed.packed.draws.digest
            )
            engine = build_engine(model, groups, config.train, world, self.worker.device)
            self._average = Average.of(engine, config.train)
            return engine, fresh, origins
        checkpoint.check_matches(state, config, manifest=manifest, frozen=frozen, draws=self.feed.packed.draws.digest)
        elsewhere = state.world_size != world.size and config.train.zero_stage > 0  # without ZeRO nothing is sharded
        shards = checkpoint.shards_of(found, elsewhere=elsewhere, machine=self.worker.machine)
        engine = build_engine(model, groups, config.train, world, self.worker.device, universal=elsewhere)
        self._average = Average.of(engine, config.train)
        checkpoint.restore(engine, found, shards, self._average)
        checkpoint.discard(shards, found)
        state.world_size, state.config, state.git_revision = world.size, tree, revision
        return engine, state, origins

    def _track(self) -> None:
        """Have rank 0 write the run to MLflow, if it is to. All ranks call it.

        Raises:
            ConfigError: MLflow does not know the run and cannot be reached from rank 0's machine; the same on all ranks.
        """
        if self.config.tracking.mlflow is None:
            return
        fault = [""]
        if self.record is not None:
            place = {"manifest": self.state.manifest, "world size": str(self.worker.world_size)}
            try:
                self._tracker = Tracker(
                    self.config,
                    {**self.record.facts, **place},
                    folder=self.record.folder,
                    lines=self.record.lines,
                    keep=self.worker.keep,
                    warn=self.worker.warn,
                )
            except ConfigError as error:
                fault = [f"{error} (asked by rank 0, on {platform.node()})"]
        dist.broadcast_object_list(fault, src=0)
        if fault[0]:
            self.__exit__(ConfigError)
            raise ConfigError(fault[0])

    def _model(self, state: checkpoint.State | None) -> tuple[Recognizer, dict[str, Any]]:
        try:
            if state is None:
                return started(self.config, self.worker.local)
            return continued(self.config, state.start, self.worker.local), state.start
        except ValueError as error:
            raise ModelError(f"model: {error}") from error

    def _ledger(self, found: Found) -> Ledger:
        try:
            return Ledger.from_json(self._shards, self.state.ledger)
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {found.name}: {error}; give the set that run {self.config.run.name!r} was trained on, or another "
                "--set run.name=... to start afresh"
            ) from error

    def _tell_of_damage(self, found: Found) -> None:
        assert self.record is not None
        for damage in found.damaged:
            self.record.add("event", self.state.step, what="damaged_checkpoint", **asdict(damage), used=found.name)
        self.worker.publish(self.record.folder)

    def _merge(self, *, closed: bool = False) -> None:
        """Have every rank know what all ranks used and could not read, and the journal too.

        Raises:
            DataError: too many of the epoch's videos could not be read.
        """
        fresh = torch.from_numpy(self.ledger.fresh).to(self.worker.device, copy=True)
        dist.all_reduce(fresh)
        uses = fresh.cpu().numpy()
        self.ledger.add(uses)
        everyone: list[dict[SampleError, None]] = [{} for _ in range(self.worker.world_size)]
        dist.all_gather_object(everyone, self._errors)
        self._errors = {error: None for errors in everyone for error in errors}
        if self.journal is not None and (closed or uses.any()):
            place = {"step": self.state.step, "epoch": self.ledger.epoch}
            self.journal.used(**place, uses=uses, errors=self._errors, closed=closed)
        count, total = len(self._errors), self.feed.train_samples
        if count > self.config.data.unreadable_limit * total:
            raise DataError(
                f"{count} of {total} training videos could not be read in epoch {self.ledger.epoch}, more than "
                f"data.unreadable_limit = {self.config.data.unreadable_limit:g} allows; "
                f"`python -m jobs.check {self.config.data.url}` names them"
            )

    def _tell(self, result: StepResult) -> None:
        """Tell those who watch, and on rank 0 people; reading the loss waits for the device, so that the others do not."""
        lap = self.clock.lap(self._clips, "watched") if self.clock.steps else None  # the first step is not over yet
        if lap is not None:
            self.worker.tell({"step_seconds": lap["step_seconds"], "data_wait_ratio": lap["data_wait_fraction"]})
        if self.record is None:
            return
        train, loss = self.config.train, result.loss
        # fp16 scales losses until gradients overflow, and skips those steps
        self._nonfinite += not math.isfinite(loss if train.precision == "fp16" else loss + result.grad_norm)
        self.worker.tell(
            {
                "step": self.state.step,
                "epoch": self.ledger.epoch,
                **({"clips_per_second": lap["clips_per_second"]} if lap is not None else {}),
                "loss": loss,
                "nonfinite_losses_total": self._nonfinite,
                "accuracy_ratio": result.accuracy,
                "gradient_norm": result.grad_norm,
                "learning_rate": learning_rate(train, self.samples, self.feed.train_samples),
                "loss_scale": loss_scale(self.engine) if train.precision == "fp16" else 1.0,
            }
        )
        self.worker.progress(self._event(loss=loss, **self._unreadable()))

    def _note(self, result: StepResult) -> None:
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
                **self._unreadable(),
                **self.clock.lap(self._clips, "recorded"),
            )

    def _unreadable(self) -> dict[str, Any]:
        """How many of the epoch's videos so far could not be read, on all ranks, and the last ones that this rank knows of."""
        last = [f"{error.shard}/{error.key}" for error in list(self._errors)[-LAST_UNREADABLE:]]
        return {"unreadable_share": round(float(self._lost) / max(self._used, 1), 6), "unreadable_last": last}

    def _event(self, **values: Any) -> dict[str, Any]:
        steps = self.epoch_steps * self.config.train.epochs
        speed = self.clock.speed(self._clips)
        done = self.clock.steps
        eta = (steps - self.state.step) * self.clock.seconds / done if done else None
        place = {"epoch": self.ledger.epoch, "epochs": self.config.train.epochs, "step": self.state.step, "steps": steps}
        return {**place, "time": round(time.time(), 3), **values, **speed, "eta_seconds": eta}
