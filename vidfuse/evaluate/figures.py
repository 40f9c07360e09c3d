"""Pictures of a run: training curves, the confusion matrix, accuracies by class, reliability.

Comes in: the records of a run's `metrics.jsonl`, or `Scores`. Goes out: matplotlib `Figure`s, which `drawing` renders. Blue is right
or training, vermillion is wrong or validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from vidfuse.evaluate.drawing import BLUE, GRID, INK, MUTED, PURPLE, STYLE, SURFACE, VERMILLION, canvas, plain, shorten
from vidfuse.evaluate.metrics import ClassScore, Scores

Record = Mapping[str, Any]
Line = tuple[NDArray[np.float64], NDArray[np.float64]]


class Curve(NamedTuple):
    """One line of a panel."""

    kind: str
    """Kind of record that it is read from."""
    field: str
    """Field of the record."""
    label: str
    """What the legend calls it."""
    colour: str


class Panel(NamedTuple):
    """One small picture of the training curves, and how its y axis reads."""

    title: str
    curves: tuple[Curve, ...]
    axis: Literal["number", "log", "percent", "count"]


PANELS = (
    Panel("Loss", (Curve("train", "loss", "train", BLUE), Curve("validation", "loss", "validation", VERMILLION)), "number"),
    Panel(
        "Validation accuracy",
        (Curve("validation", "top1", "top-1", BLUE), Curve("validation", "top5", "top-5", VERMILLION)),
        "percent",
    ),
    Panel("Learning rate", (Curve("train", "learning_rate", "", BLUE),), "number"),
    Panel("Gradient norm", (Curve("train", "grad_norm", "", BLUE),), "log"),
    Panel("Throughput, clips a second", (Curve("train", "clips_per_second", "", BLUE),), "count"),
    Panel("Time spent waiting for data", (Curve("train", "data_wait_fraction", "", BLUE),), "percent"),
)
ACCURACY = PANELS[1]


def history(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of one kind that the final weights have behind them, by step.

    A run that was restored from a checkpoint repeats steps; of what was rolled back, nothing is left.

    Args:
        records: In the order in which they were written.
        kind: `train` or `validation`.

    Raises:
        ValueError: a record of either kind without a whole number `step`.
    """
    kept: list[Record] = []
    for record in records:
        if record.get("kind") not in ("train", "validation"):
            continue
        step = record.get("step")
        if not isinstance(step, int):
            raise ValueError(
                f"a {record['kind']} record needs an integer 'step', given {dict(record)!r}; is this a metrics.jsonl?"
            )
        while kept and kept[-1]["step"] > step:
            kept.pop()
        again = [r for r in kept[-2:] if (r["step"], r["kind"]) == (step, record["kind"])]
        kept = [r for r in kept if r is not again[0]] if again else kept
        kept.append(record)
    return [record for record in kept if record["kind"] == kind]


def drawable(records: Iterable[Record]) -> bool:
    """Whether `training_curves` has anything to draw."""
    return any(len(steps) for steps, _ in _lines(list(records)).values())


def training_curves(records: Sequence[Record], *, chance: float | None = None) -> Figure:
    """Loss, validation accuracy, learning rate, gradient norm, throughput and data wait over optimizer steps.

    A panel without any value is left out. Long series are thinned to bins: mean line over the bins' range.

    Args:
        records: Dicts as read from `metrics.jsonl`.
        chance: Top-1 of guessing, 0 to 1, drawn beside validation top-1.

    Raises:
        ValueError: no record has anything to draw.
    """
    lines = _lines(records)
    shown = [panel for panel in PANELS if any(len(lines[curve][0]) for curve in panel.curves)]
    if not shown:
        raise ValueError(f"none of {len(records)} records has a value to draw; a run writes 'train' and 'validation' records")
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    with mpl.rc_context(STYLE):
        figure = canvas(2.35 * rows)
        grid = figure.subplots(rows, columns, squeeze=False)
        last = max(steps.max() for steps, _ in lines.values() if len(steps))
        for at, axes in enumerate(grid.flat):
            if at < len(shown):
                _panel(axes, shown[at], lines, chance if shown[at] is ACCURACY else None)
                axes.set_xlim(0, max(last, 1) * 1.02)
                axes.set_xlabel("optimizer step" if at >= len(shown) - columns else "")
            else:
                axes.set_visible(False)
    return figure


