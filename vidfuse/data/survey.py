"""A whole set in numbers, and what is wrong with it: the tables of `quality`, judged by a `QualityConfig`.

Comes in: the rows of all shards, by split, and the set's manifest and quarantine. Goes out: a `Survey`, which is what
`quality.json` holds. Nothing is read here; other thresholds can be tried on the same tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidfuse.config import QualityConfig
from vidfuse.data import copies
from vidfuse.data.copies import Pair, Repeats
from vidfuse.data.shards import Frozen, Manifest, Quarantined
from vidfuse.data.templates import ObjectFacts, object_facts

MEASURES = ("duration", "fps", "frames", "short_side", "bytes", "brightness", "contrast", "sharpness", "motion")
"""Numbers of a video that are told as spreads. Seconds, frames, pixels, bytes, luma."""
KINDS = ("codec", "container", "pixel_format", "size", "rotation")
"""Facts of a video that are counted by value."""
VARIABLE_SPREAD = 0.25
"""`interval_spread` above which a video's frame rate is variable."""
BINS = 31
_TAIL = 0.5
"""Per cent of all videos beyond each end of a histogram; they are counted in its outermost bins."""
_OUTLIERS = {"duration": 0.1, "brightness": 8.0, "contrast": 0.1, "sharpness": 0.1, "motion": 0.1}
"""Measures whose outliers are listed, and the least deviation taken as one. All but brightness are compared as logarithms."""

Numbers = npt.NDArray[np.float64]


class Spread(Frozen):
    """How a measure is spread over the readable videos of a split."""

    mean: float
    least: float
    p5: float
    """5 % of the videos are below."""
    median: float
    p95: float
    most: float
    edges: tuple[float, ...]
    """Of the histogram, the same for all splits; 0.5 % of all videos at each end are counted in the outermost bins."""
    counts: tuple[int, ...]
    """Videos of each bin."""


class Balance(Frozen):
    """How the labelled videos of a split are shared out over the classes."""

    videos: tuple[int, ...]
    """Of each class, in the order of the classes."""
    largest: int
    smallest: int
    """Videos of the smallest class that has any."""
    imbalance: float
    """Largest / smallest."""
    entropy_bits: float
    effective_classes: float
    """2 to the entropy: so many equally large classes are as uncertain."""
    missing: tuple[str, ...]
    """Classes without a video."""


class SplitFacts(Frozen):
    """A split."""

    samples: int
    unreadable: int
    quarantined: int
    """Videos that packing left out."""
    bytes: int
    """Of the videos."""
    hours: float
    with_audio: int
    variable_frame_rate: int
    """Videos whose times between frames differ (`interval_spread`) by more than a quarter of the median."""
    rotated: int
    """Videos with rotation metadata."""
    measures: dict[str, Spread]
    """By the names of `MEASURES`; empty where no video is readable."""
    kinds: dict[str, dict[str, int]]
    """Videos by value of each of `KINDS`, most frequent first; `size` is width x height."""
    balance: Balance | None
    """`None`: the split has no labels."""


class Flag(Frozen):
    """Something about a video."""

    kind: str
    """`unreadable`, `black`, `flat` (of one colour), `static`, `tiny`, or `outlier`."""
    split: str
    shard: str
    key: str
    measure: str
    """What was measured; empty for `unreadable`."""
    value: float | None
    reason: str


class Broken(Frozen):
    """A threshold that the set does not keep."""

    threshold: str
    """Field of the section `quality`."""
    allowed: float
    found: float
    line: str
    """In words."""


class Survey(Frozen):
    """`quality.json`: what a packed set is and what is wrong with it."""

    format: int = 1
    dataset: str
    version: str
    """The manifest's."""
    frames: int
    """Frames of a video that were looked at."""
    thresholds: QualityConfig
    classes: tuple[str, ...]
    poor_classes: tuple[str, ...]
    """Classes with fewer training videos than `min_class_samples`."""
    splits: dict[str, SplitFacts]
    flags: tuple[Flag, ...]
    """Split by split and kind by kind, in the order of the shards."""
    leaks: tuple[Pair, ...]
    """Each video of a later split (not `train`, or not the first) with its nearest duplicate in another split."""
    repeats: tuple[Repeats, ...]
    """Groups of duplicates inside a split."""
    objects: ObjectFacts | None
    """`None`: the classes are no templates."""
    quarantined: tuple[Quarantined, ...]
    altered: tuple[str, ...]
    """Shards whose bytes are not the manifest's; `jobs.check` tells more."""
    broken: tuple[Broken, ...]
    """In the order of the config."""


