"""Check from a run's journal that each epoch used every sample once: what was repeated, missing, unreadable; exit 1 if not.

python -m jobs.audit --run URL
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.on_ray.auditing import audit_run
from vidfuse.on_ray.runs import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--run", required=True, metavar="URL", help="folder of a run: its run.storage/run.name")
    found = audit_run(RunFolder.at(parser.parse_args(argv).run))
    for line in found.lines():
        cli.say(line)
    return 0 if found.exact else 1


if __name__ == "__main__":
    cli.main(main)
