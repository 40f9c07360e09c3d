"""The table and the picture of several trainings of several variants."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import matplotlib.image
import pytest

from vidfuse.evaluate import drawing
from vidfuse.evaluate.comparison import Table, Variant, difference, explained, holm, latex, markdown, picture


def variant(name: str, *values: float | None, trained: int = 1, **costs: float) -> Variant:
    return Variant(name, values, trained, parameters=2 * trained, **costs)


# Mean 0.6, deviations -0.2, 0, 0.2: variance (0.04 + 0 + 0.04) / 2 = 0.04.
THREE = variant("concat", 0.4, 0.6, 0.8, trained=12_345, seconds=1234.5, clips_per_second=9.87)
# To concat 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, t = 0.2 / (0.1 / sqrt(3)) = 3.4641; of 2 degrees p = 1 - t / sqrt(2 + t * t).
BETTER = variant("50 %_{of}", 0.5, 0.8, 1.1, trained=7, seconds=4.25)
P = 1 - 12**0.5 / 14**0.5


def test_mean_and_sample_standard_deviation():
    assert THREE.mean == pytest.approx(0.6) and THREE.spread == pytest.approx(0.2)


def test_a_single_training_has_no_spread_and_none_no_mean():
    assert (variant("a", 0.5, None).mean, variant("a", 0.5, None).spread) == (0.5, None)
    assert variant("a", None, None).mean is None


def test_differences_are_paired_by_seed():
    found = difference(BETTER, THREE)
    assert (found.seeds, found.mean, found.p) == (3, pytest.approx(0.2), pytest.approx(P))
    assert found.corrected is None
    shared = difference(variant("a", None, 0.5, 0.5), variant("b", 0.1, 0.2, None))
    assert (shared.seeds, shared.mean, shared.p) == (1, pytest.approx(0.3), None)
    assert difference(variant("a", None, 0.5), variant("b", 0.1, None)) is None


def test_equal_differences_are_not_tested():
    assert difference(variant("a", 0.3, 0.5, 0.8), variant("b", 0.1, 0.3, 0.6)).p is None  # 0.2 each, up to rounding
    assert difference(THREE, THREE).p is None


def test_holms_correction():
    """By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04, which is raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_table_corrects_for_the_tests_it_makes():
    worse = variant("worse", 0.3, 0.1, 0.5)
    table = Table([THREE, BETTER, variant("soon", None, None, None), worse], figure="top-1", seeds=(0, 1, 2))
    own, better, soon, other = table.differences
    assert own is soon is None and better.p < other.p
    assert (better.corrected, other.corrected) == (pytest.approx(2 * better.p), pytest.approx(max(2 * better.p, other.p)))
    assert table.differences[1] == Table([THREE, BETTER, worse], figure="", seeds=(0, 1, 2)).differences[1]
    last = Table([BETTER, THREE], figure="top-1", seeds=(0, 1, 2), reference=1)
    assert last.differences[1] is None and last.differences[0].corrected == pytest.approx(P)


def test_the_table_shows_every_training():
    table = Table([THREE, BETTER, variant("a|b", 0.125, None, None)], figure="top-1", seeds=(3, 4, 5))
    assert markdown(table) == [
        "| variant | trained parameters | all parameters | seconds | clips/s | top-1, mean ± s.d. | seeds 3, 4, 5 "
        "| difference to concat | p |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| concat | 12,345 | 24,690 | 1,234 | 9.9 | 60.0 ± 20.0 | 40.0, 60.0, 80.0 | - | - |",
        "| 50 %_{of} | 7 | 14 | 4.2 | - | 80.0 ± 30.0 | 50.0, 80.0, 110.0 | +20.0 | 0.074 |",
        r"| a\|b | 1 | 2 | - | - | 12.5 | 12.5, -, - | -27.5 | - |",
    ]


def test_latex_has_the_same_figures():
    table = Table([THREE, BETTER, variant("a|b", 0.125, None, None)], figure="top-1", seeds=(3, 4, 5))
    assert latex(table) == [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lrrrrrrrr}",
        r"\toprule",
        r"variant & trained parameters & all parameters & seconds & clips/s & top-1, mean $\pm$ s.d. & seeds 3, 4, 5 "
        r"& difference to concat & p \\",
        r"\midrule",
        r"concat & 12,345 & 24,690 & 1,234 & 9.9 & 60.0 $\pm$ 20.0 & 40.0, 60.0, 80.0 & - & - \\",
        r"50 \%\_\{of\} & 7 & 14 & 4.2 & - & 80.0 $\pm$ 30.0 & 50.0, 80.0, 110.0 & $+20.0$ & 0.074 \\",
        r"a\textbar{}b & 1 & 2 & - & - & 12.5 & 12.5, -, - & $-27.5$ & - \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]


def test_what_so_few_seeds_can_tell_is_said():
    """Student's t of 2 degrees is 4.303 at 0.975; 4.303 / sqrt(3) = 2.48."""
    assert "2.5 times its own standard deviation" in explained(Table([THREE, BETTER], figure="top-1", seeds=(3, 4, 5)))
    assert "takes 3 seeds" in explained(Table([variant("a", 0.5, 0.6), variant("b", 0.1, 0.5)], figure="top-1", seeds=(0, 1)))


def test_the_pictures_label_is_in_it():
    made = picture([THREE], figure="best validation top-1", chance=0.0714)
    made.draw_without_rendering()
    label = made.axes[0].xaxis.label.get_window_extent()
    assert "guessing (7.1%)" in made.axes[0].get_xlabel()
    assert 0 <= label.x0 < label.x1 <= made.bbox.x1 and label.y0 >= 0


def test_the_picture_spans_mean_plus_and_minus_one_deviation():
    axes = picture([THREE, variant("none yet", None, None, None)], figure="top-1", chance=0.1).axes[0]
    bars = axes.collections[0].get_segments()
    assert len(axes.collections) == 1 and bars[0][:, 0] == pytest.approx([0.4, 0.8])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["concat", "none yet"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first variant is on top


@pytest.mark.parametrize("variants", [[THREE], [variant("$x^", None)], [variant("one", 0.0), THREE]])
def test_the_picture_is_valid(variants):
    figure = picture(variants, figure="top-1 $", chance=None)
    assert matplotlib.image.imread(io.BytesIO(drawing.png(figure, dpi=40))).ndim == 3
    shown = "".join(ET.fromstring(drawing.svg(figure)).itertext())
    assert all(v.name in shown for v in variants) and "top-1 $" in shown
