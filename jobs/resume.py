"""Continue a run by its name, with the config that it saved; a finished one says what it has.

python -m jobs.resume s3://bucket/runs/NAME [--set train.epochs=20]
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli, train
from vidfuse.config import ConfigError, override
from vidfuse.on_ray.runs import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("url", help="folder of the run: its run.storage/run.name")
    cli.add_set(parser)
    options = parser.parse_args(argv)
    storage, _, name = options.url.rstrip("/").rpartition("/")
    if not storage:
        raise ConfigError(f"{options.url}: the folder of a run is needed, as s3://bucket/runs/NAME or ./runs/NAME")
    config = RunFolder.at(options.url).config()
    return train.train(override(config, [f"run.storage={storage}", f"run.name={name}", *options.set]))


if __name__ == "__main__":
    cli.main(main)
