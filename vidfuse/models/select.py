"""The folders are the registry: a component's name is its file's name, its options are the parameters of its `build`.

Comes in: a room (`backbones` or `fusion`), a name and options. Goes out: the module that `vidfuse.models.<room>.<name>.build`
makes, or a ValueError that lists what there is. The idea of looking the file up by its name is big_vision's.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn

Room = Literal["backbones", "fusion"]

GIVEN: Mapping[str, frozenset[str]] = {
    "backbones": frozenset({"frames", "size", "pretrained"}),
    "fusion": frozenset({"widths", "streams"}),
}
"""Parameters of `build` that the recogniser gives itself; they are not options."""


@dataclass(frozen=True)
class OptionSpec:
    """One option of a component."""

    hint: Any
    """Its type, as annotated."""
    default: Any
    """Its default; `inspect.Parameter.empty` where it must be given."""

    @property
    def allowed(self) -> str:
        """What may be given, in words."""
        return _words(self.hint)

    def __str__(self) -> str:
        """`float = 0.1`."""
        return self.allowed if self.default is inspect.Parameter.empty else f"{self.allowed} = {self.default!r}"


def names(room: Room) -> tuple[str, ...]:
    """Names of the components of a room, sorted.

    Raises:
        ValueError: there is no such room.
    """
    if room not in GIVEN:
        raise ValueError(f"{room!r} is no room of components; rooms are {', '.join(GIVEN)}")
    package = importlib.import_module(f"vidfuse.models.{room}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


def options(room: Room, name: str) -> dict[str, OptionSpec]:
    """Options of a component with type and default, in the order of its `build`.

    Raises:
        ValueError: there is no such component.
    """
    build_it = builder(room, name)
    hints = get_type_hints(build_it)
    parameters = inspect.signature(build_it).parameters
    return {n: OptionSpec(hints.get(n, Any), p.default) for n, p in parameters.items() if n not in GIVEN[room]}


def build(room: Room, name: str, **given: Any) -> nn.Module:
    """Build a component.

    Args:
        room: `backbones` or `fusion`.
        name: File name in the room, without `.py`.
        given: What the recogniser gives (`frames`, `size`, `pretrained`; `widths`, `streams`) and the component's options. A
            backbone without published weights has no parameter `pretrained`, a fusion that takes any backbones none for `streams`.

    Raises:
        ValueError: unknown name or option, an option that is missing or of the wrong type, or one the component refuses.
    """
    specs = options(room, name)
    extra = {key: value for key, value in given.items() if key not in GIVEN[room]}
    for key, value in extra.items():
        _check(room, name, specs, key, value)
    missing = [n for n, s in specs.items() if s.default is inspect.Parameter.empty and n not in extra]
    if missing:
        raise ValueError(f"{room} {name}: option {', '.join(missing)} has no default and must be given")
    build_it = builder(room, name)
    if "pretrained" in given and "pretrained" not in inspect.signature(build_it).parameters and given.pop("pretrained"):
        raise ValueError(f"{room} {name} has no published weights; its weights are null (random) or a file")
    if "streams" not in inspect.signature(build_it).parameters:
        given.pop("streams", None)
    return build_it(**given)


def check_options(room: Room, name: str, given: Mapping[str, Any]) -> None:
    """Check options as `build` does, without building anything; what the recogniser gives is no option here.

    Raises:
        ValueError: unknown name or option, or an option of the wrong type.
    """
    specs = options(room, name)
    for key, value in given.items():
        _check(room, name, specs, key, value)


def builder(room: Room, name: str) -> Callable[..., nn.Module]:
    """The `build` of a component.

    Raises:
        ValueError: there is no such component.
    """
    known = names(room)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=len(known))
        ordered = [*near, *(n for n in known if n not in near)]
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{room}: there is no {name!r}{hint}; there are: {', '.join(ordered)}")
    return importlib.import_module(f"vidfuse.models.{room}.{name}").build


def _check(room: Room, name: str, specs: Mapping[str, OptionSpec], key: str, value: Any) -> None:
    if key not in specs:
        near = difflib.get_close_matches(key, specs, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        listed = "; ".join(f"{n}: {s}" for n, s in specs.items()) or "none"
        set_by = "; the recogniser sets it itself" if key in GIVEN[room] else ""
        raise ValueError(f"{room} {name}: {key!r} is no option{hint}{set_by}; its options are: {listed}")
    if not _fits(value, specs[key].hint):
        raise ValueError(f"{room} {name}: option {key} is {specs[key].allowed}, given {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML or a command line is of the annotated type; annotations not known here accept all."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (Union, UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        items = (args[0],) * len(value) if isinstance(value, tuple | list) and args[-1] is Ellipsis else args
        return isinstance(value, tuple | list) and len(items) == len(value) and all(map(_fits, value, items))
    if hint in (None, NoneType):
        return value is None
    if hint in (int, float):
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str) else True


def _words(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, UnionType):
        return " or ".join(_words(a) for a in args)
    if origin is tuple:
        return f"({', '.join('...' if a is Ellipsis else _words(a) for a in args)})"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null", None: "null"}
    return known.get(hint, str(hint))
