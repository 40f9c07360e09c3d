"""Several trainings of each of several variants, side by side: a table as Markdown or LaTeX, and a picture with error bars.

Comes in: a figure of each training, by variant, and what the variants cost. Goes out: text and a matplotlib `Figure`
(`drawing.png` renders it). The spread is the sample standard deviation (n - 1) over trainings that differ by their seed alone, not
an interval of the mean: with few seeds it is itself uncertain, so every single figure is shown beside it.

Variants are compared with one of them, seed by seed, since a seed has the same order of clips and the same crops in each: a
two-sided paired t test, with Holm's correction for as many tests as there are (Holm 1979, A simple sequentially rejective multiple
test procedure, Scandinavian Journal of Statistics 6, 65-70). With few seeds such a test finds large differences alone; it takes
them to be normally distributed, which so few cannot show; and a large p is no sign of equality. Seeds differ, the videos that are
validated on stay: what other videos would give is not in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import sqrt

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy import stats

from vidfuse.evaluate.drawing import BLUE, MUTED, STYLE, SURFACE, WIDTH_INCHES, canvas

MISSING = "-"
"""In a cell of the table for what there is not: no training yet, or no test of so few."""
LEAST_PAIRS = 3
"""Seeds that two variants must share to be tested."""
SAME = 1e-9
"""Differences that vary by less do not vary."""
TEX = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"\textbar{}"},
    **{sign: f"${sign}$" for sign in "<>"},
    "±": r"$\pm$",
}
"""What has a meaning in LaTeX, or no shape in its default fonts, and how it is written."""


@dataclass(frozen=True)
class Variant:
    """What was varied, what came of it, and what it cost."""

    name: str
    values: tuple[float | None, ...]
    """The figure of each training, 0..1, in the order of the seeds; `None`: there is none (yet)."""
    trained: int
    """Parameters that are trained."""
    parameters: int
    """All parameters."""
    seconds: float | None = None
    """Training time, waiting for clips included, validation and checkpoints not; mean of the trainings."""
    clips_per_second: float | None = None
    """Mean of the trainings."""

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


@dataclass(frozen=True)
class Difference:
    """A variant less the reference, over the seeds that both have."""

    seeds: int
    """How many these are."""
    mean: float
    """Mean of the differences."""
    p: float | None
    """Of a two-sided paired t test. `None`: fewer than three seeds, or differences that are all the same."""
    corrected: float | None = None
    """`p` after Holm's correction."""


@dataclass(frozen=True)
class Table:
    """Variants as they are to be listed."""

    variants: Sequence[Variant]
    figure: str
    """What the values are, such as `top-1`."""
    seeds: Sequence[int]
    """Of the trainings."""
    reference: int = 0
    """Place of the variant that the others are compared with."""

    @property
    def differences(self) -> list[Difference | None]:
        """Of each variant to the reference; `None`: it is the reference, or they share no seed (yet)."""
        reference = self.variants[self.reference]
        found = [None if variant is reference else difference(variant, reference) for variant in self.variants]
        corrected = iter(holm([d.p for d in found if d is not None and d.p is not None]))
        return [d if d is None or d.p is None else replace(d, corrected=next(corrected)) for d in found]


