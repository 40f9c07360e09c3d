"""report.html: complete, self-contained, escaped, with any part missing."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vidfuse.evaluate.metrics import scores
from vidfuse.evaluate.page import percent, plural
from vidfuse.evaluate.report import report

ATTACK = "<script>alert('x')</script>"
CLASSES = ["Pushing [something] left", "Pushing [something] right", ATTACK, "$a_b$", '"><img src=x>', "计", "Empty class"]
RECORDS = [
    {"kind": "train", "step": 5, "epoch": 0, "samples": 40, "loss": 2.0, "learning_rate": 0.1, "clips_per_second": 4.0},
    {"kind": "validation", "step": 5, "epoch": 0, "samples": 9, "loss": 2.0, "top1": 0.625, "top5": 0.9},
    {"kind": "train", "step": 10, "epoch": 1, "samples": 80, "loss": 1.2345, "learning_rate": 0.05, "clips_per_second": 5.0},
    {"kind": "validation", "step": 10, "epoch": 1, "samples": 9, "loss": 1.5, "top1": 0.5, "top5": 0.9},
]


def judged(unreadable: int = 2):
    labels = np.array([0] * 20 + [1] * 10 + [2] * 6 + [3, 4, 5])
    answers = np.array([1] * 7 + [0] * 13 + [1] * 10 + [0] + [2] * 5 + [3, 4, 5])
    lost = np.arange(len(labels)) >= len(labels) - unreadable
    return scores(np.eye(7)[answers] * 4, labels, lost, CLASSES)


def page(**change):
    parts = {
        "title": "demo",
        "config_yaml": "train:\n  epochs: 3 # <b>\n",
        "records": RECORDS,
        "scores": judged(),
        "errors": [("train-00001.tar", ATTACK, "moov atom not found")],
        "facts": {"Git revision": "abc1234", "Command & co": ATTACK},
    }
    return report(**{**parts, **change})


class Reader(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.faults = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append((tag, self.getpos()))


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert not reader.faults
    assert not reader.open
    return reader


PARTS = {
    "whole": {},
    "training so far": {"scores": None, "errors": []},
    "evaluation only": {"records": []},
    "nothing yet": {"records": [], "scores": None, "errors": [], "facts": {}},
    "all unreadable": {"scores": judged(39)},
    "errors while training": {"scores": None},
}


@functools.cache
def page_of(part: str) -> str:
    return page(**PARTS[part])


@pytest.mark.parametrize("part", PARTS)
def test_one_file_that_asks_for_nothing(part):
    html = page_of(part)
    reader = read(html)
    for tag, name, value in reader.attributes:
        if name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            assert value.startswith(("#", "data:")), (tag, name, value)
        assert not name.startswith("on")
    assert not re.search(r"https?://|file:|@import", html)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert len(reader.ids) == len(set(reader.ids))
    assert "default-src 'none'" in html


@pytest.mark.parametrize("part", PARTS)
def test_links_lead_somewhere(part):
    reader = read(page_of(part))
    targets = {value[1:] for tag, name, value in reader.attributes if tag == "a" and name == "href"}
    assert targets <= set(reader.ids)


def test_only_our_script_may_run():
    html = page(title=ATTACK, config_yaml=ATTACK, errors=[(ATTACK, ATTACK, ATTACK)])
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, flags=re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert "alert" not in scripts[0]
    assert html.count("&lt;script&gt;alert(") >= 6
    assert "<img" not in html
    assert "<b>" not in html


def test_says_what_it_must():
    html = page_of("whole")
    text = " ".join(re.sub(r"<[^>]+>", "", html).replace("\u00a0", " ").split())
    assert "Of 20 videos of “Pushing [something] left”, 7 were taken for “Pushing [something] right” (35%)" in text
    assert "1 was taken for" in text
    top1 = judged().top1
    assert f"95% interval {percent(top1.low)} to {percent(top1.high)}" in text
    assert "over the 6 of 7 classes that occur" in text
    assert "always answering “Pushing [something] left”" in text
    assert "train-00001.tar" in text
    assert "2 videos counted as wrong, 1 listed" in text
    assert "epochs: 3" in text
    assert "abc1234" in text
    for label in ("Training curves", "Confusion matrix", "Accuracy of classes", "Accuracy against confidence"):
        assert f'aria-label="{label}' in html


def test_training_so_far_has_its_own_headlines():
    html = page_of("training so far")
    assert "not yet evaluated" in html
    assert "62.5%" in html
    assert "1.234" in html or "1.235" in html
    assert 'id="confusions"' not in html


def test_evaluation_only_has_no_curves():
    assert 'id="training"' not in page_of("evaluation only")


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([0, 1] * 30, "Top-1 is above chance"),
        ([1, 0] * 30, "Top-1 is below chance"),
        ([0, 1, 1, 0] * 15, "cannot be told from"),
    ],
)
def test_the_verdict_is_in_words(answers, verdict):
    s = scores(np.eye(2)[answers], np.array([0, 1] * 30), np.zeros(60, bool), ["a", "b"])
    assert verdict in page(scores=s, records=[])


def test_few_classes_are_not_sold_as_top_5():
    s = scores(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]), np.zeros(3, bool), ["a", "b", "c"])
    html = page(scores=s, records=[])
    assert "Top-3 of 3 classes" in html
    assert "Top-5" not in html


def test_no_confusions_is_said():
    s = scores(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2]), np.zeros(3, bool), ["a", "b", "c"])
    assert "No readable video was taken for another class" in page(scores=s, records=[])


def test_174_classes_stay_a_small_file():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 174, 3000)
    s = scores(rng.normal(size=(3000, 174)), labels, np.zeros(3000, bool), [f"Class number {c} of many" for c in range(174)])
    html = page(scores=s, records=[])
    read(html)
    assert len(html) < 1_000_000
    assert html.count('<td class="text" data-v="Class number 173 of many">') >= 1


def test_words():
    assert percent(0.8125) == "81.2%"
    assert percent(1, 0) == "100%"
    assert (plural(1, "video"), plural(12000, "video"), plural(2, "class", "classes")) == (
        "1\u00a0video",
        "12,000\u00a0videos",
        "2\u00a0classes",
    )
