"""Verify a packed set against its manifest: one line for each fault, exit 1 if there is any.

python -m jobs.check URL           reads every byte: hashes, tars, indices, labels
python -m jobs.check URL --quick   looks at names and sizes, in seconds
python -m jobs.check URL --deep    decodes every frame of every video, too
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.on_ray import checking


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("url", metavar="URL", help="of the set: the folder or s3://bucket/prefix that jobs.pack wrote")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument("--quick", dest="depth", action="store_const", const="files", help="names and sizes alone")
    depth.add_argument("--deep", dest="depth", action="store_const", const="frames", help="decode every frame, too")
    options = parser.parse_args(argv)
    manifest = checking.open_set(options.url)
    cli.say(f"{manifest.dataset}, version {manifest.version}")
    if options.depth != "files":
        cli.start_ray()
    faults = checking.check(options.url, options.depth or "bytes", on_progress=lambda p: cli.say(f"check  {p.line()}"))
    for fault in faults:
        cli.say(fault)
    samples = sum(split.samples for split in manifest.splits.values())
    cli.say(
        f"{len(faults)} faults in {samples} samples" if faults else f"whole: {samples} samples, {manifest.quarantined} left out"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    cli.main(main)
