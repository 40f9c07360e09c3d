"""What mirroring does to labels: against the mapping that Something-Something's authors published, and through a reader."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.data.test_repeats import reader_of
from tests.support import shared_data
from vidfuse.config import ConfigError
from vidfuse.data.clips import Part
from vidfuse.data.flips import NEVER, check_directions, flip_lines, mirrored_classes, reversed_pair
from vidfuse.data.synthetic import TEMPLATES


def names(*classes: str) -> dict[str, str | None]:
    found = mirrored_classes(classes)
    return {name: None if number == NEVER else classes[number] for name, number in zip(classes, found, strict=True)}


def test_sides_and_turns_are_swapped_where_the_other_is_a_class():
    pairs = {
        "Pushing [something] from left to right": "Pushing [something] from right to left",
        "Turning [something] clockwise": "Turning [something] counter-clockwise",
    }
    found = names(*TEMPLATES)
    for name in TEMPLATES:
        opposite = pairs.get(name) or {v: k for k, v in pairs.items()}.get(name, name)
        assert found[name] == opposite


def test_a_side_whose_opposite_is_no_class_is_never_mirrored():
    assert names("Waving left", "Waving") == {"Waving left": None, "Waving": "Waving"}


def test_spellings():
    assert names("swipe_left", "swipe_right", "SwipeUp") == {
        "swipe_left": "swipe_right",
        "swipe_right": "swipe_left",
        "SwipeUp": "SwipeUp",
    }
    assert names("TurnAnticlockwise", "TurnClockwise")["TurnClockwise"] == "TurnAnticlockwise"
    for pair in (
        ("turnleft", "turnright"),
        ("TURNLEFT", "TURNRIGHT"),
        ("swipe_left1", "swipe_right1"),
        ("left2right", "right2left"),
        ("waving the lefthand", "waving the righthand"),
        ("move leftmost", "move rightmost"),
        ("drifting leftwards", "drifting rightwards"),
        ("turning clock-wise", "turning counter-clock-wise"),
        ("rotate CW", "rotate CCW"),
    ):
        assert names(*pair) == dict([pair, pair[::-1]]) and names(pair[0]) == {pair[0]: None}
    upright = ("Putting something upright on the table", "Pulling it right out", "Bright lights", "copyright", "Leftovers")
    upright += ("Fixing a playwright's desk", "All right", "Looking straight", "Being frightened", "Outright")
    assert names(*upright) == {name: name for name in upright}


def test_something_something_is_as_its_authors_say():
    lines = shared_data("labels/ssv2/label_map.txt").read_text().splitlines()
    classes = [line.split(":", 1)[-1] for line in lines if line.strip()]
    published = json.loads(shared_data("labels/ssv2/augmentation_mappings.json").read_text())
    found = names(*classes)
    assert len(classes) == 174
    assert {a: b for a, b in found.items() if b != a} == published["left/right"]
    assert all(found[name] == name for name in published["left/right agnostic"] if name in found)
    assert flip_lines(classes) == [
        f"mirrored clips swap the labels of 6 classes, such as {next(iter(published['left/right']))!r}"
    ]


def test_ucf101_and_kinetics_name_no_sides():
    for path, place in (("labels/ucf101/classInd.txt", 1), ("labels/kinetics/label_map_k400.txt", 0)):
        classes = [line.split(" ", place)[-1] for line in shared_data(path).read_text().splitlines() if line.strip()]
        assert np.array_equal(mirrored_classes(classes), np.arange(len(classes))) and not flip_lines(classes)


def test_what_is_never_mirrored_is_said():
    assert flip_lines(("Waving left", "Waving")) == ["clips of 1 classes are never mirrored: 'Waving left'"]


def test_reversal_is_refused_where_classes_are_each_others_reverse():
    published = json.loads(shared_data("labels/ssv2/augmentation_mappings.json").read_text())["reverse time"]
    for a, b in published.items():
        pair = reversed_pair((a, b))
        assert pair is not None and published[pair[0]] == pair[1]
    with pytest.raises(ConfigError, match=r"temporal\.reverse: backwards, .* looks like .*set it to 0"):
        check_directions(list(published), reverse=True)
    with pytest.raises(ConfigError, match="backwards, 'Moving"):
        check_directions(TEMPLATES, reverse=True)
    check_directions(TEMPLATES)
    check_directions(("Archery", "Opening a bottle", "Walking down"), reverse=True)


def test_mirrored_views_are_refused_where_a_class_has_no_mirror_image():
    with pytest.raises(ConfigError, match=r"evaluate\.flip: .*'Waving left'.*1 such classes"):
        check_directions(("Waving left", "Waving"), flip=True)
    check_directions(TEMPLATES, flip=True)
    check_directions(("Waving left", "Waving"), flip="keep_labels")


def test_classes_that_are_numbers_tell_no_sides():
    for field, flip in (("data.flip", {"train_flip": True}), ("evaluate.flip", {"flip": True})):
        with pytest.raises(ConfigError, match=rf"^{field}: .* are numbers \('0' to '2'\).*keep_labels .*--classes FILE"):
            check_directions(("0", "1", "2"), **flip)
    check_directions(("0", "1", "2"), train_flip="keep_labels", flip="keep_labels")
    check_directions(("0", "1", "2"))
    check_directions(("0", "left"), train_flip=True)


def test_labels_are_kept_where_that_is_asked_for():
    assert mirrored_classes(("to the left", "to the right", "waving left"), "keep_labels").tolist() == [0, 1, 2]


@pytest.mark.parametrize("classes", [("to the left", "to the right", "on"), ("to the left", "off", "on")])
def test_a_mirrored_clip_has_the_mirrored_label(videos, classes):
    root, rows = videos
    reader = reader_of(root, 24)
    object.__setattr__(reader, "mirrored", mirrored_classes(classes))
    plans = {video.label: list(reader.plans(video, 0)) for video in rows}
    columns = reader.read(Part(0, rows))
    assert columns["label"].tolist() == [plan.label for label in range(3) for plan in plans[label]]
    for label, drawn in plans.items():
        flipped = [plan for plan in drawn if plan.box.mirrored]
        image = int(mirrored_classes(classes)[label])
        assert {plan.label for plan in flipped} == ({image} if image != NEVER else set())
        assert {plan.label for plan in drawn if not plan.box.mirrored} == {label}
        assert bool(flipped) == (image != NEVER)