def difference(variant: Variant, reference: Variant) -> Difference | None:
    """A variant less the reference, not corrected; `None`: they share no seed."""
    pairs = [(a, b) for a, b in zip(variant.values, reference.values, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    apart = [a - b for a, b in pairs]
    testable = len(pairs) >= LEAST_PAIRS and max(apart) - min(apart) > SAME
    p = float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue) if testable else None
    return Difference(len(pairs), statistics.fmean(apart), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values after Holm's correction, in the order given.

    The smallest is multiplied by how many there are, the next by one less, and so on; none becomes smaller than one before it.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def markdown(table: Table) -> list[str]:
    """The lines of a table: a variant a row, figures in per cent."""
    head, *rows = ([_piped(cell) for cell in row] for row in _cells(table))
    return [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *(_row(row) for row in rows)]


def latex(table: Table) -> list[str]:
    r"""The lines of the same table as a `tabular`; the document needs `\usepackage{booktabs}`."""
    head, *rows = (" & ".join(_tex(cell) for cell in row) + r" \\" for row in _cells(table))
    columns = "l" + "r" * (len(_cells(table)[0]) - 1)
    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule"]
    return [*lines, *rows, r"\bottomrule", r"\end{tabular}", ""]


def explained(table: Table) -> str:
    """What the columns are, and what the tests can tell; a paragraph to go with the table."""
    seeds, tests = len(table.seeds), sum(d is not None and d.p is not None for d in table.differences)
    said = (
        "±: sample standard deviation over seeds. Seconds are those of training steps, waiting for clips included, and depend on "
        f"the machine. Difference: mean over the seeds that both have, less {table.variants[table.reference].name}. "
    )
    if not tests:
        return said + f"A test of it takes {LEAST_PAIRS} seeds that differ."
    least = float(stats.t.ppf(0.975, seeds - 1)) / sqrt(seeds)
    return said + (
        f"p: two-sided paired t test over seeds, with Holm's correction for {tests} test{'s' if tests > 1 else ''}. With {seeds} "
        f"seeds a difference must be {least:.1f} times its own standard deviation to have p < 0.05 even before the correction: a large "
        "p is no sign of equality."
    )


def picture(variants: Sequence[Variant], *, figure: str, chance: float | None = None) -> Figure:
    """Mean and standard deviation of each variant, with every training as a small ring.

    Args:
        variants: from top to bottom; one without figures keeps its line.
        figure: what the values are.
        chance: accuracy of guessing, drawn as a dotted line.
    """
    with mpl.rc_context(STYLE):
        made = canvas(0.42 * len(variants) + 1.2, width=WIDTH_INCHES * 0.75)
        axes = made.subplots()
        for place, variant in enumerate(variants):
            axes.plot(variant.known, [place] * len(variant.known), ls="", marker="o", ms=6, mfc="none", mec=MUTED)
            if variant.mean is not None:
                axes.errorbar(
                    variant.mean, place, xerr=variant.spread or 0.0, fmt="o", color=BLUE, mec=SURFACE, ms=7, capsize=4
                )
        axes.set_yticks(range(len(variants)), [v.name for v in variants], parse_math=False)
        axes.set_ylim(len(variants) - 0.5, -0.5)
        label = f"{figure}: mean and standard deviation over seeds\nrings: single trainings"
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if chance is not None:
            axes.axvline(chance, color=MUTED, lw=1, ls=(0, (1, 2)))
            label += f"; dotted: guessing ({chance:.1%})"
        axes.set_xlabel(label, parse_math=False)
    return made


def _cells(table: Table) -> list[list[str]]:
    """The table as text, head first."""
    reference = table.variants[table.reference].name
    seeds = f"seed{'s' if len(table.seeds) > 1 else ''} {', '.join(str(seed) for seed in table.seeds)}"
    costs = ["trained parameters", "all parameters", "seconds", "clips/s"]
    head = ["variant", *costs, f"{table.figure}, mean ± s.d.", seeds, f"difference to {reference}", "p"]
    return [head, *(_figures(v, d) for v, d in zip(table.variants, table.differences, strict=True))]


def _figures(variant: Variant, apart: Difference | None) -> list[str]:
    spread = "" if variant.spread is None else f" ± {100 * variant.spread:.1f}"
    return [
        variant.name,
        f"{variant.trained:,}",
        f"{variant.parameters:,}",
        MISSING if variant.seconds is None else f"{variant.seconds:,.{0 if variant.seconds >= 10 else 1}f}",
        MISSING if variant.clips_per_second is None else f"{variant.clips_per_second:.1f}",
        f"{_percent(variant.mean)}{spread}",
        ", ".join(_percent(value) for value in variant.values),
        MISSING if apart is None else f"{round(100 * apart.mean, 1) + 0.0:+.1f}",
        MISSING if apart is None else _p(apart.corrected),
    ]


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _piped(text: str) -> str:
    return text.replace("|", r"\|")


def _tex(cell: str) -> str:
    """A cell of a table as LaTeX; a signed number with the sign of a formula."""
    text = "".join(TEX.get(sign, sign) for sign in cell)
    return f"${text}$" if cell[:1] in "+-" and cell[1:].replace(".", "").isdigit() else text