def survey(
    tables: Mapping[str, pa.Table],
    manifest: Manifest,
    quarantined: Sequence[Quarantined],
    config: QualityConfig,
    *,
    frames: int,
    altered: Sequence[str] = (),
) -> Survey:
    """Judge a set.

    Args:
        tables: Rows of `quality.SCHEMA` (without pictures), by split.
        manifest: Of the set.
        quarantined: Videos that packing left out.
        config: What counts as a flaw, and thresholds.
        frames: How many frames of a video were looked at.
        altered: Shards whose bytes are not the manifest's.
    """
    columns = {split: _columns(table) for split, table in tables.items()}
    edges = _edges(list(columns.values()))
    lost = Counter(video.split for video in quarantined)
    facts = {split: _split_facts(c, edges, classes=manifest.classes, quarantined=lost[split]) for split, c in columns.items()}
    leaks, repeats = copies.find(columns, config, frames)
    train = facts["train"].balance if "train" in facts else None
    poor = (
        [name for name, n in zip(manifest.classes, train.videos, strict=True) if n < config.min_class_samples] if train else []
    )
    sentences = {
        split: [
            entry for entry in zip(c["label"].tolist(), c["text"], c["placeholders"], strict=True) if entry[0] >= 0 and entry[1]
        ]
        for split, c in columns.items()
    }
    found = Survey(
        dataset=manifest.dataset,
        version=manifest.version,
        frames=frames,
        thresholds=config,
        classes=manifest.classes,
        poor_classes=tuple(poor),
        splits=facts,
        flags=tuple(flag for split, c in columns.items() for flag in _flags(split, c, config)),
        leaks=leaks,
        repeats=repeats,
        objects=object_facts(manifest.classes, {split: entries for split, entries in sentences.items() if entries}),
        quarantined=tuple(quarantined),
        altered=tuple(altered),
        broken=(),
    )
    return found.model_copy(update={"broken": tuple(_broken(found))})


# --- facts ---


def _columns(table: pa.Table) -> dict[str, Any]:
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names if name != "hashes"}
    columns["hashes"] = table["hashes"]
    columns["readable"] = columns["error"] == ""
    columns["short_side"] = np.minimum(columns["width"], columns["height"])
    return columns


def _edges(splits: Sequence[Mapping[str, Any]]) -> dict[str, Numbers]:
    edges = {}
    for name in MEASURES:
        values = np.concatenate([c[name][c["readable"]].astype(np.float64) for c in splits])
        if len(values):
            low, high = np.percentile(values, [_TAIL, 100 - _TAIL])
            low, high = (low, high) if high > low else (low - 0.5, low + 0.5)
            edges[name] = np.linspace(low, high, BINS + 1)
    return edges


def _split_facts(
    columns: Mapping[str, Any], edges: Mapping[str, Numbers], *, classes: Sequence[str], quarantined: int
) -> SplitFacts:
    readable = columns["readable"]
    chosen = {name: columns[name][readable] for name in (*MEASURES, *KINDS[:3], "rotation", "width", "height")}
    sizes = [f"{int(w)} x {int(h)}" for w, h in zip(chosen["width"], chosen["height"], strict=True)]
    kinds = {
        **{name: list(chosen[name]) for name in KINDS[:3]},
        "size": sizes,
        "rotation": [str(int(r)) for r in chosen["rotation"]],
    }
    return SplitFacts(
        samples=len(readable),
        unreadable=int((~readable).sum()),
        quarantined=quarantined,
        bytes=int(np.nansum(columns["bytes"].astype(np.float64))),
        hours=float(chosen["duration"].sum(dtype=np.float64) / 3600),
        with_audio=int((columns["audio_tracks"][readable] > 0).sum()),
        variable_frame_rate=int((columns["interval_spread"][readable] > VARIABLE_SPREAD).sum()),
        rotated=int((chosen["rotation"] != 0).sum()),
        measures={name: _spread(chosen[name].astype(np.float64), edges[name]) for name in MEASURES} if readable.any() else {},
        kinds={name: dict(Counter(values).most_common()) for name, values in kinds.items()},
        balance=_balance(columns["label"], classes),
    )


def _spread(values: Numbers, edges: Numbers) -> Spread:
    least, p5, median, p95, most = np.percentile(values, [0, 5, 50, 95, 100]).tolist()
    counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0]
    return Spread(
        mean=float(values.mean()),
        least=least,
        p5=p5,
        median=median,
        p95=p95,
        most=most,
        edges=tuple(edges.tolist()),
        counts=tuple(counts.tolist()),
    )


def _balance(labels: npt.NDArray[np.int32], classes: Sequence[str]) -> Balance | None:
    labels = labels[(labels >= 0) & (labels < len(classes))]
    if not len(labels):
        return None
    videos = np.bincount(labels, minlength=len(classes))
    there = videos[videos > 0]
    share = there / there.sum()
    entropy = float(-(share * np.log2(share)).sum())
    return Balance(
        videos=tuple(videos.tolist()),
        largest=int(there.max()),
        smallest=int(there.min()),
        imbalance=float(there.max() / there.min()),
        entropy_bits=entropy,
        effective_classes=2**entropy,
        missing=tuple(name for name, count in zip(classes, videos, strict=True) if not count),
    )


