"""How good a recogniser is: one pass over its logits gives every figure that a report shows.

Comes in: logits `[N, K]`, labels `[N]`, which videos were unreadable `[N]`, and the K class names.
Goes out: `Scores`, frozen and JSON-able: top-1, top-5, mean class accuracy, confusions and calibration, with 95 % intervals.

An unreadable video is a wrong answer in every figure and is never dropped, so `samples` is always N. Ties go to the class
with the lower index. Axis letters: N videos, V views of a video, K classes.

Sources: Wilson, *Probable inference*, JASA 22 (1927), for intervals of proportions; Zou, Huang & Zhang, *A note on confidence
interval estimation for a linear function of binomial proportions*, CSDA 53 (2009), for the mean over classes; Guo et al.,
*On calibration of modern neural networks*, ICML 2017, for the expected calibration error and its 15 bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Proportion:
    """A share of counted things, with its 95 % Wilson interval."""

    hits: int
    """How many are right."""
    total: int
    """Out of how many; at least 1."""

    def __post_init__(self) -> None:
        if not (self.total >= 1 and 0 <= self.hits <= self.total):
            raise ValueError(f"a proportion is 0 <= hits <= total with total >= 1, given {self.hits} of {self.total}")

    @property
    def value(self) -> float:
        """The share, 0 to 1."""
        return self.hits / self.total

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return wilson(self.hits, self.total)[0]

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return wilson(self.hits, self.total)[1]

    def to_json(self) -> Json:
        """The share, its interval and its counts."""
        return {"value": self.value, "low": self.low, "high": self.high, "hits": self.hits, "total": self.total}


@dataclass(frozen=True)
class MeanClassAccuracy:
    """The unweighted mean of the accuracies of the classes that occur, with a 95 % interval."""

    value: float
    """The mean, 0 to 1."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    classes: int
    """Classes that occur among the labels: those that the mean is over."""

    def to_json(self) -> Json:
        """The fields as they are."""
        return asdict(self)


@dataclass(frozen=True)
class Chance:
    """What two recognisers that look at nothing reach."""

    uniform: float
    """Top-1 of guessing every class equally often: 1 / K."""
    majority: float
    """Top-1 of always naming the most frequent class of these labels."""
    majority_class: str
    """That class."""

    @property
    def best(self) -> float:
        """The higher of the two: what top-1 has to beat."""
        return max(self.uniform, self.majority)

    def to_json(self) -> Json:
        """The fields as they are."""
        return asdict(self)


@dataclass(frozen=True)
class ClassScore:
    """One row of the per-class table."""

    name: str
    """The class."""
    samples: int
    """Videos of this class, unreadable ones included."""
    correct: int
    """Those of them whose top-1 answer is right."""
    unreadable: int
    """Those of them that could not be read."""
    accuracy: Proportion | None
    """`correct` of `samples`; `None` where the class has no video."""
    mistaken_for: str | None
    """The most frequent wrong answer; `None` where there is none."""
    mistaken_count: int
    """How often that answer was given."""

    def to_json(self) -> Json:
        """The fields, the accuracy with its interval."""
        return {**asdict(self), "accuracy": self.accuracy.to_json() if self.accuracy else None}


