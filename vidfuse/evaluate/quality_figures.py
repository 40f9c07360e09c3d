"""Pictures of a packed set: how measures are spread, how many videos classes have.

Comes in: the content of `quality.json` (`data.survey.Survey`). Goes out: matplotlib `Figure`s, which `drawing` renders. The splits
have colours of their own, in the order of the set: blue, vermillion, green.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, PercentFormatter

from vidfuse.evaluate.drawing import BLUE, GREEN, PURPLE, STYLE, VERMILLION, canvas

COLOURS = (BLUE, VERMILLION, GREEN, PURPLE)
TITLES = {
    "duration": "Duration, seconds",
    "fps": "Frames a second",
    "frames": "Frames",
    "short_side": "Shorter side, pixels",
    "bytes": "Size, bytes",
    "brightness": "Brightness, mean luma",
    "contrast": "Contrast, deviation of luma",
    "sharpness": "Sharpness, variance of Laplacian",
    "motion": "Motion, change of luma",
}
"""Measures in the order in which they are drawn and listed."""
_COLUMNS = 3

Content = Mapping[str, Any]


def spreads(content: Content) -> Figure:
    """A histogram of each measure, a line a split; shares of the split's readable videos."""
    with mpl.rc_context(STYLE):
        rows = math.ceil(len(TITLES) / _COLUMNS)
        figure = canvas(1.9 * rows + 0.3)
        grid = figure.subplots(rows, _COLUMNS, squeeze=False)
        for axes, name in zip(grid.flat, TITLES, strict=True):
            _histograms(axes, name, content)
        handles, labels = grid.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _histograms(axes: Axes, name: str, content: Content) -> None:
    axes.set_title(TITLES[name])
    for colour, (split, facts) in zip(COLOURS * len(content["splits"]), content["splits"].items(), strict=False):
        if name not in facts["measures"]:
            continue
        spread = facts["measures"][name]
        share = np.array(spread["counts"]) / max(sum(spread["counts"]), 1)
        axes.stairs(share, spread["edges"], color=colour, lw=1.6, label=split)
        axes.stairs(share, spread["edges"], color=colour, alpha=0.1, fill=True, lw=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(_short))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _short(value: float, _: int) -> str:
    return EngFormatter(sep="")(value) if value >= 1000 else f"{value:.4g}"


def class_sizes(content: Content) -> Figure:
    """Videos of each class, largest training class first, a line a split."""
    balances = {split: facts["balance"] for split, facts in content["splits"].items() if facts["balance"]}
    first = balances.get("train") or next(iter(balances.values()))
    order = np.argsort([-count for count in first["videos"]], kind="stable")
    with mpl.rc_context(STYLE):
        figure = canvas(2.9)
        axes = figure.subplots()
        edges = np.arange(len(order) + 1) + 0.5
        for colour, (split, balance) in zip(COLOURS * len(balances), balances.items(), strict=False):
            counts = np.array(balance["videos"])[order]
            axes.stairs(counts, edges, color=colour, lw=1.6, label=split)
            axes.stairs(counts, edges, color=colour, alpha=0.1, fill=True, lw=0)
        axes.set(xlim=(0.5, len(order) + 0.5), xlabel="class, largest first", ylabel="videos")
        axes.set_ylim(bottom=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
        figure.legend(loc="outside upper left", ncols=len(balances))
    return figure
