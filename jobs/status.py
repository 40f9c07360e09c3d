"""List the runs on a storage: state, epoch, step, best validation, when each was last heard of. No cluster is asked.

python -m jobs.status URL [--json]
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict

from jobs import cli
from vidfuse.on_ray.standing import runs_below


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("url", help="a storage of runs (run.storage), or one run")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args(argv)
    now = time.time()
    runs = list(runs_below(options.url, now=now))
    for run in runs:
        if options.json:
            cli.say(json.dumps(asdict(run)))
            continue
        best = "-" if run.best_top1 is None else f"{run.best_top1:.4f}"
        heard = "-" if run.heard is None else f"{now - run.heard:,.0f} s ago"
        cli.say(
            f"{run.name:<44} {run.state:<14}epoch {run.epoch}/{run.epochs}  step {run.step}  best top-1 {best}  heard {heard}"
        )
    if not runs and not options.json:
        cli.say(f"no run is in {options.url}")
    return 0


if __name__ == "__main__":
    cli.main(main)
