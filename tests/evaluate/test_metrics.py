"""Figures of an evaluation against hand-computed values, scikit-learn and obvious slow versions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from vidfuse.evaluate.metrics import Proportion, average_views, scores, wilson


def names(k: int) -> list[str]:
    return [f"class {c}" for c in range(k)]


def sample(n: int = 400, k: int = 9, *, unreadable: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.5
    return logits, labels, rng.random(n) < unreadable, names(k)


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_agrees_with_scikit_learn_where_every_video_is_readable():
    logits, labels, lost, classes = sample()
    s = scores(logits, labels, lost, classes)
    predicted = logits.argmax(1)
    assert s.top1.value == pytest.approx(accuracy_score(labels, predicted))
    assert s.top5.value == pytest.approx(top_k_accuracy_score(labels, logits, k=5, labels=range(9)))
    assert s.mean_class_accuracy.value == pytest.approx(balanced_accuracy_score(labels, predicted))
    np.testing.assert_array_equal(s.confusion, confusion_matrix(labels, predicted, labels=range(9)))


@pytest.mark.parametrize("unreadable", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("k", [2, 3, 5, 6, 30])
def test_agrees_with_the_obvious_loop(k, unreadable):
    logits, labels, lost, classes = sample(150, k, unreadable=unreadable, seed=k)
    logits = np.round(logits)  # many ties
    s = scores(logits, labels, lost, classes)
    top1 = top5 = 0
    matrix, column = np.zeros((k, k), int), np.zeros(k, int)
    for row, label, gone in zip(logits, labels, lost, strict=True):
        order = sorted(range(k), key=lambda c: (-row[c], c))
        if gone:
            column[label] += 1
            continue
        top1 += order[0] == label
        top5 += label in order[:5]
        matrix[label, order[0]] += 1
    assert (s.top1.hits, s.top5.hits, s.samples, s.unreadable) == (top1, top5, 150, int(lost.sum()))
    np.testing.assert_array_equal(s.confusion, matrix)
    np.testing.assert_array_equal(s.unreadable_per_class, column)
    assert s.confusion.sum() + s.unreadable_per_class.sum() == s.samples


def test_calibration_agrees_with_the_obvious_loop():
    logits, labels, lost, classes = sample(500, 7, unreadable=0.1, seed=3)
    s = scores(logits, labels, lost, classes)
    confidence = [1 / 7 if gone else softmax(row).max() for row, gone in zip(logits, lost, strict=True)]
    right = [not gone and row.argmax() == label for row, label, gone in zip(logits, labels, lost, strict=True)]
    ece = 0.0
    for b in range(15):
        inside = [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15]
        assert s.calibration.bins[b].samples == len(inside)
        if inside:
            gap = abs(np.mean([confidence[i] for i in inside]) - np.mean([right[i] for i in inside]))
            ece += len(inside) / 500 * gap
    assert s.calibration.ece == pytest.approx(ece)
    assert s.calibration.mean_confidence == pytest.approx(np.mean(confidence))
    assert sum(b.samples for b in s.calibration.bins) == 500


def test_wilson_by_hand():
    # 8 of 10: centre (0.8 + z²/20) / (1 + z²/10), half z/(1 + z²/10) sqrt(0.016 + z²/400), z² = 3.8414588
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)  # z² / (10 + z²)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(1, 1)[0] == pytest.approx(1 / (1 + 3.8414588), abs=1e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_value_and_mirrors(pair):
    hits, total = pair
    low, high = wilson(hits, total)
    assert 0 <= low <= hits / total <= high <= 1
    assert low < high
    mirrored = wilson(total - hits, total)
    assert (1 - mirrored[1], 1 - mirrored[0]) == pytest.approx((low, high), abs=1e-12)


def test_wilson_covers_about_95_percent():
    rng = np.random.default_rng(0)
    covered = [low <= 0.7 <= high for low, high in (wilson(int(h), 80) for h in rng.binomial(80, 0.7, 4000))]
    assert 0.93 < np.mean(covered) < 0.97


def test_mean_class_accuracy_interval_covers_about_95_percent():
    rng = np.random.default_rng(1)
    rates = np.array([0.5, 0.7, 0.9, 0.95])
    labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    covered = []
    for _ in range(600):
        right = rng.random(100) < rates[labels]
        answer = np.where(right, labels, (labels + 1) % 4)
        mean = scores(np.eye(4)[answer], labels, np.zeros(100, bool), names(4)).mean_class_accuracy
        covered.append(mean.low <= rates.mean() <= mean.high)
    assert 0.92 < np.mean(covered) < 0.985


@pytest.mark.parametrize(("hits", "total"), [(0, 0), (-1, 3), (4, 3)])
def test_impossible_proportions_are_refused(hits, total):
    with pytest.raises(ValueError, match="total >= 1"):
        Proportion(hits, total)
    with pytest.raises(ValueError, match="total >= 1"):
        wilson(hits, total)


@given(
    st.integers(2, 8).flatmap(
        lambda k: st.integers(1, 30).flatmap(
            lambda n: st.tuples(
                hnp.arrays(np.float64, (n, k), elements=st.floats(-50, 50)),
                hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)),
                hnp.arrays(np.bool_, n),
            )
        )
    )
)
def test_what_holds_for_any_answers(case):
    logits, labels, lost = case
    n, k = logits.shape
    s = scores(logits, labels, lost, names(k))
    assert s.samples == n == sum(row.samples for row in s.per_class)
    assert s.top1.hits == sum(row.correct for row in s.per_class) == np.trace(s.confusion)
    assert s.top1.hits <= s.top5.hits <= n - s.unreadable
    assert s.top5_k < k or s.top5.hits == n - s.unreadable
    assert 0 <= s.calibration.ece <= 1
    assert s.mean_class_accuracy.low <= s.mean_class_accuracy.value <= s.mean_class_accuracy.high
    assert sum(c.count for c in s.worst_confusions) == n - s.unreadable - s.top1.hits
    assert [c.count for c in s.worst_confusions] == sorted((c.count for c in s.worst_confusions), reverse=True)
    json.dumps(s.to_json(), allow_nan=False)
    garbage = np.where(lost[:, None], np.nan, logits)
    assert scores(garbage, labels, lost, names(k)).to_json() == s.to_json()


def test_order_of_videos_does_not_matter():
    logits, labels, lost, classes = sample(200, 6, unreadable=0.1)
    turned = np.random.default_rng(9).permutation(200)
    a, b = scores(logits, labels, lost, classes), scores(logits[turned], labels[turned], lost[turned], classes)
    assert a.top1 == b.top1
    assert a.per_class == b.per_class
    assert a.worst_confusions == b.worst_confusions
    assert a.calibration.ece == pytest.approx(b.calibration.ece)


def test_ties_go_to_the_lower_index():
    s = scores(np.zeros((3, 7)), np.array([0, 4, 5]), np.zeros(3, bool), names(7))
    assert s.top1.hits == 1  # label 0
    assert s.top5.hits == 2  # labels 0 and 4


def test_a_class_without_videos_is_told_and_left_out_of_the_mean():
    s = scores(np.eye(3)[[0, 0, 2]], np.array([0, 0, 0]), np.zeros(3, bool), names(3))
    assert s.per_class[1].accuracy is None
    assert s.per_class[1].mistaken_for is None
    assert s.mean_class_accuracy.classes == 1
    assert s.mean_class_accuracy.value == pytest.approx(2 / 3)
    assert s.to_json()["per_class"][1]["accuracy"] is None


def test_all_unreadable_is_all_wrong():
    s = scores(np.full((4, 3), np.nan), np.array([0, 1, 1, 2]), np.ones(4, bool), names(3))
    assert (s.top1.hits, s.top5.hits, s.unreadable, s.samples) == (0, 0, 4, 4)
    assert s.worst_confusions == ()
    assert s.mean_class_accuracy.value == 0
    assert s.calibration.mean_confidence == pytest.approx(1 / 3)
    assert s.per_class[1].unreadable == 2


def test_few_classes_do_not_claim_a_top_5():
    assert scores(*sample(20, 2)).top5_name == "top-2 of 2 classes"
    assert scores(*sample(20, 2)).to_json()["top5"]["k"] == 2
    assert scores(*sample(20, 5)).top5_name == "top-5 of 5 classes"
    assert scores(*sample(20, 6)).top5_name == "top-5"


def test_worst_confusions_and_mistaken_for():
    labels = np.array([0] * 6 + [1] * 3 + [2] * 3)
    answers = np.array([0, 0, 0, 1, 1, 2, 0, 0, 1, 2, 2, 2])
    s = scores(np.eye(3)[answers], labels, np.zeros(12, bool), ["a", "b", "c"])
    told = [(c.true_class, c.predicted_class, c.count, c.samples) for c in s.worst_confusions]
    assert told == [("b", "a", 2, 3), ("a", "b", 2, 6), ("a", "c", 1, 6)]  # equal counts: the higher share first
    assert s.worst_confusions[0].share == pytest.approx(2 / 3)
    assert (s.per_class[0].mistaken_for, s.per_class[0].mistaken_count) == ("b", 2)
    assert s.per_class[2].mistaken_for is None
    assert len(scores(np.eye(3)[answers], labels, np.zeros(12, bool), ["a", "b", "c"], worst=1).worst_confusions) == 1


def test_chance():
    s = scores(np.zeros((4, 5)), np.array([3, 3, 3, 1]), np.zeros(4, bool), names(5))
    assert (s.chance.uniform, s.chance.majority, s.chance.majority_class, s.chance.best) == (0.2, 0.75, "class 3", 0.75)


def test_counts_cannot_be_written_to():
    s = scores(*sample(10))
    with pytest.raises(ValueError, match="read-only"):
        s.confusion[0, 0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": np.zeros((0, 3)), "labels": np.zeros(0, int), "unreadable": np.zeros(0, bool)}, "no videos"),
        ({"classes": ["only"], "logits": np.zeros((4, 1))}, "at least 2 classes"),
        ({"classes": ["a", "a", "b"]}, "'a' is given 2 times"),
        ({"logits": np.zeros((4, 5))}, r"\[N, 3\] for 3 classes"),
        ({"logits": np.zeros((4, 2, 3))}, "average_views"),
        ({"labels": np.array([0, 1, 2, 3])}, "label 3 of video 3 is outside 0 to 2"),
        ({"labels": np.array([0, -1, 2, 0])}, "label -1"),
        ({"labels": np.array([0.0, 1, 2, 0])}, "4 integers"),
        ({"labels": np.array([0, 1])}, "4 integers"),
        ({"unreadable": np.zeros(4, int)}, "4 bools"),
        ({"unreadable": np.zeros(3, bool)}, "4 bools"),
        ({"logits": np.array([[0, 1, 2], [0, np.nan, 1], [0, 1, np.inf], [0, 0, 0.0]])}, r"video 1 hold NaN.*\(2 such"),
        ({"bins": 0}, "at least 1 bin"),
    ],
)
def test_bad_input_is_explained(change, message):
    good = {"logits": np.zeros((4, 3)), "labels": np.array([0, 1, 2, 0]), "unreadable": np.zeros(4, bool), "classes": names(3)}
    with pytest.raises(ValueError, match=message):
        scores(**{**good, **change})


def test_average_of_probabilities_and_of_logits():
    logits = np.random.default_rng(0).normal(size=(5, 4, 3)) * 3
    np.testing.assert_allclose(softmax(average_views(logits)), softmax(logits).mean(1))
    np.testing.assert_allclose(average_views(logits, mean="logits"), logits.mean(1))


def test_one_view_is_itself():
    logits = np.random.default_rng(0).normal(size=(6, 1, 4))
    np.testing.assert_allclose(softmax(average_views(logits)), softmax(logits[:, 0]))


def test_a_loud_view_has_one_vote():
    quiet, loud = [2.0, 0.0], [0.0, 40.0]
    views = np.array([[quiet, quiet, quiet, loud]])
    assert average_views(views).argmax() == 0
    assert average_views(views, mean="logits").argmax() == 1


def test_extreme_logits_stay_finite():
    views = np.array([[[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]]])
    assert np.isfinite(average_views(views)).all()


@pytest.mark.parametrize("mean", ["probabilities", "logits"])
def test_absent_views_do_not_count(mean):
    logits = np.random.default_rng(0).normal(size=(3, 4, 5))
    present = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=bool)
    joined = average_views(np.where(present[..., None], logits, np.nan), mean=mean, present=present)
    np.testing.assert_allclose(joined[0], average_views(logits[:1, :2], mean=mean)[0])
    assert np.isnan(joined[2]).all()
    scores(joined, np.array([0, 1, 2]), ~present.any(1), names(5))
    with pytest.raises(ValueError, match="video 2"):
        scores(joined, np.array([0, 1, 2]), np.zeros(3, bool), names(5))


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (np.zeros((3, 4)), {}, "a single view is"),
        (np.zeros((3, 0, 4)), {}, "V >= 1"),
        (np.zeros((3, 2, 4)), {"mean": "median"}, "'median'"),
        (np.zeros((3, 2, 4)), {"present": np.ones((3, 3), bool)}, "present is bool"),
        (np.full((3, 2, 4), math.nan), {}, r"0, 0 hold NaN"),
    ],
)
def test_bad_views_are_explained(logits, options, message):
    with pytest.raises(ValueError, match=message):
        average_views(logits, **options)