@dataclass(frozen=True)
class Confusion:
    """One class taken for another."""

    true_class: str
    """The class it was."""
    predicted_class: str
    """The class it was taken for."""
    count: int
    """Videos for which that happened."""
    samples: int
    """Videos of the true class, unreadable ones included."""

    @property
    def share(self) -> float:
        """Share of the true class's videos, 0 to 1."""
        return self.count / self.samples

    def to_json(self) -> Json:
        """The fields and the share."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class ReliabilityBin:
    """The videos whose confidence is in `(low, high]` (the first bin also holds 0)."""

    low: float
    """Lower edge of the bin."""
    high: float
    """Upper edge of the bin."""
    samples: int
    """Videos in the bin."""
    confidence: float | None
    """Their mean confidence; `None` in an empty bin."""
    accuracy: float | None
    """Their top-1; `None` in an empty bin."""


@dataclass(frozen=True)
class Calibration:
    """Whether confidence (the largest softmax probability) is the share of right answers.

    An unreadable video has the confidence of knowing nothing, 1 / K, and is wrong; the bins' samples sum to N.
    """

    ece: float
    """Expected calibration error: the mean distance of accuracy and confidence, over bins weighted by samples."""
    mean_confidence: float
    """Mean confidence over all videos."""
    bins: tuple[ReliabilityBin, ...]
    """Equally wide bins from 0 to 1."""

    def to_json(self) -> Json:
        """The fields as they are."""
        return {"ece": self.ece, "mean_confidence": self.mean_confidence, "bins": [asdict(b) for b in self.bins]}


@dataclass(frozen=True, eq=False)
class Scores:
    """Every figure of one evaluation."""

    classes: tuple[str, ...]
    """The K class names, by label."""
    samples: int
    """Videos scored, unreadable ones included: N."""
    unreadable: int
    """Videos that could not be read; each is a wrong answer."""
    top1: Proportion
    """Videos whose best answer is right."""
    top5: Proportion
    """Videos whose label is among the best `top5_k` answers."""
    top5_k: int
    """5, or K where there are fewer classes (then every readable video is a hit, and the figure says nothing)."""
    mean_class_accuracy: MeanClassAccuracy
    """Mean of the classes' accuracies, over the classes that occur."""
    chance: Chance
    """What looking at nothing reaches."""
    per_class: tuple[ClassScore, ...]
    """One row a class, by label."""
    confusion: NDArray[np.int64]
    """`[K, K]` counts of readable videos: row = true class, column = predicted class. Read-only."""
    unreadable_per_class: NDArray[np.int64]
    """`[K]` counts of unreadable videos by true class: the column that `confusion` lacks. Read-only."""
    worst_confusions: tuple[Confusion, ...]
    """The most frequent wrong answers: by count, then by share, then by label."""
    calibration: Calibration
    """Confidence against accuracy."""

    @property
    def top5_name(self) -> str:
        """What to call `top5`: `top-5`, or `top-3 of 3 classes` where it is no such thing."""
        return "top-5" if self.top5_k < len(self.classes) else f"top-{self.top5_k} of {len(self.classes)} classes"

    def to_json(self) -> Json:
        """Everything as dicts, lists, strings and finite numbers, ready for `json.dumps(..., allow_nan=False)`."""
        return {
            "samples": self.samples,
            "unreadable": self.unreadable,
            "top1": self.top1.to_json(),
            "top5": {**self.top5.to_json(), "k": self.top5_k},
            "mean_class_accuracy": self.mean_class_accuracy.to_json(),
            "chance": self.chance.to_json(),
            "calibration": self.calibration.to_json(),
            "worst_confusions": [pair.to_json() for pair in self.worst_confusions],
            "per_class": [row.to_json() for row in self.per_class],
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
            "unreadable_per_class": self.unreadable_per_class.tolist(),
        }


