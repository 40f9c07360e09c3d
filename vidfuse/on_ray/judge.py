"""A scored checkpoint as figures and a report beside the run.

Comes in: a run's folder and an evaluation config. Goes out: `evaluate/<split>/result.json` and `report.html` on its storage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

from vidfuse.config import Config
from vidfuse.data.shards import DataError
from vidfuse.evaluate.metrics import Scores
from vidfuse.evaluate.report import report
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.score import score_run, split_of
from vidfuse.on_ray.storage import join
from vidfuse.train.errors import Damage
from vidfuse.train.record import METRICS, read_metrics, surroundings
from vidfuse.train.run import judged
from vidfuse.train.validate import Scored


@dataclass(frozen=True)
class Judgement:
    """A checkpoint's figures over a split."""

    config: Config
    checkpoint: str
    scored: Scored
    scores: Scores
    in_manifest: int
    facts: Mapping[str, str]
    damaged: tuple[Damage, ...] = ()
    """Checkpoints that would have been scored instead."""

    def result(self) -> dict[str, Any]:
        """What result.json holds."""
        view = self.config.evaluate
        head = {"run": self.config.run.name, "checkpoint": self.checkpoint, "split": split_of(self.config)}
        views = {
            "clips": view.clips,
            "crops": view.crops,
            "samples_scored": self.scores.samples,
            "samples_in_manifest": self.in_manifest,
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
    samples = manifest.splits[split_of(config)].samples
    return Judgement(config, checkpoint, scored, scores, samples, {**facts, **surroundings()}, damaged)


def folder_manifest(config: Config) -> Any:
    """The manifest of a config's packed set."""
    from vidfuse.on_ray.fit import open_set

    return open_set(config, split_of(config)).manifest


def publish(judgement: Judgement, folder: RunFolder, scratch: Path) -> str:
    """Write the result and the report beside the run; returns their URL."""
    folder.records(scratch)
    records = read_metrics(scratch / METRICS)
    below = join("evaluate", split_of(judgement.config))
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
    folder.put(out, below)
    return join(folder.url, below)
