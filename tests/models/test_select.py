"""The folder is the registry."""

from typing import Literal

import pytest

from vidfuse.models import select


def test_names_are_the_files():
    assert "r3d" in select.names("backbones") and "mean" in select.names("fusion")
    assert not any(name.startswith("_") for room in ("backbones", "fusion") for name in select.names(room))
    with pytest.raises(ValueError, match="'heads' is no room of components; rooms are backbones, fusion"):
        select.names("heads")


def test_a_new_file_is_found_and_its_options_are_checked(monkeypatch, tmp_path):
    (tmp_path / "spin.py").write_text("def build(*, widths, turns: int, fast: bool = False):\n    return turns, fast\n")
    package = __import__("vidfuse.models.fusion", fromlist=["fusion"])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert "spin" in select.names("fusion")
    assert select.build("fusion", "spin", widths={}, turns=2) == (2, False)
    with pytest.raises(ValueError, match="option turns has no default and must be given"):
        select.build("fusion", "spin", widths={})


def test_without_published_weights_there_is_nothing_to_fetch(monkeypatch, tmp_path):
    (tmp_path / "plain.py").write_text("def build(*, frames, size):\n    return frames * size\n")
    package = __import__("vidfuse.models.backbones", fromlist=["backbones"])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    assert select.build("backbones", "plain", frames=2, size=3, pretrained=False) == 6
    with pytest.raises(ValueError, match=r"plain has no published weights; its weights are null \(random\) or a file"):
        select.build("backbones", "plain", frames=2, size=3, pretrained=True)


def test_an_unknown_name_lists_the_close_one_first():
    with pytest.raises(
        ValueError, match=r"no 'cross_atention' \(did you mean cross_attention\?\); there are: cross_attention, "
    ):
        select.build("fusion", "cross_atention", widths={})


def test_options_describe():
    described = select.options("fusion", "cross_attention")
    assert "widths" not in described
    assert str(described["heads"]) == "a whole number = 8"
    assert str(described["direction"]) == "one of 'both', 'semantic_to_motion', 'motion_to_semantic' = 'both'"
    assert described["mlp_ratio"].allowed == "a number or null"


def test_an_unknown_option_lists_the_valid_ones_with_defaults():
    with pytest.raises(
        ValueError, match=r"cross_attention: 'head' is no option \(did you mean heads\?\).*heads: a whole number = 8; "
    ):
        select.build("fusion", "cross_attention", widths={"semantic": 8, "motion": 8}, head=4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": "8"}, "option heads is a whole number, given '8'"),
        ({"heads": 8.0}, "option heads is a whole number, given 8.0"),
        ({"heads": True}, "option heads is a whole number, given True"),
        ({"heads": None}, "option heads is a whole number, given None"),
        ({"dropout": "a"}, "option dropout is a number"),
        ({"mlp_ratio": "a"}, "option mlp_ratio is a number or null"),
        ({"pool": "max"}, "option pool is one of 'concat', 'mean', 'attentive', given 'max'"),
    ],
)
def test_a_value_of_another_type_names_what_is_allowed(options, said):
    with pytest.raises(ValueError, match=said):
        select.check_options("fusion", "cross_attention", options)


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, float, True),
        (True, float, False),
        (True, bool, True),
        (1, bool, False),
        ("a", str, True),
        (None, int | None, True),
        ([1, 2], tuple[int, ...], True),
        ((1, "a"), tuple[int, ...], False),
        ((1, 2), tuple[int, int, int], False),
        ((1, "a"), tuple[int, str], True),
        (1, Literal["a", 1], True),
        (True, Literal[1, 2], False),
        (object(), object, True),
    ],
)
def test_types(value, hint, fits):
    assert select._fits(value, hint) is fits


def test_numbers_are_taken_where_a_fraction_is_wanted():
    select.check_options("fusion", "cross_attention", {"dropout": 0, "mlp_ratio": None, "heads": 4})
