"""The named tables of ablations: rows of changes to a base config.

Comes in: the base config. Goes out: the rows of a table, each a name and what it changes, as `--set` does; or a ConfigError that
says which base the table is for. Everything that a row does not name is the base's: data, epochs, batches, seeds. A row that
changes nothing is the base itself; the others are compared with it (`ablations.plan`).

A row that takes another component keeps of the former one its options as far as both have them, whether it is frozen and
pretrained, adapters, LoRA, grid, and when it is trained. Where a row may be larger than the base, `model.max_trainable_parameters`
is lifted, since the table tells the parameters of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tuning.options import HEADS, exchange_width, in_effect
from vidfuse.config import Config, ConfigError, Option, Stream
from vidfuse.models import select
from vidfuse.models.exchange import READERS

SHARES: Mapping[str, float] = {"eighth": 1 / 8, "quarter": 1 / 4, "half": 1 / 2, "whole": 1.0}
"""Widths of a bottleneck, as shares of the wider stream's."""
VITS: Mapping[str, Mapping[str, str]] = {
    "dinov2": {"s": "vits14", "b": "vitb14", "l": "vitl14", "g": "vitg14"},
    "dinov3": {"s": "vits16", "b": "vitb16", "l": "vitl16", "h": "vith16plus"},
    "clip": {"b": "vitb16", "l": "vitl14"},
    "vit": {"s": "vits16", "b": "vitb16", "l": "vitl16"},
}
"""Variants of `semantic`, by the letter of their size."""
LETTERS = "sblhg"
"""Sizes in order."""
TILES = 112
"""Pixels that patches of 14 and of 16 both tile: their least common multiple."""
CONVOLUTIONAL = ("i3d", "r3d", "r2plus1d", "c3d")
"""Backbones of `motion`."""


@dataclass(frozen=True)
class Row:
    """A variant: its name and what it changes of the base, as `--set` does."""

    name: str
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"a row's name becomes a run's: letters, digits, '.', '_' and '-', given {self.name!r}")


Table = Callable[[Config], tuple[Row, ...]]
TABLES: dict[str, Table] = {}


def table(make: Table) -> Table:
    """Register a table under its function's name; the function takes the base config."""
    TABLES[make.__name__] = make
    return make


@table
def fusion(base: Config) -> tuple[Row, ...]:
    """How two streams are joined, and what each is worth alone.

    A base whose fusion is another one is the first row. Sums, gated or not, are as wide as the base's fusion. One stream alone
    is `concat` without the other: layer norm of the mean token, and the head.

    Raises:
        ConfigError: the base has one stream.
    """
    lacking = [name for name in ("semantic", "motion") if getattr(base.model, name) is None]
    if lacking:
        raise ConfigError(f"--table fusion compares joining two streams, but model.{lacking[0]} is null: take a base with both")
    own, width = base.model.fusion.name, base.model.fusion.options.get("width", 512)
    return (
        *(() if own in ("cross_attention", "concat", "elementwise", "gated") else (Row(own),)),
        Row("cross_attention", ("model.fusion.name=cross_attention",)),
        Row("concat", ("model.fusion.name=concat",)),
        Row("sum", ("model.fusion.name=elementwise", "model.fusion.operation=sum", f"model.fusion.width={width}")),
        Row("gated", ("model.fusion.name=gated", f"model.fusion.width={width}")),
        Row("semantic_only", ("model.fusion.name=concat", "model.motion=null")),
        Row("motion_only", ("model.fusion.name=concat", "model.semantic=null")),
    )


@table
def heads(base: Config) -> tuple[Row, ...]:
    """Attention heads of the fusion: 4, 8, 16; widths stay, so that parameters do, too.

    Raises:
        ConfigError: the base's fusion has no heads.
    """
    _check_option("heads", base, "heads")
    return tuple(_row(base, f"heads_{number}", heads=number) for number in HEADS)


@table
def semantic(base: Config) -> tuple[Row, ...]:
    """What looks at frames: DINOv2, DINOv3, CLIP, or a ViT trained on labels.

    All are of the base's size (its own variant is kept); where a family lacks it, of the nearest: there is no CLIP smaller than B.

    Raises:
        ConfigError: the base has none of them, its weights are a file of one, or its pictures are not tiled by all.
    """
    stream = _stream("semantic", base, tuple(VITS))
    if base.data.size % TILES:
        raise ConfigError(
            f"--table semantic has patches of 14 and of 16 pixels, which both tile multiples of {TILES}; "
            f"data.size is {base.data.size}"
        )
    own = stream.options.get("variant", select.options("backbones", stream.name)["variant"].default)
    variants = {name: _nearest(sizes, str(own)[3]) for name, sizes in VITS.items()}
    return tuple(_replaced(base, "semantic", name, variant=variant) for name, variant in variants.items())


@table
def motion(base: Config) -> tuple[Row, ...]:
    """What looks at motion: I3D-R50, R3D-18, R(2+1)D-18, C3D.

    Frames and pixels stay the base's, though the weights of all but I3D were trained at 112 pixels. A row that a clip is too short
    for is refused when it is planned.

    Raises:
        ConfigError: the base has none of them, or its weights are a file of one.
    """
    _stream("motion", base, CONVOLUTIONAL)
    return tuple(_replaced(base, "motion", name) for name in CONVOLUTIONAL)


