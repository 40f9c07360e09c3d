"""Several trainings of each of several variants, side by side: a Markdown table and a picture with error bars.

Comes in: a figure of each training, by variant. Goes out: text and a matplotlib `Figure` (`drawing.png` renders it). The spread is the
sample standard deviation (n - 1) over trainings that differ by their seed alone, not an interval of the mean: with few seeds
it is itself uncertain, so every single figure is shown beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vidfuse.evaluate.drawing import BLUE, MUTED, STYLE, SURFACE, WIDTH_INCHES, canvas

MISSING = "-"
"""In a cell of the table for what there is not: no training yet, or no spread of a single one."""


@dataclass(frozen=True)
class Variant:
    """What was varied, and what came of it."""

    name: str
    trainable: int
    """Parameters that are trained."""
    values: tuple[float | None, ...]
    """The figure of each training, 0..1, in the order of the seeds; `None`: there is none (yet)."""

    @property
    def known(self) -> list[float]:
        """The figures there are."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Their mean."""
        return statistics.fmean(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """Their sample standard deviation; `None` of fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 else None


def markdown(variants: Sequence[Variant], *, figure: str, seeds: Sequence[int]) -> list[str]:
    """The lines of a table: a variant a row, in per cent.

    Args:
        variants: as they are to be listed.
        figure: what the values are, such as `top-1`.
        seeds: of the trainings.
    """
    head = (
        "variant",
        "trained parameters",
        f"{figure}, mean of seeds",
        "standard deviation",
        *(f"seed {seed}" for seed in seeds),
    )
    rows = [
        (_escaped(v.name), f"{v.trainable:,}", _percent(v.mean), _percent(v.spread), *(_percent(value) for value in v.values))
        for v in variants
    ]
    return [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *(_row(row) for row in rows)]


def picture(variants: Sequence[Variant], *, figure: str, chance: float | None = None) -> Figure:
    """Mean and standard deviation of each variant, with every training as a small ring.

    Args:
        variants: from top to bottom; one without figures keeps its line.
        figure: what the values are.
        chance: accuracy of guessing, drawn as a dotted line.
    """
    with mpl.rc_context(STYLE):
        made = canvas(0.42 * len(variants) + 1.0, width=WIDTH_INCHES * 0.75)
        axes = made.subplots()
        for place, variant in enumerate(variants):
            axes.plot(variant.known, [place] * len(variant.known), ls="", marker="o", ms=6, mfc="none", mec=MUTED)
            if variant.mean is not None:
                axes.errorbar(
                    variant.mean, place, xerr=variant.spread or 0.0, fmt="o", color=BLUE, mec=SURFACE, ms=7, capsize=4
                )
        axes.set_yticks(range(len(variants)), [v.name for v in variants], parse_math=False)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel(f"{figure}: mean and standard deviation over seeds; rings are single trainings", parse_math=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if chance is not None:
            axes.axvline(chance, color=MUTED, lw=1, ls=(0, (1, 2)))
            axes.set_xlabel(f"{axes.get_xlabel()}; dotted: guessing ({chance:.1%})", parse_math=False)
    return made


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", r"\|")
