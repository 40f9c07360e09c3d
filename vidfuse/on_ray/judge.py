"""A scored checkpoint as figures and a report beside the run.

Comes in: a run's folder and an evaluation config. Goes out: `evaluate/<split>/result.json` and `report.html` on its storage.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

from vidfuse.config import Config, ConfigError
from vidfuse.data.shards import DataError
from vidfuse.evaluate.metrics import Scores
from vidfuse.evaluate.report import report
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.preflight import open_set
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.score import score_run, split_of
from vidfuse.on_ray.storage import join
from vidfuse.train.errors import Damage
from vidfuse.train.record import METRICS, read_metrics, surroundings
from vidfuse.train.shelf import step_of
from vidfuse.train.tracking import add_evaluation
from vidfuse.train.validate import Scored, judged, together

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """A checkpoint's figures over a split."""

    config: Config
    checkpoint: str
    step: int
    """Of the checkpoint; of an ensemble the first run's."""
    scored: Scored
    scores: Scores
    in_manifest: int
    packed_version: str
    """Of the packed set."""
    facts: Mapping[str, str]
    damaged: tuple[Damage, ...] = ()
    """Checkpoints that would have been scored instead."""
    members: tuple[Judgement, ...] = ()
    """Of the runs of an ensemble, the one of the config first; empty: it is one run's."""

    @property
    def below(self) -> str:
        """Folder of the run that it is published in."""
        return join("evaluate", "-with-".join((split_of(self.config), *self._names[1:])))

    @property
    def views(self) -> dict[str, Any]:
        """What of a video was scored; `None`: not the same in all runs of an ensemble."""
        if self.members:
            first, *others = (member.views for member in self.members)
            return {name: value if all(of[name] == value for of in others) else None for name, value in first.items()}
        return {name: getattr(self.config.evaluate, name) for name in ("clips", "crops", "flip")}

    @property
    def _names(self) -> list[str]:
        return [member.config.run.name for member in self.members]

    def result(self) -> dict[str, Any]:
        """What result.json holds; of an ensemble also the views of each run, in the order of their names."""
        head: dict[str, Any] = {"run": self.config.run.name, "checkpoint": self.checkpoint, "split": split_of(self.config)}
        head |= {"ensemble": self._names, "views": [member.views for member in self.members]} if self.members else {}
        views = {
            **self.views,
            "mean": self.config.evaluate.mean,
            "samples_scored": self.scores.samples,
            "samples_in_manifest": self.in_manifest,
            "packed_version": self.packed_version,
        }
        damaged = {"damaged": [asdict(damage) for damage in self.damaged]} if self.damaged else {}
        return {**head, **damaged, **views, **self.scores.to_json()}

    def lines(self) -> list[str]:
        """The headline figures in words."""
        s = self.scores
        return [
            *(f"{damage}; it is not scored" for damage in self.damaged),
            f"{self.checkpoint} over {split_of(self.config)}: {s.samples} of {self.in_manifest} videos scored, {s.unreadable} unreadable",
            f"top-1 {s.top1.value:.4f} (95 % interval {s.top1.low:.4f} to {s.top1.high:.4f}), chance {s.chance.best:.4f}",
            f"{s.top5_name} {s.top5.value:.4f} ({s.top5.low:.4f} to {s.top5.high:.4f})",
            f"mean class accuracy {s.mean_class_accuracy.value:.4f}",
        ]


def judge(folder: RunFolder, config: Config, which: str, *, facts: Mapping[str, str]) -> Judgement:
    """Score a checkpoint and make its figures.

    Args:
        folder: the run.
        config: the run's, with the wanted `evaluate` section.
        which: `best` or `last`.
        facts: about this evaluation.

    Raises:
        DataError: the run has no such checkpoint, or the split cannot be scored.
        CheckpointError: it has, and none is good.
    """
    checkpoint, damaged = folder.choose(which)
    if checkpoint is None:
        raise DataError(f"{folder.url} has no {which} checkpoint yet: train on, or take --checkpoint last")
    scored = score_run(folder, config, checkpoint)
    manifest = folder_manifest(config)
    scores = judged(scored, manifest.classes)
    _tell(config, scores)
    samples = manifest.splits[split_of(config)].samples
    facts = {**facts, **surroundings(), "packed set": f"{manifest.dataset}, version {manifest.version}"}
    return Judgement(config, checkpoint, step_of(checkpoint), scored, scores, samples, manifest.version, facts, damaged)


