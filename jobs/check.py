"""Verify a packed set against its manifest: one line for each fault, exit 1 if there is any.

python -m jobs.check URL [--no-decode]
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.on_ray import checking


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("url", metavar="URL", help="of the set: the folder or s3://bucket/prefix that jobs.pack wrote")
    parser.add_argument("--no-decode", action="store_true", help="do not decode the videos (all else is read and verified)")
    options = parser.parse_args(argv)
    manifest = checking.open_set(options.url)
    cli.start_ray()
    faults = checking.check(options.url, decoding=not options.no_decode)
    for fault in faults:
        cli.say(fault)
    samples = sum(split.samples for split in manifest.splits.values())
    cli.say(
        f"{len(faults)} faults in {samples} samples" if faults else f"whole: {samples} samples, {manifest.quarantined} left out"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    cli.main(main)
