"""Search spaces: a dotted path of the config -> what values it may take, and when it is asked for at all.

Comes in: a name (`fusion`, `optim`, `regularisation`, `everything`) or a YAML file. Goes out: a `Space`, held to the config it is searched
from. A space is data:

    model.fusion.name: {choices: [cross_attention, concat]}
    model.fusion.heads: {choices: [4, 8, 16], when: {model.fusion.name: [cross_attention]}}
    train.learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}
    model.fusion.layers: {low: 1, high: 4, when: {model.fusion.name: [cross_attention]}}

A range with whole ends is one of whole numbers. `when` names parameters that come before, and the values of them for which this
one is asked for; elsewhere it is not set.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tuning.options import HEADS, exchange_width, in_effect
from vidfuse.config import Config, ConfigError, override
from vidfuse.models import select
from vidfuse.on_ray import preflight

BOTTLENECKS = (1 / 8, 1 / 4, 1 / 2)
"""Widths inside an exchange that they try, as shares of the wider stream's."""
OWN = ("seed", "run.name", "run.storage")
"""What the search sets for each trial; a space may not."""
Value = bool | int | float | str | None
Values = dict[str, Value]


class Suggests(Protocol):
    """What of an Optuna trial a space uses."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float: ...


class Parameter(BaseModel):
    """What values a path may take: `choices`, or a range from `low` to `high`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[Value, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    """Whether a range is drawn from on a logarithmic scale."""
    step: int | float | None = None
    """Distance of the values of a range. `None`: 1 of whole numbers, any of others."""
    when: dict[str, tuple[Value, ...]] = {}
    """Earlier parameters, and their values for which this one is asked for."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Parameter:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("give choices: [a, b], or low and high")
        if self.choices is not None:
            if not self.choices or len({json.dumps(value) for value in self.choices}) < len(self.choices):
                raise ValueError(f"choices are at least one, each once, given {list(self.choices)}")
            if self.log or self.step is not None or self.low is not None or self.high is not None:
                raise ValueError("choices have no low, high, log or step")
            return self
        assert self.low is not None and self.high is not None
        if not self.low < self.high:
            raise ValueError(f"low is below high, given {self.low:g} and {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range begins above 0 and has no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Value, ...]:
        """All choices, or both ends."""
        return self.choices if self.choices is not None else (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Whether it is a value that it may take."""
        if self.choices is not None:
            return any(value == choice and type(value) is type(choice) for choice in self.choices)
        assert self.low is not None and self.high is not None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        step = self.step or (1 if self.whole else None)
        return self.low <= value <= self.high and (step is None or abs((value - self.low) / step % 1 - 0.5) > 0.5 - 1e-9)

    def suggest(self, trial: Suggests, path: str) -> Value:
        """A value for a trial."""
        if self.choices is not None:
            chosen: Value = trial.suggest_categorical(path, list(self.choices))
            return chosen
        assert self.low is not None and self.high is not None
        if self.whole:
            return trial.suggest_int(path, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(path, self.low, self.high, step=self.step, log=self.log)


@dataclass(frozen=True)
class Space:
    """Parameters by path, in the order in which they are asked for."""

    name: str
    parameters: Mapping[str, Parameter]

    def suggest(self, trial: Suggests) -> Values:
        """Values for a trial; those that are not asked for are not there."""
        values: Values = {}
        for path, parameter in self.parameters.items():
            if asked(parameter, values):
                values[path] = parameter.suggest(trial, path)
        return values

    def within(self, config: Config) -> Values:
        """The values of a config that the space allows; the others are not there."""
        tree, values = config.model_dump(mode="json"), Values()
        tree["model"]["fusion"] |= {
            option: in_effect(config, option) for option in select.options("fusion", config.model.fusion.name)
        }
        for path, parameter in self.parameters.items():
            value: Any = tree
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if asked(parameter, values) and parameter.holds(value):
                values[path] = value
        return values

    def to_json(self) -> dict[str, Any]:
        """The space as data."""
        return {path: parameter.model_dump(mode="json", exclude_defaults=True) for path, parameter in self.parameters.items()}


def asked(parameter: Parameter, values: Mapping[str, Value]) -> bool:
    """Whether a parameter is asked for where others have these values."""
    return all(path in values and values[path] in allowed for path, allowed in parameter.when.items())


def settings(values: Mapping[str, Value]) -> list[str]:
    """Values as `--set` takes them."""
    return [f"{path}={json.dumps(value)}" for path, value in values.items()]


NAMED: dict[str, Callable[[Config], dict[str, Parameter]]] = {}


def named(make: Callable[[Config], dict[str, Parameter]]) -> Callable[[Config], dict[str, Parameter]]:
    """Register a space under its function's name; the function takes the config that is searched from."""
    NAMED[make.__name__] = make
    return make


@named
def fusion(base: Config) -> dict[str, Parameter]:
    """How streams are joined, with how many attention heads and layers, through how narrow a bottleneck; and the learning rate, to a tenth
    and ten times the base's.

    What the base's streams or its budget of parameters do not allow is left out.
    """
    names = [name for name in select.names("fusion") if _builds(base, name)]
    found = {"model.fusion.name": Parameter(choices=tuple(names))}
    bottlenecks = tuple(sorted({exchange_width(base, share, max(HEADS)) for share in BOTTLENECKS}))
    options = {
        "heads": Parameter(choices=HEADS),
        "layers": Parameter(low=1, high=3),
        "bottleneck": Parameter(choices=bottlenecks),
    }
    for option, values in options.items():
        having = tuple(
            n
            for n in names
            if option in select.options("fusion", n) and all(_builds(base, n, **{option: end}) for end in values.ends)
        )
        if having:
            found[f"model.fusion.{option}"] = values.model_copy(update={"when": {"model.fusion.name": having}})
    return found | _learning_rate(base)


@named
def optim(base: Config) -> dict[str, Parameter]:
    """Learning rate, weight decay, warmup, clipping; how rates fall with depth, where a backbone is trained."""
    trained = any(part is not None and not part.frozen for part in (base.model.semantic, base.model.motion))
    return {
        **_learning_rate(base),
        "train.weight_decay": Parameter(low=1e-3, high=0.3, log=True),
        "train.warmup_epochs": Parameter(low=0.0, high=max(base.train.epochs / 5, 0.5)),
        "train.clip_norm": Parameter(choices=(None, 0.5, 1.0, 5.0)),
        **({"train.layer_decay": Parameter(choices=(None, 0.65, 0.75, 0.9))} if trained else {}),
    }


@named
def regularisation(base: Config) -> dict[str, Parameter]:
    """Dropouts, label smoothing, weight decay, and an average of the weights."""
    dropout = (
        {"model.fusion.dropout": Parameter(low=0.0, high=0.5)}
        if "dropout" in select.options("fusion", base.model.fusion.name)
        else {}
    )
    return {
        **dropout,
        "model.head_dropout": Parameter(low=0.0, high=0.5),
        "train.label_smoothing": Parameter(low=0.0, high=0.3),
        "train.weight_decay": Parameter(low=1e-3, high=0.3, log=True),
        "train.ema_decay": Parameter(choices=(None, 0.99, 0.999)),
    }


@named
def everything(base: Config) -> dict[str, Parameter]:
    """All of them."""
    found = fusion(base) | optim(base) | regularisation(base)
    names = found["model.fusion.name"].choices or ()
    with_dropout = tuple(name for name in names if "dropout" in select.options("fusion", str(name)))
    if with_dropout:
        found["model.fusion.dropout"] = Parameter(low=0.0, high=0.5, when={"model.fusion.name": with_dropout})
    return found


def space_of(name: str, base: Config) -> Space:
    """A space, held to the config that it is searched from.

    Args:
        name: of `NAMED`, or a YAML file.
        base: config that trials change.

    Raises:
        ConfigError: no such space or file, an empty one, a path that the config has not, a value that it refuses.
    """
    if name.endswith((".yaml", ".yml")):
        space = Space(Path(name).stem, _read(name))
    elif name in NAMED:
        space = Space(name, NAMED[name](base))
    else:
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"--space: there is no {name!r}{hint}; there are: {', '.join(sorted(NAMED))}, or give a YAML file")
    _check(space, base)
    return space


def _check(space: Space, base: Config) -> None:
    """Build, on the meta device, what each choice and each end of a range comes to, all else being first choices."""
    if not space.parameters:
        raise ConfigError(f"--space {space.name}: it is empty; name at least one path of the config")
    known: list[str] = []
    for path, parameter in space.parameters.items():
        if path in OWN:
            raise ConfigError(f"--space {space.name}: {path} is each trial's own; leave it out")
        for other, allowed in parameter.when.items():
            if other not in known:
                raise ConfigError(f"--space {space.name}: {path}: when names {other}, which is not a parameter before it")
            of = space.parameters[other]
            strange = [value for value in allowed if of.choices is not None and value not in of.choices]
            if strange or not allowed:
                raise ConfigError(
                    f"--space {space.name}: {path}: when gives {other} the values {list(allowed)}; it has {list(of.ends)}"
                )
        known.append(path)
        for value in parameter.ends:
            values = _with(space, path, value)
            try:
                config = override(base, settings(values))
                if any(name.startswith("model.") for name in values):  # no other section changes what is built
                    preflight.check_model(config)
            except ConfigError as error:
                raise ConfigError(f"--space {space.name}: {path}={json.dumps(value)}: {error}") from None


def _with(space: Space, path: str, value: Value) -> Values:
    """The least that has to be set so that a parameter is asked for, and its value."""
    values: Values = {}
    for other, allowed in space.parameters[path].when.items():
        values |= _with(space, other, allowed[0])
    return values | {path: value}


def _learning_rate(base: Config) -> dict[str, Parameter]:
    rate = base.train.learning_rate
    return {"train.learning_rate": Parameter(low=float(f"{rate / 10:.3g}"), high=float(f"{rate * 10:.3g}"), log=True)}


def _builds(base: Config, name: str, **options: Value) -> bool:
    changes: Values = {"model.fusion.name": name, **{f"model.fusion.{option}": value for option, value in options.items()}}
    try:
        preflight.check_model(override(base, settings(changes)))
    except ConfigError:
        return False
    return True


def _read(path: str) -> dict[str, Parameter]:
    try:
        tree = OmegaConf.to_container(OmegaConf.create(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"--space {path}: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--space {path}: not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--space {path}: a mapping of paths is needed, as `train.learning_rate: {{low: 1e-4, high: 1e-2, log: true}}`"
        )
    found = {}
    for name, entry in tree.items():
        try:
            found[str(name)] = Parameter.model_validate(entry)
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(str(step) for step in (name, *fault["loc"]))
            raise ConfigError(f"--space {path}: {where}: {fault['msg'].removeprefix('Value error, ')}") from None
    return found