@table
def direction(base: Config) -> tuple[Row, ...]:
    """Which stream looks at which.

    Raises:
        ConfigError: the base's fusion has no direction.
    """
    _check_option("direction", base, "direction")
    return tuple(_row(base, name, direction=name) for name in READERS)


@table
def graph(base: Config) -> tuple[Row, ...]:
    """What GASM-CAST's graphs are worth: as they are, complete, none.

    `complete` has the same parameters and no structure: all patches of a frame are joined, and all segments of a place. `none`
    leaves the exchanges of the same options, which is B-CAST after the backbones.

    Raises:
        ConfigError: the base's fusion is another.
    """
    if base.model.fusion.name != "gasm_cast":
        raise ConfigError(f"--table graph is for a base whose model.fusion is gasm_cast; it is {base.model.fusion.name}")
    kept = ("layers", "bottleneck", "heads", "direction", "windows", "dropout")
    exchanges = tuple(f"model.fusion.{name}={_text(in_effect(base, name))}" for name in kept)
    return (
        Row("graph"),
        _row(base, "complete", similarity=-1.0, time_reach=base.data.frames),
        Row("none", ("model.fusion.name=bcast", "model.fusion.placement=late", *exchanges)),
    )


@table
def bottleneck(base: Config) -> tuple[Row, ...]:
    """Width inside an exchange: an eighth, a quarter, a half (as CAST publishes it) or all of the wider stream's.

    Each is rounded up to a multiple of the heads, as `bcast` does by itself.

    Raises:
        ConfigError: the base's fusion has no bottleneck, or its model cannot be built.
    """
    _check_option("bottleneck", base, "bottleneck")
    heads = cast(int, in_effect(base, "heads"))
    widths = {name: exchange_width(base, share, heads) for name, share in SHARES.items()}
    own = in_effect(base, "bottleneck") or widths["half"]
    return tuple(
        Row(name) if width == own else Row(name, (f"model.fusion.bottleneck={width}", *_unlimited(base)))
        for name, width in widths.items()
    )


@table
def temporal(base: Config) -> tuple[Row, ...]:
    """What the CNN-RNN reads over time with: a bidirectional LSTM and attention, either of the two simplified, both.

    Raises:
        ConfigError: the base's fusion is another.
    """
    if base.model.fusion.name != "temporal_rnn":
        raise ConfigError(f"--table temporal is for a base whose model.fusion is temporal_rnn; it is {base.model.fusion.name}")
    return (
        _row(base, "full", attention=True, bidirectional=True),
        _row(base, "no_attention", attention=False, bidirectional=True),
        _row(base, "one_direction", attention=True, bidirectional=False),
        _row(base, "neither", attention=False, bidirectional=False),
    )


def _row(base: Config, name: str, **options: Option) -> Row:
    """A row that changes options of the base's fusion; what the base has already is no change."""
    changed = {option: value for option, value in options.items() if value != in_effect(base, option)}
    return Row(name, tuple(f"model.fusion.{option}={_text(value)}" for option, value in changed.items()))


def _check_option(table: str, base: Config, option: str) -> None:
    able = [name for name in select.names("fusion") if option in select.options("fusion", name)]
    if base.model.fusion.name not in able:
        raise ConfigError(
            f"--table {table} is for a base whose model.fusion has the option {option}: {', '.join(able)}; "
            f"it is {base.model.fusion.name}"
        )


def _stream(part: str, base: Config, able: Sequence[str]) -> Stream:
    """The base's stream, if the table is for it.

    Raises:
        ConfigError: there is none, it is another, or its weights fit no other.
    """
    stream: Stream | None = getattr(base.model, part)
    if stream is None or stream.name not in able:
        found = "null" if stream is None else stream.name
        raise ConfigError(f"--table {part} is for a base whose model.{part} is one of {', '.join(able)}; it is {found}")
    if stream.weights not in (None, "pretrained"):
        raise ConfigError(
            f"--table {part}: model.{part}.weights is {stream.weights}, which fits {stream.name} alone; give pretrained or null"
        )
    return stream


def _replaced(base: Config, part: str, name: str, **own: Option) -> Row:
    """A row with another backbone, which keeps of the base's stream what it can; the base's own changes nothing."""
    stream: Stream = getattr(base.model, part)
    if stream.name == name:
        return Row(name)
    chosen = own | {key: value for key, value in stream.options.items() if key not in own and _takes(name, key, value)}
    set_too = stream.model_dump(
        mode="json", exclude_defaults=True, include=set(Stream.model_fields) - {"name", "frozen", "weights"}
    )
    settings = (f"model.{part}.{key}={_text(value)}" for key, value in (chosen | set_too).items())
    return Row(name, (f"model.{part}.name={name}", *settings, *_unlimited(base)))


def _takes(backbone: str, option: str, value: Option) -> bool:
    try:
        select.check_options("backbones", backbone, {option: value})
    except ValueError:
        return False
    return True


def _nearest(sizes: Mapping[str, str], letter: str) -> str:
    return sizes[min(sizes, key=lambda size: abs(LETTERS.index(size) - LETTERS.index(letter)))]


def _unlimited(base: Config) -> tuple[str, ...]:
    return () if base.model.max_trainable_parameters is None else ("model.max_trainable_parameters=null",)


def _text(value: Any) -> str:
    """A value as `--set` reads it."""
    return value if isinstance(value, str) else json.dumps(value)
