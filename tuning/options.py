"""What searches and ablations both ask of a base's fusion: its options, and what they may be.

Comes in: a config. Goes out: an option in effect, the widths that an exchange may have.
"""

from __future__ import annotations

import math
from typing import cast

from vidfuse.config import Config, Option
from vidfuse.models import select
from vidfuse.models.parts import Backbone
from vidfuse.on_ray import preflight

HEADS = (4, 8, 16)
"""Attention heads that are tried."""


def in_effect(base: Config, option: str) -> Option:
    """An option of the fusion: what is given, or its default; `None` where the fusion has none of that name."""
    spec = select.options("fusion", base.model.fusion.name).get(option)
    return base.model.fusion.options.get(option, None if spec is None else spec.default)


def exchange_width(base: Config, share: float, heads: int) -> int:
    """Width inside an exchange: a share of the wider stream's, up to the next multiple of the heads, as `bcast` has it by itself.

    Raises:
        ConfigError: the base's model cannot be built.
    """
    wider = max(cast(Backbone, stream).width for stream in preflight.check_model(base).streams.values())
    return math.ceil(wider * share / heads) * heads
