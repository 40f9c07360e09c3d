"""Search spaces: what is asked for when, and what is refused before any trial."""

from __future__ import annotations

import optuna
import pytest

from jobs import tune
from tuning import spaces
from tuning.spaces import NAMED, Parameter, Space, asked, settings, space_of
from vidfuse.config import ConfigError, override
from vidfuse.presets import get


def sampled(space: Space, count: int = 60) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [space.suggest(study.ask()) for _ in range(count)]


@pytest.mark.parametrize("preset", ["demo", "ucf101_cnn_rnn"])
@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_space_fits_every_kind_of_base(name, preset):
    space = space_of(name, get(preset))
    for values in sampled(space, 10):
        override(get(preset), settings(values))
        assert all(asked(space.parameters[path], values) for path in values)


def test_heads_are_asked_for_where_there_is_attention():
    for values in sampled(space_of("fusion", get("demo"))):
        with_heads = values["model.fusion.name"] in ("attentive", "bcast", "cross_attention", "gasm_cast")
        assert ("model.fusion.heads" in values) == with_heads
        assert values.get("model.fusion.heads", 4) in (4, 8, 16)
        assert 3e-4 <= values["train.learning_rate"] <= 3e-2


def test_a_budget_of_parameters_leaves_out_what_is_above_it():
    names = space_of("fusion", get("ssv2_cross_attention")).parameters["model.fusion.name"].choices
    assert "cross_attention" in names and "gasm_cast" not in names  # 20 M parameters are allowed
    assert "model.fusion.layers" not in space_of("fusion", get("ssv2_cross_attention")).parameters


def test_ranges_are_whole_logarithmic_or_stepped():
    space = Space(
        "x",
        {
            "a": Parameter(low=1, high=9, step=4),
            "b": Parameter(low=1e-4, high=1e-1, log=True),
            "c": Parameter(low=0.0, high=1.0, step=0.25),
            "d": Parameter(choices=(None, True, 3)),
        },
    )
    values = sampled(space, 200)
    assert {v["a"] for v in values} == {1, 5, 9} and {v["c"] for v in values} == {0, 0.25, 0.5, 0.75, 1}
    assert {v["d"] for v in values} == {None, True, 3}
    assert 0.2 < sum(v["b"] < 10**-2.5 for v in values) / 200 < 0.8


def test_a_file_is_a_space(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "model.fusion.name: {choices: [concat, cross_attention]}\n"
        "model.fusion.heads: {choices: [2, 4], when: {model.fusion.name: [cross_attention]}}\n"
        "train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}\n"
    )
    space = space_of(str(path), get("demo"))
    assert space.name == "mine" and list(space.parameters)[1] == "model.fusion.heads"
    assert {frozenset(values) for values in sampled(space)} == {
        frozenset({"model.fusion.name", "train.learning_rate"}),
        frozenset({"model.fusion.name", "model.fusion.heads", "train.learning_rate"}),
    }
    assert tune.main(["--preset", "demo", "--space", str(path), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.learning_rat: {low: 1, high: 2}", "learning_rat: no such key .did you mean learning_rate"),
        ("model.fusion.heads: {choices: [4, 5]}", r"model.fusion.heads=5: .*5"),
        ("train.epochs: {low: 0, high: 2}", "train.epochs=0"),
        ("train.learning_rate: {low: 2, high: 1}", "low is below high"),
        ("train.learning_rate: {low: 0, high: 1, log: true}", "begins above 0"),
        ("train.learning_rate: {choices: []}", "at least one"),
        ("train.learning_rate: {choices: [1], low: 1}", "no low, high, log or step"),
        ("train.learning_rate: {}", "choices: .a, b., or low and high"),
        ("seed: {choices: [1, 2]}", "seed is each trial's own"),
        ("model.fusion.heads: {choices: [4], when: {model.fusion.name: [concat]}}", "which is not a parameter before it"),
        (
            "model.fusion.name: {choices: [concat]}\nmodel.fusion.heads: {choices: [4], when: {model.fusion.name: [gated]}}",
            "it has .'concat'.",
        ),
        ("[1, 2]", "a mapping of paths is needed"),
        ("{}", "it is empty"),
        ("a: {low: 1", "not YAML"),
    ],
)
def test_what_cannot_be_searched_is_told(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        space_of(str(path), get("demo"))


def test_an_unknown_space_is_told():
    with pytest.raises(ConfigError, match="did you mean fusion"):
        space_of("fusio", get("demo"))
    with pytest.raises(ConfigError, match="No such file"):
        space_of("nowhere.yaml", get("demo"))
    assert set(spaces.NAMED) == {"fusion", "optim", "regularisation", "everything"}


@pytest.mark.parametrize(
    ("parameter", "inside", "outside"),
    [
        (Parameter(choices=(None, 1.0, "a")), [None, 1.0, "a"], [1, True, "b", 2.0]),
        (Parameter(choices=(False, 2)), [False, 2], [0, 2.0]),
        (Parameter(low=1, high=7), [1, 4, 7], [0, 8, 2.0, True, "3", None]),
        (Parameter(low=1, high=7, step=3), [1, 4, 7], [2, 6]),
        (Parameter(low=0.1, high=1.0), [0.1, 0.37, 1], [0.05, 2, True]),
        (Parameter(low=0.0, high=1.0, step=0.1), [0.3, 0.7, 1.0], [0.35]),
        (Parameter(low=1e-4, high=1.0, log=True), [1e-4, 0.5], [0.0]),
    ],
)
def test_what_a_parameter_may_be(parameter, inside, outside):
    assert all(parameter.holds(value) for value in inside)
    assert not any(parameter.holds(value) for value in outside)


def test_a_configs_values_are_those_that_the_space_allows():
    base = override(get("demo"), ["model.fusion.name=cross_attention", "model.fusion.heads=8", "train.learning_rate=0.5"])
    space = Space("mine", NAMED["fusion"](get("demo")))
    values = space.within(base)
    assert values["model.fusion.name"] == "cross_attention" and values["model.fusion.heads"] == 8
    assert "train.learning_rate" not in values, "0.5 is above ten times the demo's"
    assert space.within(override(base, ["model.fusion.heads=5"])).keys() == values.keys() - {"model.fusion.heads"}
    assert space.within(get("demo"))["train.learning_rate"] == get("demo").train.learning_rate
    plain = space.within(override(base, ['model.fusion={"name": "concat"}']))
    assert plain == {"model.fusion.name": "concat"}, "what is not asked for is not there"
    tree = space.within(override(base, ['model.fusion={"name": "cross_attention"}']))
    assert tree["model.fusion.layers"] == 1, "an option that is not given has its default"


def test_a_bottleneck_is_asked_for_where_there_is_one():
    space = space_of("fusion", get("ssv2_gasm_cast"))
    found = space.parameters["model.fusion.bottleneck"]
    assert found.choices == (96, 192, 384), "768 is the wider stream's width"
    assert set(found.when["model.fusion.name"]) == {"bcast", "gasm_cast"}