def wilson(hits: int, total: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion.

    Args:
        hits: Successes, 0 to `total`.
        total: Trials, at least 1.
        z: Standard normal quantile; the default gives 95 %.

    Returns:
        Lower and upper end, inside [0, 1] and around `hits / total`.

    Raises:
        ValueError: `total` below 1, or `hits` outside 0 to `total`.
    """
    if not (total >= 1 and 0 <= hits <= total):
        raise ValueError(f"an interval needs 0 <= hits <= total with total >= 1, given {hits} of {total}")
    p, shrink = hits / total, 1 + z * z / total
    centre = (p + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return (0.0 if hits == 0 else max(0.0, centre - half)), (1.0 if hits == total else min(1.0, centre + half))


def average_views(
    logits: ArrayLike, *, mean: Literal["probabilities", "logits"] = "probabilities", present: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Join the views of each video into one row of logits.

    `probabilities` averages the views' softmax, as the multi-view protocols of TSN, SlowFast and VideoMAE do: a view votes
    with at most one vote, and one that is sure outweighs ones that are not. The result is the logarithm of that mean, so its
    softmax is the mean probability. `logits` averages before the softmax (a geometric mean of probabilities): a view with a
    large logit range can outvote the rest.

    Args:
        logits: `[N, V, K]`.
        mean: What is averaged.
        present: `[N, V]` bool, the views that there are; absent ones may hold anything. `None`: all.

    Returns:
        `[N, K]` logits for `scores`. A video without any view is a row of NaN, which `scores` refuses unless it is marked
        unreadable.

    Raises:
        ValueError: wrong shapes, an unknown `mean`, or a view that is present and not finite.
    """
    views = np.asarray(logits, dtype=np.float64)
    if views.ndim != 3 or views.shape[1] == 0:
        raise ValueError(
            f"logits of views are [N, V, K] with V >= 1, given shape {views.shape}; a single view is logits[:, None]"
        )
    if mean not in ("probabilities", "logits"):
        raise ValueError(f"mean is 'probabilities' or 'logits', given {mean!r}")
    mask = np.ones(views.shape[:2], dtype=bool) if present is None else np.asarray(present)
    if mask.shape != views.shape[:2] or mask.dtype != np.bool_:
        raise ValueError(f"present is bool {views.shape[:2]} beside logits {views.shape}, given {mask.dtype} {mask.shape}")
    _refuse_not_finite(views, mask, "view (video, view)")
    views = np.where(mask[..., None], views, 0.0)
    count = mask.sum(axis=1)[:, None].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # without a view: 0 / 0, or -inf + inf
        if mean == "logits":
            joined: NDArray[np.float64] = views.sum(axis=1) / count
        else:
            log_p = np.where(mask[..., None], _log_softmax(views), -np.inf)
            joined = np.logaddexp.reduce(log_p, axis=1) - np.log(count)
    return joined


def scores(
    logits: ArrayLike, labels: ArrayLike, unreadable: ArrayLike, classes: Sequence[str], *, bins: int = 15, worst: int = 50
) -> Scores:
    """Judge a recogniser's answers.

    Args:
        logits: `[N, K]` real numbers; the rows of unreadable videos are not looked at and may hold anything.
        labels: `[N]` integers, 0 to K - 1, known for unreadable videos too.
        unreadable: `[N]` bool.
        classes: K distinct names, by label.
        bins: Bins of the reliability data.
        worst: Longest list of confusions to keep.

    Raises:
        ValueError: no videos, fewer than two classes, repeated names, shapes that do not agree, a label outside the classes,
            or a logit of a readable video that is NaN or infinite.
    """
    names = _distinct(classes)
    rows, truth, lost = _checked(logits, labels, unreadable, len(names))
    rank = np.where(lost, len(names), _rank_of_truth(rows, truth))  # unreadable: behind every class
    k = min(5, len(names))
    readable = ~lost
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (truth[readable], rows[readable].argmax(axis=1)), 1)
    lost_per_class = np.bincount(truth[lost], minlength=len(names)).astype(np.int64)
    confusion.setflags(write=False)
    lost_per_class.setflags(write=False)
    per_class = tuple(_class_score(names, c, confusion[c], int(lost_per_class[c])) for c in range(len(names)))
    return Scores(
        classes=names,
        samples=len(truth),
        unreadable=int(lost.sum()),
        top1=Proportion(int((rank == 0).sum()), len(truth)),
        top5=Proportion(int((rank < k).sum()), len(truth)),
        top5_k=k,
        mean_class_accuracy=_mean_class_accuracy(per_class),
        chance=_chance(names, truth),
        per_class=per_class,
        confusion=confusion,
        unreadable_per_class=lost_per_class,
        worst_confusions=_worst_confusions(names, confusion, lost_per_class, worst),
        calibration=_calibration(rows, rank == 0, lost, bins),
    )


