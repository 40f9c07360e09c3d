"""The table and the picture of several trainings of several variants."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET

import matplotlib.image
import pytest

from vidfuse.evaluate import drawing
from vidfuse.evaluate.comparison import Variant, markdown, picture

# Mean 0.6, deviations -0.2, 0, 0.2: variance (0.04 + 0 + 0.04) / 2 = 0.04.
THREE = Variant("concat", 12_345, (0.4, 0.6, 0.8))


def test_mean_and_sample_standard_deviation():
    assert THREE.mean == pytest.approx(0.6) and THREE.spread == pytest.approx(0.2)


def test_a_single_training_has_no_spread_and_none_no_mean():
    assert (Variant("a", 1, (0.5, None)).mean, Variant("a", 1, (0.5, None)).spread) == (0.5, None)
    assert Variant("a", 1, (None, None)).mean is None


def test_the_table_shows_every_training():
    lines = markdown([THREE, Variant("a|b", 7, (0.125, None, None))], figure="top-1", seeds=(3, 4, 5))
    assert lines == [
        "| variant | trained parameters | top-1, mean of seeds | standard deviation | seed 3 | seed 4 | seed 5 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| concat | 12,345 | 60.0 | 20.0 | 40.0 | 60.0 | 80.0 |",
        r"| a\|b | 7 | 12.5 | - | 12.5 | - | - |",
    ]


def test_the_picture_spans_mean_plus_and_minus_one_deviation():
    axes = picture([THREE, Variant("none yet", 7, (None, None, None))], figure="top-1", chance=0.1).axes[0]
    bars = axes.collections[0].get_segments()
    assert len(axes.collections) == 1 and bars[0][:, 0] == pytest.approx([0.4, 0.8])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["concat", "none yet"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first variant is on top


@pytest.mark.parametrize("variants", [[THREE], [Variant("$x^", 1, (None,))], [Variant("one", 1, (0.0,)), THREE]])
def test_the_picture_is_valid(variants):
    figure = picture(variants, figure="top-1 $", chance=None)
    assert matplotlib.image.imread(io.BytesIO(drawing.png(figure, dpi=40))).ndim == 3
    shown = "".join(ET.fromstring(drawing.svg(figure)).itertext())
    assert all(v.name in shown for v in variants) and "top-1 $" in shown