def confusion_matrix(scores: Scores, *, order: Literal["given", "clustered"] | None = None) -> Figure:
    """Who is taken for whom: row = true class, column = predicted class, shade = share of the row.

    Up to 20 classes show counts, up to 60 show names (rows) and numbers (columns); beyond, only positions. Unreadable videos
    are a column of their own, drawn only where there are any.

    Args:
        scores: K classes.
        order: `given`: by label; `clustered`: classes that are taken for each other side by side. `None`: clustered where
            names no longer fit.

    Raises:
        ValueError: an unknown order.
    """
    k = len(scores.classes)
    index = matrix_order(scores, order)
    with mpl.rc_context(STYLE):
        named = k <= 60
        side = float(np.clip(k * (0.36 if k <= 20 else 0.2), 3.2, 8.0)) if named else 7.6
        figure = canvas(side + (1.0 if named else 0.9))
        axes = figure.add_subplot()
        _matrix_cells(axes, scores, index)
        _matrix_axes(axes, scores, index, named=named)
        _shade_legend(axes, side)
    return figure


def matrix_order(scores: Scores, order: Literal["given", "clustered"] | None = None) -> NDArray[np.int64]:
    """The labels in the order of the rows and columns that `confusion_matrix` draws.

    Args:
        scores: K classes.
        order: As for `confusion_matrix`.

    Returns:
        `[K]` labels, each once.

    Raises:
        ValueError: an unknown order.
    """
    if order not in ("given", "clustered", None):
        raise ValueError(f"order is 'given', 'clustered' or None, given {order!r}")
    by_label = order == "given" or (order is None and len(scores.classes) <= 60)
    return np.arange(len(scores.classes)) if by_label else clustered(scores.confusion)


def clustered(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """An order of classes in which those that are taken for each other are neighbours.

    Average linkage over 1 - (mean of the two directions' shares), leaves ordered optimally (Bar-Joseph et al. 2001).

    Args:
        confusion: `[K, K]` counts, row = true class.

    Returns:
        `[K]` labels, each once.
    """
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    distance = 1 - (share + share.T) / 2
    np.fill_diagonal(distance, 0)
    if len(confusion) < 3:
        return np.arange(len(confusion))
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True)).astype(np.int64)


def class_accuracy(scores: Scores, *, ends: int = 20) -> Figure:
    """Accuracy of each class with its 95 % interval, best first; of many classes the best and the worst.

    Args:
        scores: Classes without videos are left out.
        ends: With more than twice as many classes, this many best and as many worst are shown.
    """
    rows = sorted((r for r in scores.per_class if r.accuracy), key=lambda r: (-_value(r), -r.samples))
    if len(rows) > 2 * ends:
        groups = [(f"The best {ends} of {len(rows)} classes", rows[:ends]), (f"The worst {ends}", rows[-ends:])]
    else:
        groups = [("", rows)]
    with mpl.rc_context(STYLE):
        heights = [len(group) for _, group in groups]
        figure = canvas(0.225 * sum(heights) + 0.75 + 0.45 * (len(groups) - 1))
        panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
        for axes, (title, group) in zip(panels, groups, strict=True):
            _bars(axes, group, title)
            axes.axvline(scores.chance.uniform, color=MUTED, lw=1, ls=(0, (1, 2)))
        panels[-1].set_xlabel(f"accuracy with its 95% interval; dotted: guessing ({scores.chance.uniform:.1%})")
    return figure


