"""List the presets: what they are made of, their parameters, and what a clip costs, as a Markdown table.

python -m jobs.models
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse import presets
from vidfuse.on_ray import fit
from vidfuse.train import plan


def main(argv: Sequence[str] | None = None) -> int:
    cli.parser(__doc__).parse_args(argv)
    for line in table():
        cli.say(line)
    return 0


def table() -> list[str]:
    """The table's lines."""
    configs = {name: presets.get(name) for name in presets.PRESETS}
    return [*plan.PRESET_HEAD, *(plan.preset_row(name, config, fit.check_model(config)) for name, config in configs.items())]


if __name__ == "__main__":
    cli.main(main)
