"""Render the synthetic motion set: encoded videos and annotations as Something-Something-V2 has them; then `jobs.pack` it.

python -m jobs.render FOLDER [--train 1092] [--validation 252] [--test 0] [--seed 0]

The same command again renders what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from vidfuse.config import ConfigError
from vidfuse.data.synthetic import render


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where the videos and their annotations go")
    parser.add_argument("--train", type=int, default=1092, help="videos to train on (default %(default)s)")
    parser.add_argument("--validation", type=int, default=252, help="videos to validate on (default %(default)s)")
    parser.add_argument("--test", type=int, default=0, help="videos without a label (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="source of every draw (default %(default)s)")
    options = parser.parse_args(argv)
    cli.say(f"rendering {options.train + options.validation + options.test} videos")
    try:
        render(options.folder, train=options.train, validation=options.validation, test=options.test, seed=options.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


if __name__ == "__main__":
    cli.main(main)
