"""Report on a packed set: what it is made of, what is wrong with it; exit 1 past a threshold or if it is damaged. Given again, it continues.

python -m jobs.quality URL [--out FOLDER] [--frames 8] [--config FILE] [--set quality.max_static_share=0.05]
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.config import Config, override, read_file
from vidfuse.on_ray import quality
from vidfuse.on_ray.storage import join


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("url", metavar="URL", help="of the set: the folder or s3://bucket/prefix that jobs.pack wrote")
    parser.add_argument("--out", metavar="FOLDER", help="folder or URL of the report (default runs/quality/<set>-<version>)")
    parser.add_argument("--frames", type=int, default=8, help="frames of a video that are looked at (default %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="a config file; its section `quality` has the thresholds")
    cli.add_set(parser)
    options = parser.parse_args(argv)
    config = override(read_file(options.config) if options.config else Config(), options.set).quality
    place = quality.prepare(options.url, options.out, options.frames)
    if not place.measured:
        cli.start_ray()
    facts = {**cli.facts(), "packed set": options.url}
    found = quality.report(place, config, facts=facts, on_progress=lambda progress: cli.say(f"quality  {progress.line()}"))
    for line in quality.lines(found):
        cli.say(line)
    cli.say(f"report: {join(place.out, 'quality.html')}")
    return 1 if found.broken or found.altered else 0


if __name__ == "__main__":
    cli.main(main)
