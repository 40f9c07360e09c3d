"""What becomes of a label when its clip is mirrored left-right or runs backwards, told by the names of the classes.

Comes in: class names as in the manifest. Goes out: the class of the mirrored clip of each. In Something-Something a mirrored
`Pushing something from left to right` shows `Pushing something from right to left`; a class that names a side or a turn, and whose
mirrored name is no class, cannot be mirrored. Held to the mapping that the data set's authors published (`left/right` and
`left/right agnostic` of something-something-v2-baseline) in `tests/data/test_flips.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vidfuse.config import ConfigError

Classes = npt.NDArray[np.int64]

NEVER = -1
"""In place of a class: clips of it are not mirrored."""
OPPOSITES = {"left": "right", "right": "left", "counterclockwise": "clockwise", "clockwise": "counterclockwise"}
REVERSES = (
    ("opening", "closing"),
    ("folding", "unfolding"),
    ("covering", "uncovering"),
    ("lifting", "lowering"),
    ("up", "down"),
    ("upwards", "downwards"),
    ("into", "out of"),
    ("away from", "closer to"),
    ("away from", "towards"),
    ("clockwise", "counterclockwise"),
    ("left to", "right to"),
)
"""Words that tell an action from what it looks like backwards."""
_NO_SIDE = re.compile(
    r"\b(?:right (?:out|away|side up)|all right|left ?overs?|cleft|(?:out|up|al|forth|birth|copy)right\w*)\b|\w*(?:[bf]right|wright)\w*"
)
"""Where `right` and `left` are no sides: `pulling it right out as you remove your hand`, `upright`, `bright`."""
_SIDE = re.compile("counterclockwise|clockwise|left|right")
"""In words, too: `leftwards`, `righthand`, `turnleft`."""


def mirrored_classes(classes: Sequence[str]) -> Classes:
    """[K] the class of each class's mirrored clip: mostly itself; `NEVER` where that is no class."""
    names = [_plain(name) for name in classes]
    numbers = {name: number for number, name in enumerate(names)}
    shown = [_SIDE.sub(lambda found: OPPOSITES[found[0]], name) for name in names]
    return np.array(
        [number if name == names[number] else numbers.get(name, NEVER) for number, name in enumerate(shown)], np.int64
    )


def flip_lines(classes: Sequence[str]) -> list[str]:
    """What mirroring does to labels, for people; empty if no class names a side."""
    mirrored = mirrored_classes(classes)
    swapped = [name for name, number in zip(classes, mirrored, strict=True) if number >= 0 and classes[number] != name]
    never = [name for name, number in zip(classes, mirrored, strict=True) if number == NEVER]
    lines = [f"mirrored clips swap the labels of {len(swapped)} classes, such as {swapped[0]!r}"] if swapped else []
    return [*lines, f"clips of {len(never)} classes are never mirrored: {', '.join(map(repr, never))}"] if never else lines


def reversed_pair(classes: Sequence[str]) -> tuple[str, str] | None:
    """Two classes that look like each other backwards; `None`: names tell of none."""
    names = {_plain(name): name for name in classes}
    for name, given in names.items():
        for pair in REVERSES:
            for word, other in (pair, pair[::-1]):
                turned = re.sub(rf"\b{word}\b", other, name)
                if turned != name and turned in names:
                    return given, names[turned]
    return None


def check_directions(classes: Sequence[str], *, reverse: bool = False, flip: bool = False) -> None:
    """Refuse what would give clips wrong labels.

    Args:
        classes: of the packed set.
        reverse: whether training clips run backwards.
        flip: whether testing scores views mirrored.

    Raises:
        ConfigError: classes are each other's reverse, or a class cannot be mirrored.
    """
    pair = reversed_pair(classes) if reverse else None
    if pair is not None:
        raise ConfigError(
            f"data.augment.temporal.reverse: backwards, {pair[0]!r} looks like {pair[1]!r}: labels of this set have a direction in "
            "time; set it to 0"
        )
    never = [name for name, number in zip(classes, mirrored_classes(classes), strict=True) if number == NEVER]
    if flip and never:
        raise ConfigError(
            f"evaluate.flip: mirrored, clips of {never[0]!r} are of no class of this set ({len(never)} such classes), so a mirrored "
            "view cannot be read; set it to false"
        )


def _plain(name: str) -> str:
    """A name in small letters, words apart, without brackets; sides that are none are hidden."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Za-z])(?=\d)|(?<=\d)(?=[A-Za-z])|[\[\]_\s-]+", " ", name).lower().strip()
    words = re.sub(r"\b(?:(?:counter|anti) ?clock ?wise|a?ccw)\b", "counterclockwise", re.sub(r" +", " ", words))
    words = re.sub(r"\b(?:clock wise|cw)\b", "clockwise", words)
    return _NO_SIDE.sub(lambda found: found[0].upper(), words)
