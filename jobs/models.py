"""List the presets: what they are made of, their parameters, and what a clip costs, as a Markdown table.

python -m jobs.models
python -m jobs.models --feeding TFLOPS CLIPS_PER_CORE   (of a GPU as it is reached, of a CPU core: what feeds what)
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse import presets
from vidfuse.on_ray import preflight
from vidfuse.train import plan


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--feeding", nargs=2, type=float, metavar=("TFLOPS", "CLIPS"), help="CPU cores that keep a GPU busy")
    options = parser.parse_args(argv)
    for line in feeding(*options.feeding) if options.feeding else table():
        cli.say(line)
    return 0


def table() -> list[str]:
    """The table's lines."""
    configs = {name: presets.get(name) for name in presets.PRESETS}
    return [
        *plan.PRESET_HEAD,
        *(plan.preset_row(name, config, preflight.check_model(config)) for name, config in configs.items()),
    ]


def feeding(tflops: float, clips: float) -> list[str]:
    """The lines of the table of what feeds a GPU."""
    given = {"tflops": tflops, "clips_per_core": clips}
    configs = {name: presets.get(name) for name in presets.PRESETS if not name.startswith("demo")}
    return [*plan.FEEDING_HEAD, *(plan.feeding_row(n, c, preflight.check_model(c), **given) for n, c in configs.items())]


if __name__ == "__main__":
    cli.main(main)
