"""Search heads, fusion, learning rate or any other field; the same command again goes on where the search ended.

python -m jobs.tune --preset NAME --space fusion --trials 24 --set data.url=URL run.storage=URL [data.features=auto]
python -m jobs.tune --preset NAME --space space.yaml --dry-run
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from tuning import answers, search, spaces
from vidfuse.config import SearchConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__, config=True)
    parser.add_argument(
        "--space", required=True, help=f"{', '.join(spaces.NAMED)}, or a YAML file {{path: {{low: 1, high: 4}}}}"
    )
    cli.add_fields(parser, SearchConfig)
    options = parser.parse_args(argv)
    base = cli.config_of(options)
    wanted = search.Search(base, spaces.space_of(options.space, base), cli.fields_of(options, SearchConfig))
    for path, parameter in wanted.space.parameters.items():
        cli.say(f"{path:<32}{parameter.model_dump_json(exclude_defaults=True)}")
    if base.data.url is not None or not options.dry_run:
        search.check(wanted)
    if options.dry_run:
        return 0
    cli.start_ray()
    facts = cli.facts()
    study = search.run(wanted, facts=facts, on_told=cli.say)
    for line in answers.write(wanted, study, facts):
        cli.say(line)
    return 0


if __name__ == "__main__":
    cli.main(main)
