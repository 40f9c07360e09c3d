"""Pack a folder of videos and its annotations into WebDataset shards. Given again after a crash, it continues.

python -m jobs.pack SOURCE URL [--layout ssv2|ucf101] [--shard-bytes 256MB] [--split-number 1]
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.data.layouts import LAYOUTS, read_layout
from vidfuse.on_ray import packing


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder of the data set as distributed; every machine sees it")
    parser.add_argument("url", metavar="URL", help="where the set goes: a folder or s3://bucket/prefix")
    parser.add_argument("--layout", choices=LAYOUTS, help="how the annotations are laid out (default: told from the files)")
    parser.add_argument("--shard-bytes", default="256MB", metavar="N", help="bound of a shard, such as 256MB (default)")
    parser.add_argument("--split-number", type=int, choices=(1, 2, 3), default=1, help="official split of UCF101 (default 1)")
    options = parser.parse_args(argv)
    shard_bytes = packing.parse_bytes(options.shard_bytes)
    source = read_layout(options.source, options.layout, split_number=options.split_number)
    plan = packing.prepare(source, options.source, options.url, shard_bytes)
    if not plan.finished:
        cli.start_ray()
    packed = packing.pack(plan, on_progress=lambda progress: cli.say(f"pack  {progress.line()}"))
    for line in packed.lines(options.url):
        cli.say(line)
    if source.unlisted:
        cli.say(f"{source.unlisted} videos of the folder are in no list and were not packed")
    return 0


if __name__ == "__main__":
    cli.main(main)