def _tell(config: Config, scores: Scores) -> None:
    """Have the scores among the metrics, for as long as this process lives and some seconds more."""
    board = Board("evaluation", run=config.run.name, split=split_of(config))
    board.set("evaluation_samples", scores.samples)
    board.set("evaluation_top1_ratio", scores.top1.value)
    board.set("evaluation_top5_ratio", scores.top5.value)
    board.set("evaluation_mean_class_ratio", scores.mean_class_accuracy.value)
    board.put()


def judge_together(runs: Sequence[tuple[RunFolder, Config]], which: str, *, facts: Mapping[str, str]) -> Judgement:
    """Score the checkpoints of several runs over one split, and the average of what they say.

    Args:
        runs: with the wanted `evaluate` sections, which may differ in their views; a single one is judged by itself.
        which: `best` or `last`.
        facts: about this evaluation.

    Raises:
        DataError: the runs are of other sets or splits; or as `judge`.
        ConfigError: they are to be averaged in different ways.
    """
    (folder, config), others = runs[0], runs[1:]
    if not others:
        return judge(folder, config, which, facts=facts)
    split, manifest = split_of(config), folder_manifest(config)
    for other, theirs in others:
        if (split_of(theirs), folder_manifest(theirs)) != (split, manifest):
            raise DataError(
                f"{other.url} is not of the packed set and split of {folder.url} ({split!r} of {config.data.url}): an ensemble is "
                "of runs over the same samples; say --set evaluate.split=... data.url=... for all of them"
            )
        if theirs.evaluate.mean != config.evaluate.mean:
            raise ConfigError(
                f"evaluate.mean is {config.evaluate.mean} in {folder.url} and {theirs.evaluate.mean} in {other.url}: an ensemble has one "
                "average; say --set evaluate.mean=probabilities or evaluate.mean=logits for all of them"
            )
    parts = [judge(*run, which, facts=facts) for run in runs]
    scored = together([part.scored for part in parts], mean=config.evaluate.mean)
    return replace(
        parts[0],
        checkpoint=", ".join(f"{part.config.run.name} {part.checkpoint}" for part in parts),
        scored=scored,
        scores=judged(scored, manifest.classes),
        damaged=tuple(damage for part in parts for damage in part.damaged),
        facts={**parts[0].facts, **{f"run {number}": _said(part) for number, part in enumerate(parts, 1)}},
        members=tuple(parts),
    )


def _said(member: Judgement) -> str:
    views = ", ".join(f"{name} {value}" for name, value in member.views.items())
    return f"{member.config.run.name}, {member.checkpoint}: {views}"


def folder_manifest(config: Config) -> Any:
    """The manifest of a config's packed set."""
    return open_set(config, split_of(config)).manifest


def publish(judgement: Judgement, folder: RunFolder, scratch: Path) -> str:
    """Write the result and the report beside the run, and to MLflow if the run is there; returns their URL."""
    folder.records(scratch)
    records = read_metrics(scratch / METRICS)
    page = report(
        title=f"{judgement.config.run.name}: {judgement.checkpoint} over {split_of(judgement.config)}",
        config_yaml=judgement.config.to_yaml(),
        records=records,
        scores=judgement.scores,
        errors=[astuple(error) for error in judgement.scored.errors],
        facts=judgement.facts,
    )
    out = scratch / "out"
    out.mkdir()
    (out / "report.html").write_text(page, encoding="utf-8")
    (out / "result.json").write_text(json.dumps(judgement.result(), indent=1), encoding="utf-8")
    folder.put(out, judgement.below)
    _track(judgement, scratch, [out / "result.json", out / "report.html"])
    return join(folder.url, judgement.below)


def _track(judgement: Judgement, records: Path, pages: Sequence[Path]) -> None:
    """Have MLflow know the scores; where it cannot, that is said, as they are on the run's storage."""
    tracking, scores = judgement.config.tracking, judgement.scores
    if tracking.mlflow is None:
        return
    figures = {
        "top1": scores.top1.value,
        "top5": scores.top5.value,
        "mean_class_accuracy": scores.mean_class_accuracy.value,
        "calibration_error": scores.calibration.ece,
        "unreadable": scores.unreadable,
    }
    try:
        add_evaluation(tracking, records, judgement.below, step=judgement.step, scores=figures, artefacts=pages)
    except ConfigError as error:
        log.warning("%s; the scores are not in MLflow", error)
