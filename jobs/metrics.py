"""List the metrics that Prometheus is given, as a Markdown table.

python -m jobs.metrics
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.on_ray import metrics


def main(argv: Sequence[str] | None = None) -> int:
    cli.parser(__doc__).parse_args(argv)
    for line in metrics.markdown():
        cli.say(line)
    return 0


if __name__ == "__main__":
    cli.main(main)