def reliability(scores: Scores) -> Figure:
    """Accuracy against confidence in equally wide bins, and below how many videos each bin holds."""
    bins = [b for b in scores.calibration.bins if b.samples]
    width = scores.calibration.bins[0].high
    x = [(b.low + b.high) / 2 for b in bins]
    with mpl.rc_context(STYLE):
        figure = canvas(5.2, width=5.6)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.bar(x, [b.accuracy or 0.0 for b in bins], width * 0.9, color=BLUE, label="accuracy")
        for at, b in zip(x, bins, strict=True):
            top.plot([at - width * 0.45, at + width * 0.45], [b.confidence] * 2, color=VERMILLION, lw=2, solid_capstyle="butt")
        top.plot([], [], color=VERMILLION, lw=2, label="mean confidence")
        top.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=(0, (4, 3)), label="calibrated")
        top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of videos that are right")
        top.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, columnspacing=1.2)
        bottom.bar(x, [b.samples for b in bins], width * 0.9, color=MUTED)
        bottom.set(xlabel="confidence", ylabel="videos")
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for axis in (top.xaxis, top.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _lines(records: Sequence[Record]) -> dict[Curve, Line]:
    by_kind = {kind: history(records, kind) for kind in ("train", "validation")}
    return {curve: _series(by_kind[curve.kind], curve.field) for panel in PANELS for curve in panel.curves}


def _series(records: Sequence[Record], field: str) -> Line:
    found = [(r["step"], r[field]) for r in records if isinstance(r.get(field), int | float) and math.isfinite(r[field])]
    points = np.array(found, dtype=np.float64).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _panel(axes: Axes, panel: Panel, lines: Mapping[Curve, Line], chance: float | None) -> None:
    axes.set_title(panel.title)
    drawn = [(curve, lines[curve]) for curve in panel.curves if len(lines[curve][0])]
    for curve, line in drawn:
        (_points if curve.kind == "validation" else _curve)(axes, line, curve.colour, curve.label)
    if chance is not None:
        axes.axhline(chance, color=MUTED, lw=1, ls=(0, (1, 2)), label="chance")
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(loc="best")
    values = np.concatenate([line[1] for _, line in drawn])
    _y_axis(axes, panel.axis, float(values.min()), float(values.max()))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _y_axis(axes: Axes, kind: str, low: float, high: float) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
    if kind == "percent":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if high >= 0.08 else 1))
        axes.set_ylim(0, min(1.02, max(axes.get_ylim()[1], 0.01)))
    elif kind == "count":
        axes.set_ylim(bottom=0)
    elif kind == "log" and low > 0 and high / low > 3:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g}"))
        axes.yaxis.set_minor_locator(NullLocator())


def _points(axes: Axes, line: Line, colour: str, label: str) -> None:
    size = 5.0 if len(line[0]) <= 40 else 0.0
    axes.plot(*line, color=colour, marker="o", markersize=size, markeredgecolor=SURFACE, markeredgewidth=0.8, label=label)


def _curve(axes: Axes, line: Line, colour: str, label: str, *, most: int = 120) -> None:
    x, y = line
    if len(x) <= most:
        axes.plot(x, y, color=colour, label=label, marker="o" if len(x) == 1 else None)
        return
    parts = np.array_split(np.arange(len(x)), most)
    centre = [x[p].mean() for p in parts]
    axes.fill_between(centre, [y[p].min() for p in parts], [y[p].max() for p in parts], color=colour, alpha=0.18, lw=0)
    axes.plot(centre, [y[p].mean() for p in parts], color=colour, label=label)


def _matrix_cells(axes: Axes, scores: Scores, index: NDArray[np.int64]) -> None:
    k = len(index)
    counts = scores.confusion[np.ix_(index, index)]
    lost = scores.unreadable_per_class[index]
    total = np.maximum(counts.sum(axis=1) + lost, 1)
    shade = _shade(counts / total[:, None])
    pixels = _tint(np.where(np.eye(k, dtype=bool)[..., None], _rgb(BLUE), _rgb(VERMILLION)), shade)
    axes.imshow(pixels, interpolation="none", extent=(-0.5, k - 0.5, k - 0.5, -0.5), aspect="auto")
    right = k - 0.5
    if lost.any():
        gap, width = 0.02 * k + 0.1, max(1.0, 0.03 * k)
        right = k - 0.5 + gap + width
        column = _tint(np.broadcast_to(_rgb(PURPLE), (k, 1, 3)), _shade(lost / total)[:, None])
        axes.imshow(column, interpolation="none", extent=(right - width, right, k - 0.5, -0.5), aspect="auto")
        axes.text(right - width / 2, -0.5 - 0.012 * k, "unreadable", ha="center", va="bottom", fontsize=8, color=PURPLE)
    if k <= 20:
        for row, column_ in np.argwhere(counts):
            _count(axes, column_, row, int(counts[row, column_]), shade[row, column_])
        for row in np.flatnonzero(lost):
            _count(axes, right - width / 2, int(row), int(lost[row]), _shade(lost / total)[row])
    axes.set(xlim=(-0.5, right), ylim=(k - 0.5, -0.5))


