"""report.html: what a run or an evaluation showed, in one file that needs nothing else.

Comes in: the resolved config, the records of `metrics.jsonl`, `Scores`, unreadable videos and free facts; scores, records and
errors may each be missing. Goes out: a `page`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from vidfuse.evaluate import figures
from vidfuse.evaluate.figures import Record
from vidfuse.evaluate.metrics import ClassScore, MeanClassAccuracy, Proportion, Scores
from vidfuse.evaluate.page import Headline, inline, percent, plural, render

CONFUSIONS_IN_SIGHT = 10
"""Confusions told in words before the rest folds away."""


class ClassRow(NamedTuple):
    """One row of the per-class table and its place in the confusion matrix, from 1."""

    place: int
    score: ClassScore


def report(
    *,
    title: str,
    config_yaml: str,
    records: Sequence[Record],
    scores: Scores | None,
    errors: Sequence[tuple[str, str, str]],
    facts: Mapping[str, str],
) -> str:
    """Write the report of a run (so far) or of an evaluation.

    Args:
        title: Heading of the page, such as the run's name.
        config_yaml: The resolved config, shown as it is.
        records: Dicts as read from `metrics.jsonl`, in the order written (a lower step later is a rollback); empty: no curves.
        scores: The evaluation; `None`: none yet.
        errors: (shard, key, reason) of each unreadable video.
        facts: What else the reader must know: git revision, hardware, command, dates, number of views. Shown in this order.

    Returns:
        A whole HTML document.

    Raises:
        ValueError: a record without `step`.
    """
    return render(
        "report.html.j2",
        title=title,
        config_yaml=config_yaml,
        facts=facts,
        errors=errors,
        scores=scores,
        verdict=_verdict(scores) if scores else "",
        headlines=_headlines(scores) if scores else _headlines_of_training(records),
        pictures=_pictures(records, scores),
        rows=_rows(scores) if scores else [],
        in_sight=CONFUSIONS_IN_SIGHT,
    )


def _verdict(scores: Scores) -> str:
    chance, top1 = scores.chance, scores.top1
    best = "guessing" if chance.uniform >= chance.majority else f"always answering “{chance.majority_class}”"
    if top1.low > chance.best:
        return f"Top-1 is above chance: its whole 95% interval lies above what {best} reaches ({percent(chance.best)})."
    if top1.high < chance.best:
        return (
            f"Top-1 is below chance: {best} would reach {percent(chance.best)}. Look for labels and classes that do not match."
        )
    return f"Top-1 cannot be told from chance: {best} reaches {percent(chance.best)}, which is inside its 95% interval."


def _headlines(scores: Scores) -> list[Headline]:
    top1, top5, mean, chance, k = scores.top1, scores.top5, scores.mean_class_accuracy, scores.chance, len(scores.classes)
    of_top1, of_top5 = (f"{top.hits:,} of {plural(top.total, 'video')}" for top in (top1, top5))
    if scores.top5_k == k:
        of_top5 += "; with so few classes every answer counts"
    over = f"over all {k} classes" if mean.classes == k else f"over the {mean.classes} of {k} classes that occur"
    guesses = f"guessing {percent(chance.uniform)}, most frequent class {percent(chance.majority)}"
    confidence = f"expected; mean confidence {percent(scores.calibration.mean_confidence)}"
    return [
        Headline("Top-1", percent(top1.value), of_top1, _span(top1), chance.best),
        Headline(scores.top5_name.capitalize(), percent(top5.value), of_top5, _span(top5), scores.top5_k / k),
        Headline("Mean class accuracy", percent(mean.value), over, _span(mean), chance.uniform),
        Headline("Chance", percent(chance.best), guesses),
        Headline("Calibration error", percent(scores.calibration.ece), confidence),
        Headline("Videos scored", f"{scores.samples:,}", f"{scores.unreadable:,} of them unreadable, counted as wrong"),
    ]


def _span(interval: Proportion | MeanClassAccuracy) -> tuple[float, float, float]:
    return interval.low, interval.value, interval.high


def _headlines_of_training(records: Sequence[Record]) -> list[Headline]:
    train, validation = figures.history(records, "train"), figures.history(records, "validation")
    found = []
    if validation:
        best = max(validation, key=lambda record: (record.get("top1") or 0.0, -record["step"]))
        if best.get("top1") is not None:
            found.append(Headline("Best validation top-1", percent(best["top1"]), f"at step {best['step']:,}"))
        if validation[-1].get("top1") is not None:
            found.append(
                Headline("Last validation top-1", percent(validation[-1]["top1"]), f"at step {validation[-1]['step']:,}")
            )
    if train:
        last = train[-1]
        found.append(Headline("Optimizer steps", f"{last['step']:,}", f"epoch {last.get('epoch', 'unknown')}"))
        if last.get("loss") is not None:
            found.append(Headline("Last training loss", f"{last['loss']:.3f}", f"at step {last['step']:,}"))
    return found


def _pictures(records: Sequence[Record], scores: Scores | None) -> dict[str, Markup]:
    drawn: dict[str, tuple[Figure, str]] = {}
    if figures.drawable(records):
        chance = scores.chance.uniform if scores else None
        drawn["curves"] = figures.training_curves(records, chance=chance), "Training curves over optimizer steps"
    if scores:
        drawn["matrix"] = figures.confusion_matrix(scores), "Confusion matrix: rows are true classes, columns predicted ones"
        drawn["classes"] = figures.class_accuracy(scores), "Accuracy of classes with 95% intervals"
        drawn["reliability"] = figures.reliability(scores), "Accuracy against confidence"
    return inline(drawn)


def _rows(scores: Scores) -> list[ClassRow]:
    return [ClassRow(place + 1, scores.per_class[label]) for place, label in enumerate(figures.matrix_order(scores))]
