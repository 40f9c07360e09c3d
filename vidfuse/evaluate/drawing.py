"""How every picture of ours looks, and how it becomes bytes or a part of a page.

Comes in: a matplotlib `Figure` made by `canvas` under `STYLE`. Goes out: `png` bytes, a stand-alone `svg`, or an `inline_svg` whose
colours are the CSS variables of the page around it (so it follows dark mode).

Nothing here touches pyplot or its global state. Names are drawn as given: no mathtext, no line breaks, and shortened where they
are long. Colours are the colour-blind-safe ones of Okabe & Ito, *Color Universal Design* (2008).
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

SURFACE, INK, MUTED, GRID = "#ffffff", "#1f2429", "#626c77", "#dfe3e8"
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#a8518a"
VARIABLES = {SURFACE: "surface", INK: "ink", MUTED: "muted", GRID: "grid", BLUE: "blue", VERMILLION: "vermillion"}
"""Colours that `inline_svg` turns into CSS variables (`--ink` and so on); without the variable the colour stays."""

WIDTH_INCHES = 10.4
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9.0, "svg.fonttype": "none", "svg.hashsalt": "vidfuse", "svg.image_inline": True,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID, "axes.facecolor": "none", "axes.titlesize": 10.0,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.labelsize": 9.0,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID,
    "grid.linewidth": 0.8, "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round", "legend.frameon": False, "legend.fontsize": 8.5, "figure.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
}  # fmt: skip


def canvas(height: float, *, width: float = WIDTH_INCHES) -> Figure:
    """An empty figure of so many inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure, *, dpi: int = 144) -> bytes:
    """Render to PNG bytes, `dpi` pixels an inch."""
    return _save(figure, "png", dpi=dpi)


def svg(figure: Figure) -> str:
    """Render to a stand-alone SVG document: text is text, images are inside, no date (the same figure is the same bytes)."""
    return _save(figure, "svg").decode("utf-8")


def inline_svg(figure: Figure, name: str, *, label: str) -> str:
    """Render to an `<svg>` element for an HTML page.

    Colours become `var(--ink, #...)` and so on, ids are prefixed (several figures share a page), width follows the page.

    Args:
        figure: What to draw.
        name: Prefix of ids, distinct within a page: letters, digits, `-`.
        label: What a screen reader says.

    Raises:
        ValueError: a name that cannot be part of an id.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
        raise ValueError(f"name becomes part of ids: a letter, then letters, digits or '-'; given {name!r}")
    text = svg(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = _in_tags(text, lambda tag: _themed(re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", tag)))
    width, height = (float(side) for side in re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2])
    head = (
        f'<svg role="img" aria-label="{_attribute(label)}" viewBox="0 0 {width:g} {height:g}" style="max-width: {width:g}pt">'
    )
    return head + text[text.index(">") + 1 :]


def shorten(name: str, most: int) -> str:
    """One line of at most `most` characters: white space and control characters become a space, the middle an ellipsis."""
    line = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    if len(line) <= most:
        return line
    tail = (most - 1) // 2
    return f"{line[: most - 1 - tail].rstrip()}…{line[-tail:].lstrip()}"


def plain(labels: Iterable[Text], colour: str) -> None:
    """Have texts drawn as they are, in a colour."""
    for text in labels:
        text.set_parse_math(False)
        text.set_color(colour)


def _save(figure: Figure, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's font has it
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None, **options)
    return out.getvalue()


def _in_tags(text: str, change: Any) -> str:
    return re.sub(r"<[^>]*>", lambda match: change(match.group()), text)


def _themed(tag: str) -> str:
    for colour, variable in VARIABLES.items():
        tag = tag.replace(colour, f"var(--{variable}, {colour})")
    return tag


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
