"""The page that reports are written on: one HTML file that needs nothing else.

Comes in: a template of this folder (it extends `page.html.j2`) and what it shows. Goes out: HTML with its style, script and
pictures inside. It asks the network for nothing (its own Content-Security-Policy forbids it), every name is escaped, only the
script that was shipped may run, and it follows the reader's light or dark mode.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from vidfuse.evaluate import drawing


class Headline(NamedTuple):
    """One figure at the top of a page."""

    name: str
    value: str
    note: str
    span: tuple[float, float, float] | None = None
    """Lower end, value and upper end of an interval, 0 to 1, to be drawn; `None`: no drawing."""
    mark: float | None = None
    """Chance, 0 to 1, to be marked in the drawing."""


def render(template: str, **content: Any) -> str:
    """Fill a template.

    Args:
        template: File name in this folder.
        content: What the template names; anything missing is an error.

    Returns:
        A whole HTML document.
    """
    script = _shipped("page.js.j2")
    environment = Environment(
        loader=FunctionLoader(_shipped), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, plural=plural)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**content, script=Markup(script), script_hash=digest)


def inline(drawn: Mapping[str, tuple[Figure, str]]) -> dict[str, Markup]:
    """Figures as elements of a page: by name, each with what a screen reader says."""
    return {  # safe as markup: matplotlib escapes text, labels are ours
        name: Markup(drawing.inline_svg(figure, name, label=label)) for name, (figure, label) in drawn.items()
    }


def percent(share: float, decimals: int = 1) -> str:
    """0.8125 as `81.2%`."""
    return f"{100 * share:.{decimals}f}%"


def plural(count: int, one: str, many: str = "") -> str:
    """`1 video`, `2 videos`, `12,000 videos`."""
    return f"{count:,}\u00a0{one if count == 1 else many or one + 's'}"


def _shipped(name: str) -> str:
    return (resources.files("vidfuse.evaluate") / name).read_text(encoding="utf-8")
