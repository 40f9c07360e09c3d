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

from vidfuse.config import ConfigError, Flip

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
BACKWARDS = (
    (r"approaching\b", r"moving away\b"),
    (r"burying\b", r"digging\b"),
    (r"covering\b", r"uncovering\b"),
    (r"(?:picking|lifting)\b.*\bup\b", r"putting\b"),
    (r"pulling\b.*\bfrom behind\b", r"putting\b.*\bbehind\b"),
    (r"pulling\b.*\bout of\b", r"putting\b.*\binto\b"),
    (r"pulling\b.*\bleft to right\b", r"pushing\b.*\bright to left\b"),
    (r"pulling\b.*\bright to left\b", r"pushing\b.*\bleft to right\b"),
    (r"taking\b", r"putting\b"),
    (r"turning\b.*\bleft\b", r"turning\b.*\bright\b"),
)
"""Beginnings of names whose actions look like each other backwards, where more than such a word differs."""
_NO_SIDE = re.compile(
    r"\b(?:right (?:out|away|side up)|all right|left ?overs?|cleft|(?:out|up|al|forth|birth|copy)right\w*)\b|\w*(?:[bf]right|wright)\w*"
)
"""Where `right` and `left` are no sides: `pulling it right out as you remove your hand`, `upright`, `bright`."""
_NUMBER = re.compile(r"\s*\d+\s*")
_SIDE = re.compile("counterclockwise|clockwise|left|right")
"""In words, too: `leftwards`, `righthand`, `turnleft`."""


def mirrored_classes(classes: Sequence[str], flip: Flip = True) -> Classes:
    """[K] the class of each class's mirrored clip: mostly itself; `NEVER` where that is no class.

    Args:
        classes: of the packed set.
        flip: `keep_labels`: all are themselves, whatever they are called.
    """
    if flip == "keep_labels":
        return np.arange(len(classes), dtype=np.int64)
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
    for pattern, opposite in BACKWARDS:
        some, others = ([given for name, given in names.items() if re.match(one, name)] for one in (pattern, opposite))
        if some and others:
            return some[0], others[0]
    return None


def check_directions(classes: Sequence[str], *, reverse: bool = False, train_flip: Flip = False, flip: Flip = False) -> None:
    """Refuse what would give clips wrong labels.

    Args:
        classes: of the packed set.
        reverse: whether training clips run backwards.
        train_flip: `data.flip`.
        flip: `evaluate.flip`.

    Raises:
        ConfigError: classes are each other's reverse, a class cannot be mirrored, or nothing tells what its mirrored clips are.
    """
    for field, given in (("data.flip", train_flip), ("evaluate.flip", flip)):
        if given is True and all(_NUMBER.fullmatch(name) for name in classes):
            raise ConfigError(
                f"{field}: the classes of this set are numbers ({classes[0]!r} to {classes[-1]!r}), so nothing tells which of them is"
                f" the mirror image of which; set it to keep_labels if none names a side or a turn (as in UCF101 and Kinetics), to"
                f" false, or pack the set with a list of its names (python -m jobs.pack --classes FILE)"
            )
    pair = reversed_pair(classes) if reverse else None
    if pair is not None:
        raise ConfigError(
            f"data.augment.temporal.reverse: backwards, {pair[0]!r} looks like {pair[1]!r}: labels of this set have a direction in "
            "time; set it to 0"
        )
    never = [name for name, number in zip(classes, mirrored_classes(classes), strict=True) if number == NEVER]
    if flip is True and never:
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
