"""Pictures are valid, hold what they should, and survive hostile names."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib.image
import numpy as np
import pytest

from vidfuse.evaluate import drawing, figures
from vidfuse.evaluate.metrics import scores

HOSTILE = ["<script>alert(1)</script>", "a $x^2 & \\frac{", "two\nlines\x07", "-->]]>", "拿起 [某物]", 'quote" onload="x']
SVG = "{http://www.w3.org/2000/svg}"


def judged(k: int, n: int = 300, *, unreadable: float = 0.05, classes=None):
    rng = np.random.default_rng(k)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 2
    return scores(logits, labels, rng.random(n) < unreadable, classes or [f"Pushing [something] {c}" for c in range(k)])


def train(step: int, **more):
    fields = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "clips_per_second": 9.0, "data_wait_fraction": 0.1}
    return {"kind": "train", "step": step, "epoch": 0, "samples": step, **fields, **more}


def validation(step: int, **more):
    return {"kind": "validation", "step": step, "epoch": 0, "samples": 9, "loss": 1.0, "top1": 0.5, "top5": 0.9, **more}


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("k", [2, 12, 40, 61, 174])
def test_every_picture_of_scores_is_valid(k):
    s = judged(k)
    for figure in (figures.confusion_matrix(s), figures.class_accuracy(s), figures.reliability(s)):
        pixels = matplotlib.image.imread(io.BytesIO(drawing.png(figure, dpi=40)))
        assert pixels.ndim == 3
        assert pixels.std() > 0.01
        assert ET.fromstring(drawing.svg(figure)).tag == f"{SVG}svg"


def test_matrix_labels_only_where_they_fit():
    assert "Pushing [something] 3  4" in texts(drawing.svg(figures.confusion_matrix(judged(12))))
    assert not any("Pushing" in text for text in texts(drawing.svg(figures.confusion_matrix(judged(174)))))


def test_matrix_shows_counts_and_the_unreadable_column():
    s = judged(3, 500)
    shown = texts(drawing.svg(figures.confusion_matrix(s)))
    assert {str(count) for count in s.confusion.ravel() if count} <= set(shown)
    assert "unreadable" in shown
    assert "unreadable" not in texts(drawing.svg(figures.confusion_matrix(judged(3, unreadable=0))))


def test_matrix_tells_a_class_without_videos():
    s = scores(np.eye(3)[[0, 2]], np.array([0, 2]), np.zeros(2, bool), ["a", "b", "c"])
    assert texts(drawing.svg(figures.confusion_matrix(s))).count("no videos of this class") == 1


def test_clustering_puts_confused_classes_side_by_side():
    matrix = np.eye(8, dtype=np.int64) * 10
    for a, b in ((0, 5), (1, 7), (2, 4), (3, 6)):
        matrix[a, b] = matrix[b, a] = 8
    order = figures.clustered(matrix).tolist()
    assert sorted(order) == list(range(8))
    for a, b in ((0, 5), (1, 7), (2, 4), (3, 6)):
        assert abs(order.index(a) - order.index(b)) == 1


def test_clustering_survives_empty_and_tiny_matrices():
    assert figures.clustered(np.zeros((5, 5), np.int64)).tolist()
    assert sorted(figures.clustered(np.eye(2, dtype=np.int64)).tolist()) == [0, 1]


def test_order_can_be_chosen():
    s = judged(70)
    assert figures.matrix_order(s, "given").tolist() == list(range(70))
    assert sorted(figures.matrix_order(s).tolist()) == list(range(70))
    with pytest.raises(ValueError, match="'given', 'clustered'"):
        figures.confusion_matrix(s, order="random")  # type: ignore[arg-type]


def test_many_classes_show_the_ends():
    shown = texts(drawing.svg(figures.class_accuracy(judged(90, 2000))))
    assert sum(text.startswith("Pushing") for text in shown) == 40
    assert "The best 20 of 90 classes" in shown


def test_curves_draw_what_is_there():
    full = texts(drawing.svg(figures.training_curves([*(train(s) for s in range(1, 500)), validation(499)], chance=0.1)))
    assert {"Loss", "Validation accuracy", "Learning rate", "Time spent waiting for data", "chance"} <= set(full)
    some = texts(drawing.svg(figures.training_curves([validation(5)])))
    assert "Learning rate" not in some
    assert "Validation accuracy" in some


def test_curves_skip_values_that_are_not_there():
    records = [train(1, loss=math.nan, grad_norm=None), train(2, loss=math.inf), train(3)]
    assert "Loss" in texts(drawing.svg(figures.training_curves(records)))


def test_no_records_is_an_error():
    assert not figures.drawable([])
    for records in ([], [{"kind": "event", "step": 1}], [{"kind": "train", "step": 1}]):
        assert not figures.drawable(records)
        with pytest.raises(ValueError, match="value to draw"):
            figures.training_curves(records)


def test_history_forgets_what_was_rolled_back():
    first = [train(s, run=1) for s in (10, 20, 30, 40)]
    second = [train(s, run=2) for s in (25, 35)]
    records = [*first[:2], validation(20), *first[2:], validation(40), *second]
    assert [(r["step"], r["run"]) for r in figures.history(records, "train")] == [(10, 1), (20, 1), (25, 2), (35, 2)]
    assert [r["step"] for r in figures.history(records, "validation")] == [20]  # that of step 40 was rolled back too


@pytest.mark.parametrize("order", [(train, validation), (validation, train)])
def test_history_keeps_both_kinds_of_a_step_and_the_later_of_one(order):
    records = [kind(5, run=run) for run in (1, 2) for kind in order]
    assert [[r["run"] for r in figures.history(records, kind)] for kind in ("train", "validation")] == [[2], [2]]


def test_a_record_without_step_is_refused():
    with pytest.raises(ValueError, match="integer 'step'"):
        figures.training_curves([{"kind": "train", "loss": 1.0}])


@pytest.mark.parametrize("draw", [figures.confusion_matrix, figures.class_accuracy])
def test_hostile_names_are_text(draw):
    figure = draw(judged(6, classes=HOSTILE))
    page = drawing.svg(figure)
    assert "<script" not in page
    assert any("<script>alert(1)</script>" in text for text in texts(page))
    assert any("$x^2 & \\frac{" in text for text in texts(page))
    assert any("two lines" in text for text in texts(page))
    ET.fromstring(drawing.inline_svg(figure, "x", label=HOSTILE[5]).replace("xlink:href", "href"))
    assert drawing.png(figure, dpi=40).startswith(b"\x89PNG")


def test_the_same_figure_is_the_same_bytes():
    s = judged(12)
    assert drawing.svg(figures.confusion_matrix(s)) == drawing.svg(figures.confusion_matrix(s))


def test_inline_svg_follows_the_page():
    figure = figures.reliability(judged(4))
    one, two = (drawing.inline_svg(figure, name, label="A & B") for name in ("one", "two"))
    assert "var(--ink, #1f2429)" in one
    assert "var(--blue, #0072b2)" in one
    assert 'aria-label="A &amp; B"' in one
    ids = [{node.get("id") for node in ET.fromstring(svg.replace("xlink:href", "href")).iter()} - {None} for svg in (one, two)]
    assert ids[0].isdisjoint(ids[1])
    with pytest.raises(ValueError, match="part of ids"):
        drawing.inline_svg(figure, 'a"b', label="")


@pytest.mark.parametrize(
    ("name", "most", "line"),
    [("short", 9, "short"), ("a\n\tb\x00c", 9, "a b c"), ("0123456789", 7, "012…789"), ("exactly10!", 10, "exactly10!")],
)
def test_shorten(name, most, line):
    assert drawing.shorten(name, most) == line


def test_import_leaves_pyplot_and_torch_out():
    code = "import sys, vidfuse.evaluate.report; assert not {'matplotlib.pyplot', 'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
