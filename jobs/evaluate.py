"""Score a run's best checkpoint over a split, with multi-view testing; writes result.json and report.html below the run.

python -m jobs.evaluate --run URL [--run URL ...] [--checkpoint best|last] [--set evaluate.clips=5 evaluate.crops=3]
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from vidfuse.config import override
from vidfuse.on_ray.judge import judge_together, publish
from vidfuse.on_ray.runs import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--run", required=True, metavar="URL", action="append", help="folder of a run; several are an ensemble")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    cli.add_set(parser)
    options = parser.parse_args(argv)
    folders = [RunFolder.at(url) for url in options.run]
    runs = [(folder, override(folder.config(), options.set)) for folder in folders]
    cli.start_ray()
    judgement = judge_together(runs, options.checkpoint, facts=cli.facts())
    with tempfile.TemporaryDirectory() as scratch:
        place = publish(judgement, folders[0], Path(scratch))
    for line in judgement.lines():
        cli.say(line)
    cli.say(f"report: {place}/report.html")
    return 0


if __name__ == "__main__":
    cli.main(main)