def _count(axes: Axes, x: float, y: float, count: int, shade: float) -> None:
    axes.text(x, y, str(count), ha="center", va="center", fontsize=8.5, color="#fffffe" if shade > 0.6 else INK)


def _shade(share: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(share)  # 5 % of a row must be seen beside 90 %


def _tint(rgb: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.round(255 * np.concatenate([rgb, alpha[..., None]], axis=-1)).astype(np.uint8)


def _rgb(colour: str) -> NDArray[np.float64]:
    return np.array(mpl.colors.to_rgb(colour))


def _matrix_axes(axes: Axes, scores: Scores, index: NDArray[np.int64], *, named: bool) -> None:
    k = len(index)
    axes.grid(False)
    axes.set(xlabel="predicted class", ylabel="" if named else "true class")
    if not named:
        places = [0, *range(24, k, 25)]
        axes.set_xticks(places, [str(place + 1) for place in places])
        axes.set_yticks(places, [str(place + 1) for place in places])
        return
    names = [shorten(scores.classes[label], 44) for label in index]
    axes.set_xticks(range(k), [str(n + 1) if k <= 20 or n == 0 or n % 5 == 4 else "" for n in range(k)])
    axes.set_yticks(range(k), [f"{name}  {n + 1}" for n, name in enumerate(names)], fontsize=8.5 if k <= 40 else 7)
    for n, label in enumerate(index):
        if not scores.per_class[label].samples:
            axes.text(k / 2 - 0.5, n, "no videos of this class", ha="center", va="center", color=MUTED, fontsize=7.5)
    plain(axes.get_yticklabels(), INK)
    if k <= 40:
        axes.set_xticks(np.arange(0.5, k - 1), minor=True)
        axes.set_yticks(np.arange(0.5, k - 1), minor=True)
        axes.tick_params(which="minor", length=0)
        axes.grid(which="minor", color=GRID, lw=0.6)
        axes.set_axisbelow(False)


def _shade_legend(axes: Axes, side: float) -> None:
    ramp = _shade(np.linspace(0, 1, 64))[:, None]
    tall = min(1.0, 1.9 / side)
    inset = axes.inset_axes((1.03, 0.0, 0.045, tall))
    rgb = np.stack([np.broadcast_to(_rgb(BLUE), (64, 3)), np.broadcast_to(_rgb(VERMILLION), (64, 3))], axis=1)
    inset.imshow(_tint(rgb, ramp.repeat(2, axis=1)), origin="lower", aspect="auto", extent=(0, 2, 0, 1), interpolation="none")
    inset.set_xticks([0.5, 1.5], ["right", "wrong"], fontsize=8, rotation=90)
    inset.set_yticks([0, 0.25, 0.5, 1], ["0", "25%", "50%", "100%"], fontsize=8)
    inset.yaxis.tick_right()
    inset.grid(False)
    inset.set_title("share of row", fontsize=8, fontweight="normal", color=MUTED)


def _bars(axes: Axes, rows: Sequence[ClassScore], title: str) -> None:
    y = np.arange(len(rows))
    values = [_value(row) for row in rows]
    axes.barh(y, values, height=0.62, color=BLUE, alpha=0.22)
    ends = [(p.low, p.high) for p in (row.accuracy for row in rows) if p]
    axes.hlines(y, [low for low, _ in ends], [high for _, high in ends], color=BLUE, lw=1.8)
    axes.plot(values, y, "o", color=BLUE, markersize=5.5, markeredgecolor=SURFACE, markeredgewidth=0.8, clip_on=False)
    axes.set_yticks(y, [shorten(row.name, 52) for row in rows])
    plain(axes.get_yticklabels(), INK)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.4, -0.6), title=title)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    for at, row in enumerate(rows):
        axes.text(1.012, at, f"{row.correct} of {row.samples}", va="center", fontsize=8, color=MUTED)


def _value(row: ClassScore) -> float:
    return row.accuracy.value if row.accuracy else 0.0
