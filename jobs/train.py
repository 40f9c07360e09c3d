"""Train a recogniser; the same command again continues from the last checkpoint.

python -m jobs.train --preset NAME --set data.url=URL run.storage=URL run.name=NAME
python -m jobs.train --preset NAME --dry-run
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli, plan
from vidfuse.config import Config
from vidfuse.on_ray import fit, preflight


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, config=True)
    cli.add_restarts(parser)
    options = parser.parse_args(argv)
    config = cli.config_of(options)
    if options.dry_run:
        plan.show(config)
        return 0
    return cli.restarted(options.restarts) if options.restarts else train(config)


def train(config: Config) -> int:
    """Train, or say what a finished run has; the exit code."""
    manifest = preflight.check(config).manifest
    cli.say(f"{config.run.name} on {manifest.dataset}, version {manifest.version}")
    cli.start_ray()
    stop = cli.stop_event()
    line = cli.ProgressLine(config.run.name)
    try:
        result = fit.fit(config, facts=cli.facts(), on_progress=line, stop=stop)
    finally:
        line.close()
    folder = f"{config.run.storage}/{config.run.name}"
    cli.say(f"{result['state']} after {result['steps']} steps, best top-1 {result['best_top1']}: {folder}/report.html")
    return 0


if __name__ == "__main__":
    cli.main(main)
