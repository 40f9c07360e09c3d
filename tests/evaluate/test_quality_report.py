"""quality.html: complete, self-contained, escaped; long lists are cut and say so."""

from __future__ import annotations

import re

import pytest

from tests.data.test_survey import judge, rows
from tests.evaluate.test_report import ATTACK, read
from vidfuse.data import quality
from vidfuse.evaluate.quality_figures import TITLES
from vidfuse.evaluate.quality_report import SHOWN, quality_report, shown_videos


def content(case: str) -> dict:
    train, validation = rows("train", 60), rows("validation", 12)
    if case == "flawed":
        for number in range(30):
            train[number] = quality.unread("train-00000.tar", f"train{number}", 0, ATTACK)
        train[40] |= {"motion": 0.0, "key": "still"}
        train[41] |= {"hashes": train[42]["hashes"]}
        validation[0] |= {"sha256": "train50", "label": 1}
        validation[3] |= {"text": "holding a zebra"}
    if case == "unreadable":
        train = [quality.unread("train-00000.tar", "a", 0, "broken")]
        validation = [quality.unread("validation-00000.tar", "b", 0, "broken")]
    splits = {"train": train, "validation": validation}
    if case == "unlabelled":
        splits = {"test": rows("test", 5, classes=0)}
    classes = ("Holding something", ATTACK, '"><img src=x>')
    return judge(splits, quarantined=3 if case == "flawed" else 0, classes=classes).model_dump(mode="json")


def page(case: str) -> str:
    found = content(case)
    pictures = {(shard, key): "QUJD" for shard, keys in shown_videos(found).items() for key in keys}
    return quality_report(found, pictures=pictures, facts={"command": ATTACK})


@pytest.mark.parametrize("case", ["good", "flawed", "unreadable", "unlabelled"])
def test_one_file_that_asks_for_nothing(case):
    html = page(case)
    reader = read(html)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"https?://|file:|@import", html)
    assert len(reader.ids) == len(set(reader.ids))
    assert {value[1:] for tag, name, value in reader.attributes if tag == "a" and name == "href"} <= set(reader.ids)
    assert ATTACK not in html and '"><img src=x>' not in html


def test_flaws_are_shown_and_counted():
    found = content("flawed")
    assert {key for keys in shown_videos(found).values() for key in keys} >= {
        "still",
        "train41",
        "train42",
        "validation0",
        "train50",
    }
    text = " ".join(re.sub(r"<[^>]+>", " ", page("flawed")).replace("\u00a0", " ").split())
    assert f"{SHOWN} of 30 flags are shown; quality.json has all." in text
    for words in ("other class", "same bytes", "zebra", "Left out when packed", "quality.max_unreadable_share: 0.4167"):
        assert words in text


def test_every_measure_has_a_title():
    measures = {name for split in content("good")["splits"].values() for name in split["measures"]}
    assert measures == set(TITLES)


def test_a_good_set_says_so():
    html = page("good")
    assert "Every threshold is kept." in html
    assert 'id="duplicates"' not in html and 'id="static"' not in html


def test_without_labels_there_are_no_classes():
    assert 'id="classes"' not in page("unlabelled")
