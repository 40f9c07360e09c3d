"""Draw what augmentation does to videos: a contact sheet (PNG), a row of frames a clip, with its parameters above it.

python -m jobs.augment VIDEO [VIDEO ...] --out sheet.png --set data.augment.rand_augment={} data.augment.erasing={}
python -m jobs.augment VIDEO [VIDEO ...] --out sheet.png --show colours
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from vidfuse.config import ConfigError, from_mapping, override
from vidfuse.data.sheet import SHOWS, draw_sheet, png, rows_of
from vidfuse.data.video import DecodeError


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("videos", metavar="VIDEO", nargs="+", type=Path)
    parser.add_argument("--out", required=True, type=Path, metavar="PNG", help="the sheet")
    parser.add_argument("--show", choices=SHOWS, default="draws", help="`draws` of the config, or single transforms")
    cli.add_set(parser)
    options = parser.parse_args(argv)
    config = override(from_mapping({"data": {"frames": 8, "size": 96}}), options.set)
    try:
        rows = list(rows_of(options.show, [path.read_bytes() for path in options.videos], config))
        options.out.write_bytes(png(draw_sheet(rows)))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; give videos that can be read, and a folder that is there"
        ) from None
    except DecodeError as error:
        raise ConfigError(f"{', '.join(map(str, options.videos))}: {error}") from None
    cli.say(f"{len(rows)} rows: {options.out}")
    return 0


if __name__ == "__main__":
    cli.main(main)
