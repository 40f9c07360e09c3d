"""What sentences put into the templates of Something-Something-V2."""

from __future__ import annotations

import pytest

from tests.support import shared_data
from vidfuse.data.templates import object_facts, objects_of, placeholders


@pytest.mark.parametrize(
    ("template", "sentence", "objects"),
    [
        ("Pushing something from left to right", "pushing a green chair from left to right", ("green chair",)),
        ("Putting something, something and something on the table", "Putting pen, the cup and keys on the table", ("pen", "cup", "keys")),
        ("Pretending to take something from somewhere", "pretending to take  an apple from the shelf", ("apple", "shelf")),
        ("Stacking number of something", "stacking 4 coins", ("4", "coins")),
        ("Stacking number of something", "stacking a few books", ("few", "books")),
        ("Stacking number of something", "stacking a couple of the plates", ("couple of", "plates")),
        ("Stacking number of something", "stacking two small books", ("two", "small books")),
        (
            "Tipping something with something in it over, so something in it falls out",
            "tipping box with pens over, so pens falls out",
            ("box", "pens", "pens"),
        ),
        (
            "Putting something similar to other things that are already on the table",
            "putting spoon",
            ("spoon",),
        ),
        ("Pushing something left", "pulling a cup left", None),
        ("Pushing something left", "pushing left", None),
        ("Something falling like a rock", "stone falling like a rock", ("stone",)),
    ],
)  # fmt: skip
def test_the_objects_of_a_sentence(template, sentence, objects):
    assert objects_of(template, sentence) == objects


def test_counts_and_what_validation_names_alone():
    classes = ("Holding something", "Folding something")
    facts = object_facts(
        classes,
        {
            "train": [(0, "holding a cup", ()), (0, "holding cup", ()), (1, "folding paper", ()), (1, "something else", ())],
            "validation": [(0, "holding a Zebra", ()), (1, "folding paper", ()), (1, "folding zebra", ())],
        },
    )
    assert facts.objects == {"train": 2, "validation": 2}
    assert (facts.unseen, facts.unseen_share) == ((("zebra", 2),), 0.5)
    assert facts.templates[0].common == (("cup", 2), ("zebra", 1))
    assert (facts.templates[1].videos, facts.templates[1].others, facts.templates[1].objects) == (3, 1, 2)


def test_annotated_objects_come_before_what_the_sentence_seems_to_name():
    classes = ("Putting something on something", "Holding something")
    entries = [(0, "putting a cup on a tray on the table", ["a cup on a  Tray", "the table"]), (1, "he holds it", ["Pen"])]
    facts = object_facts(classes, {"train": entries})
    assert facts.templates[0].common == (("cup on a tray", 1), ("table", 1))
    assert [(each.videos, each.others) for each in facts.templates] == [(1, 0), (1, 0)]


def test_class_names_without_placeholders_have_none():
    assert object_facts(("Archery", "Yoga"), {"train": [(0, "Archery", ())]}) is None


def test_every_template_of_the_real_list_has_a_placeholder_and_takes_its_own_words():
    names = shared_data("labels/ssv2/label_map.txt").read_text().splitlines()
    for name in filter(None, map(str.strip, names)):
        assert placeholders(name), name
        assert objects_of(name, name.lower()) is not None, name
