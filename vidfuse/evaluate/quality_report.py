"""quality.html: what a packed set is made of and what is wrong with it, for reading.

Comes in: the content of `quality.json` (`data.survey.Survey`) and small pictures of the videos that are shown. Goes out: a `page`.
Of long lists the page shows a beginning and says how long they are; `quality.json` has all of it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml
from markupsafe import Markup

from vidfuse.evaluate import quality_figures
from vidfuse.evaluate.page import Headline, inline, percent, plural, render
from vidfuse.evaluate.quality_figures import TITLES, Content

SHOWN = 24
"""Videos of a list that are shown with pictures."""
LISTED = 400
"""Rows of a table that has no pictures."""
KINDS = {
    "unreadable": (
        "Unreadable videos",
        "They do not decode: training would leave them out, evaluation would count them as wrong.",
    ),
    "black": ("Black videos", "Dark, and without contrast in any frame."),
    "flat": ("Videos of one colour", "Hardly any contrast inside a frame."),
    "static": ("Static videos", "Hardly any change from frame to frame."),
    "tiny": ("Tiny videos", "The shorter side is below what a clip needs."),
    "outlier": ("Outliers", "Far from the median of their split; a look at them shows whether they belong there."),
}
"""Headings and explanations of the kinds of flags, in the order of the page."""
_FACTS = {"codec": "Codec", "container": "Container", "pixel_format": "Pixel format", "size": "Size", "rotation": "Rotation"}


class Flagged(NamedTuple):
    """The flags of a kind: the first of them, and how many there are."""

    kind: str
    heading: str
    lead: str
    shown: list[Content]
    total: int


def shown_videos(content: Content) -> dict[str, set[str]]:
    """Keys of the videos of which the page shows a picture, by shard."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for flagged in _flagged(content):
        for flag in flagged.shown:
            wanted[flag["shard"]].add(flag["key"])
    for pair in content["leaks"][:SHOWN]:
        for place in (pair["video"], pair["duplicate"]):
            wanted[place["shard"]].add(place["key"])
    for group in content["repeats"][:SHOWN]:
        for shard, key in zip(group["shards"][:2], group["keys"][:2], strict=True):
            wanted[shard].add(key)
    return dict(wanted)


def quality_report(content: Content, *, pictures: Mapping[tuple[str, str], str], facts: Mapping[str, str]) -> str:
    """Write the report of a packed set.

    Args:
        content: Of `quality.json`.
        pictures: JPEGs in base64, by shard and key; videos without one are shown by name alone.
        facts: What else the reader must know, in this order.

    Returns:
        A whole HTML document.
    """
    drawn = {}
    if any(split["measures"] for split in content["splits"].values()):
        drawn["spreads"] = quality_figures.spreads(content), "Histograms of the measures of videos, by split"
    if any(split["balance"] for split in content["splits"].values()):
        drawn["classes"] = quality_figures.class_sizes(content), "Videos of each class, by split"
    return render(
        "quality.html.j2",
        title=f"{content['dataset']}: the packed set",
        content=content,
        headlines=_headlines(content),
        drawn=inline(drawn),
        flagged=_flagged(content),
        pictures={where: Markup(f"data:image/jpeg;base64,{picture}") for where, picture in pictures.items()},  # base64 is safe
        measures=TITLES,
        kinds=_FACTS,
        class_rows=_class_rows(content),
        thresholds=yaml.safe_dump({"quality": content["thresholds"]}, sort_keys=False),
        facts={**facts, "frames looked at": f"{content['frames']} of each video"},
        shown=SHOWN,
        listed=LISTED,
    )


def _headlines(content: Content) -> list[Headline]:
    splits = content["splits"].values()
    samples = sum(split["samples"] for split in splits)
    by_split = ", ".join(f"{name} {split['samples']:,}" for name, split in content["splits"].items())
    hours, gigabytes = sum(split["hours"] for split in splits), sum(split["bytes"] for split in splits) / 1e9
    flaws = Counter(flag["kind"] for flag in content["flags"])
    outliers = flaws.pop("outlier", 0)
    repeated = sum(len(group["keys"]) - 1 for group in content["repeats"])
    told = ", ".join(f"{count:,} {kind}" for kind, count in flaws.items()) or "none"
    found = [
        Headline("Videos", f"{samples:,}", by_split),
        Headline("Hours", f"{hours:,.1f}" if hours >= 1 else f"{hours:.3f}", f"{gigabytes:,.2f} GB of videos"),
        Headline("Flawed videos", f"{flaws.total():,}", f"{told}; besides {plural(outliers, 'outlier')}"),
        Headline(
            "Leaks",
            f"{len(content['leaks']):,}",
            f"duplicates across splits; inside splits {plural(repeated, 'repeated video')}",
        ),
    ]
    train = content["splits"].get("train", {}).get("balance")
    if train:
        of = f"of {plural(len(content['classes']), 'class', 'classes')} in train; largest : smallest {train['imbalance']:.3g}"
        found.append(Headline("Effective classes", f"{train['effective_classes']:.1f}", of))
    left_out = len(content["quarantined"])
    found.append(Headline("Left out when packed", f"{left_out:,}", f"{percent(left_out / (samples + left_out))} of the source"))
    return found


def _flagged(content: Content) -> list[Flagged]:
    by_kind: dict[str, list[Content]] = defaultdict(list)
    for flag in content["flags"]:
        by_kind[flag["kind"]].append(flag)
    return [
        Flagged(kind, heading, lead, by_kind[kind][:SHOWN], len(by_kind[kind]))
        for kind, (heading, lead) in KINDS.items()
        if by_kind[kind]
    ]


def _class_rows(content: Content) -> list[tuple[str, list[Any]]]:
    """Each class with its videos in each labelled split."""
    balances = [split["balance"] for split in content["splits"].values() if split["balance"]]
    return [(name, [balance["videos"][label] for balance in balances]) for label, name in enumerate(content["classes"])]
