"""What every part of the config tree is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A config that cannot be: the message has the dotted path, what was given, what is allowed and what to do."""


class Section(BaseModel):
    """A frozen part of the tree; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def check_range(name: str, pair: tuple[float, float], most: float) -> None:
    """Hold a pair of bounds.

    Raises:
        ValueError: not 0 < smallest <= largest <= `most`.
    """
    if not 0 < pair[0] <= pair[1] <= most:
        raise ValueError(
            f"{name} is (smallest, largest) with 0 < smallest <= largest <= {most:g}, given ({pair[0]:g}, {pair[1]:g})"
        )