# --- flaws ---


def _flags(split: str, columns: Mapping[str, Any], config: QualityConfig) -> Iterator[Flag]:
    def flag(row: int, kind: str, measure: str, reason: str) -> Flag:
        value = float(columns[measure][row]) if measure else None
        where = {"split": split, "shard": columns["shard"][row], "key": columns["key"][row]}
        return Flag(kind=kind, measure=measure, value=value, reason=reason, **where)

    readable = columns["readable"]
    for row in np.flatnonzero(~readable).tolist():
        yield flag(row, "unreadable", "", columns["error"][row])
    with np.errstate(invalid="ignore"):
        flat = readable & (columns["contrast"] <= config.flat_contrast)
        black = flat & (columns["brightness"] <= config.black_luma)
        static = readable & ~flat & (columns["motion"] <= config.static_motion)
        tiny = readable & (columns["short_side"] < config.least_side)
    for row in np.flatnonzero(black).tolist():
        yield flag(row, "black", "brightness", f"mean luma {columns['brightness'][row]:.1f}")
    for row in np.flatnonzero(flat & ~black).tolist():
        yield flag(row, "flat", "contrast", f"luma deviates by {columns['contrast'][row]:.1f} inside a frame")
    for row in np.flatnonzero(static).tolist():
        yield flag(row, "static", "motion", f"luma changes by {columns['motion'][row]:.2f} from frame to frame")
    for row in np.flatnonzero(tiny).tolist():
        size = f"{int(columns['width'][row])} x {int(columns['height'][row])}"
        yield flag(row, "tiny", "short_side", f"{size} pixels")
    rest = np.flatnonzero(readable & ~flat & ~static & ~tiny)
    for name, least in _OUTLIERS.items():
        deviations, median = _deviations(columns[name][rest].astype(np.float64), least, logarithm=name != "brightness")
        for row in rest[np.abs(deviations) > config.outlier_deviations].tolist():
            yield flag(row, "outlier", name, f"{name} {columns[name][row]:.4g}, median {median:.4g}")


def _deviations(values: Numbers, least: float, *, logarithm: bool) -> tuple[Numbers, float]:
    """Robust standard deviations from the median, and the median."""
    if not len(values):
        return values, 0.0
    scaled = np.log(np.maximum(values, 1e-2)) if logarithm else values
    distance = scaled - np.median(scaled)
    return distance / max(1.4826 * float(np.median(np.abs(distance))), least), float(np.median(values))


# --- thresholds ---


def _broken(found: Survey) -> Iterator[Broken]:
    config = found.thresholds
    kinds = Counter(flag.kind for flag in found.flags)
    samples = sum(facts.samples for facts in found.splits.values())
    readable = max(samples - kinds["unreadable"], 1)
    train = found.splits["train"].balance if "train" in found.splits else None
    left_out = len(found.quarantined)
    repeated = Counter[str]()
    for group in found.repeats:
        repeated[group.split] += len(group.keys) - 1
    worst = max(found.splits, key=lambda split: repeated[split] / found.splits[split].samples)
    held: list[tuple[str, float, str]] = [
        ("max_poor_classes", len(found.poor_classes), f"classes with fewer than {config.min_class_samples} training videos"),
        ("max_class_imbalance", train.imbalance if train else 1.0, "times as many training videos in the largest class"),
        ("max_unreadable_share", kinds["unreadable"] / samples, f"{kinds['unreadable']} of {samples} videos do not decode"),
        ("max_quarantined_share", left_out / (samples + left_out), f"{left_out} of the source's videos were left out"),
        ("max_cross_split_duplicates", len(found.leaks), "videos have a duplicate in another split"),
        (
            "max_duplicate_share",
            repeated[worst] / found.splits[worst].samples,
            f"{repeated[worst]} videos of {worst} repeat others",
        ),
        ("max_black_share", (kinds["black"] + kinds["flat"]) / readable, f"{kinds['black'] + kinds['flat']} are of one colour"),
        ("max_static_share", kinds["static"] / readable, f"{kinds['static']} videos are static"),
        ("max_tiny_share", kinds["tiny"] / readable, f"{kinds['tiny']} videos are below {config.least_side} pixels"),
    ]
    if found.objects is not None:
        unseen = found.objects.unseen_share
        held.append(("max_unseen_object_share", unseen, f"{len(found.objects.unseen)} objects of validation are not in train"))
    for name, value, words in held:
        allowed = getattr(config, name)
        if allowed is not None and value > allowed:
            told = str(value) if isinstance(value, int) else f"{value:.4g}"
            line = f"quality.{name}: {told} is more than {allowed:g} ({words})"
            yield Broken(threshold=name, allowed=allowed, found=value, line=line)
