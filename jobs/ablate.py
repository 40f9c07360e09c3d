"""Train a table of variants, some seeds of each, and write it with its picture; the same command again trains what is missing.

python -m jobs.ablate --preset NAME --table fusion --seeds 3 --set data.url=URL run.storage=URL [run.name=NAME]
python -m jobs.ablate --preset NAME --table rows.yaml --seeds 3 --dry-run
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from tuning import ablations
from tuning.tables import TABLES
from vidfuse.train.errors import RunError


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, config=True)
    parser.add_argument("--table", required=True, help=f"{', '.join(TABLES)}, or a YAML file {{row: [a.b=value, ...]}}")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row (default 3), from the config's seed on")
    options = parser.parse_args(argv)
    ablation = ablations.plan(cli.config_of(options), options.table, options.seeds)
    if ablation.base.data.url is not None or not options.dry_run:
        ablations.check(ablation)
    for row in ablation.rows:
        trained, total = ablation.parameters[row.name]
        cli.say(f"{row.name:<20}{trained:>14,} of {total:>14,} parameters trained  {' '.join(row.settings) or 'the base'}")
    cli.say(f"{len(ablation.cells)} trainings in {ablation.url}")
    return 0 if options.dry_run else train(ablation)


def train(ablation: ablations.Ablation) -> int:
    stop, faults, lines = cli.stop_event(), 0, [cli.ProgressLine(ablation.name)]

    def follow(cell: ablations.Cell) -> cli.ProgressLine:
        lines.append(cli.ProgressLine(cell.config.run.name))
        return lines[-1]

    cli.start_ray()
    for cell, outcome in ablations.run(ablation, facts=cli.facts(), on_progress=follow, stop=stop):
        lines[-1].close()
        faults += isinstance(outcome, RunError)
        told = (
            f"failed: {outcome}" if isinstance(outcome, RunError) else f"{outcome['state']}, best top-1 {outcome['best_top1']}"
        )
        cli.say(f"{cell.config.run.name}: {told}")
    cli.say(f"table: {ablation.url}/table.md, table.tex, table.png, table.json")
    return 1 if faults else 0


if __name__ == "__main__":
    cli.main(main)