def _distinct(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(str(name) for name in classes)
    if len(names) < 2:
        raise ValueError(f"at least 2 classes are needed, given {len(names)}: {list(names)}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"class names must be distinct, {twice!r} is given {names.count(twice)} times")
    return names


def _checked(
    logits: ArrayLike, labels: ArrayLike, unreadable: ArrayLike, k: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.bool_]]:
    rows, truth, lost = np.asarray(logits, dtype=np.float64), np.asarray(labels), np.asarray(unreadable)
    if rows.ndim != 2 or rows.shape[1] != k:
        raise ValueError(f"logits are [N, {k}] for {k} classes, given shape {rows.shape}; join views with average_views first")
    n = len(rows)
    if n == 0:
        raise ValueError("no videos to score: logits have 0 rows; check the split's name and its manifest")
    if truth.shape != (n,) or not np.issubdtype(truth.dtype, np.integer):
        raise ValueError(f"labels are {n} integers for logits {rows.shape}, given {truth.dtype} {truth.shape}")
    if lost.shape != (n,) or lost.dtype != np.bool_:
        raise ValueError(f"unreadable is {n} bools for logits {rows.shape}, given {lost.dtype} {lost.shape}")
    if ((truth < 0) | (truth >= k)).any():
        at = int(np.flatnonzero((truth < 0) | (truth >= k))[0])
        raise ValueError(
            f"label {int(truth[at])} of video {at} is outside 0 to {k - 1}; is this the manifest of another data set?"
        )
    _refuse_not_finite(rows, ~lost, "video")
    return np.where(lost[:, None], 0.0, rows), truth.astype(np.int64), lost


def _refuse_not_finite(values: NDArray[np.float64], looked_at: NDArray[np.bool_], what: str) -> None:
    bad = looked_at & ~np.isfinite(values).all(axis=-1)
    if bad.any():
        at = ", ".join(str(int(i)) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"logits of {what} {at} hold NaN or infinity ({int(bad.sum())} such rows): the model has diverged or its precision "
            "overflowed; evaluate an earlier checkpoint or in fp32"
        )


def _log_softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = values - values.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _rank_of_truth(rows: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.int64]:
    own = rows[np.arange(len(rows)), truth][:, None]
    before = np.arange(rows.shape[1])[None, :] < truth[:, None]
    rank: NDArray[np.int64] = ((rows > own) | ((rows == own) & before)).sum(axis=1)
    return rank


def _class_score(names: tuple[str, ...], label: int, row: NDArray[np.int64], lost: int) -> ClassScore:
    wrong = row.copy()
    wrong[label] = 0
    other = int(wrong.argmax())
    samples, correct = int(row.sum()) + lost, int(row[label])
    return ClassScore(
        name=names[label],
        samples=samples,
        correct=correct,
        unreadable=lost,
        accuracy=Proportion(correct, samples) if samples else None,
        mistaken_for=names[other] if wrong[other] else None,
        mistaken_count=int(wrong[other]),
    )


def _mean_class_accuracy(rows: Sequence[ClassScore]) -> MeanClassAccuracy:
    parts = [row.accuracy for row in rows if row.accuracy]
    mean = sum(p.value for p in parts) / len(parts)
    below = math.sqrt(sum((p.value - p.low) ** 2 for p in parts)) / len(parts)
    above = math.sqrt(sum((p.high - p.value) ** 2 for p in parts)) / len(parts)
    return MeanClassAccuracy(mean, max(0.0, mean - below), min(1.0, mean + above), len(parts))


def _chance(names: tuple[str, ...], truth: NDArray[np.int64]) -> Chance:
    counts = np.bincount(truth, minlength=len(names))
    top = int(counts.argmax())
    return Chance(1 / len(names), int(counts[top]) / len(truth), names[top])


def _worst_confusions(
    names: tuple[str, ...], confusion: NDArray[np.int64], lost: NDArray[np.int64], limit: int
) -> tuple[Confusion, ...]:
    wrong = confusion - np.diag(np.diag(confusion))
    samples = confusion.sum(axis=1) + lost
    true, predicted = np.nonzero(wrong)
    count = wrong[true, predicted]
    order = np.lexsort((predicted, true, samples[true], -count))[:limit]  # of equal counts, fewer samples = a higher share
    return tuple(Confusion(names[true[i]], names[predicted[i]], int(count[i]), int(samples[true[i]])) for i in order)


def _calibration(rows: NDArray[np.float64], right: NDArray[np.bool_], lost: NDArray[np.bool_], bins: int) -> Calibration:
    if bins < 1:
        raise ValueError(f"reliability data need at least 1 bin, given {bins}")
    confidence = np.where(lost, 1 / rows.shape[1], np.exp(_log_softmax(rows).max(axis=1)))
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    table, ece = [], 0.0
    for b in range(bins):
        inside = index == b
        n = int(inside.sum())
        mean, share = (float(confidence[inside].mean()), float(right[inside].mean())) if n else (None, None)
        ece += abs(mean - share) * n / len(rows) if mean is not None and share is not None else 0.0
        table.append(ReliabilityBin(float(edges[b]), float(edges[b + 1]), n, mean, share))
    return Calibration(ece, float(confidence.mean()), tuple(table))
