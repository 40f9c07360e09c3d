"""Pack a folder of videos and its annotations into WebDataset shards. Given again after a crash, it continues.

python -m jobs.pack SOURCE URL [--layout kinetics] [--holdout 0.1] [--transcode --short-side 256] [--shard-bytes 256MB]
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import cli
from vidfuse.config import ConfigError, LayoutConfig, PackConfig, TranscodeConfig
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray import packing


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder of the data set as distributed; every machine sees it")
    parser.add_argument("url", metavar="URL", help="where the set goes: a folder or s3://bucket/prefix")
    cli.add_fields(parser, PackConfig, LayoutConfig, TranscodeConfig)
    options = parser.parse_args(argv)
    how, form = cli.fields_of(options, PackConfig), cli.fields_of(options, TranscodeConfig)
    if form.model_fields_set and not how.transcode:
        raise ConfigError(f"--{min(form.model_fields_set).replace('_', '-')} is for --transcode: add it, or leave both out")
    source = read_layout(packing.source_folder(options.source), how.layout, cli.fields_of(options, LayoutConfig))
    cli.say(source.line())
    plan = packing.prepare(source, options.source, options.url, how.shard_bytes, form if how.transcode else None)
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
