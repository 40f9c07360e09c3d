"""The whole main path on this machine: an S3 server, rendered videos, packing, training on Ray, evaluation.

    python -m jobs.demo [--folder runs/demo]

A frozen appearance stream and a trained motion stream, joined by cross-attention, learn motions that no single frame shows; the
same budget on single frames shows that. Everything is below the folder; the same command again continues or says what there is.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import cli, local_store
from vidfuse import presets
from vidfuse.config import Config, override
from vidfuse.data.layouts import read_layout
from vidfuse.on_ray import fit, preflight
from vidfuse.on_ray.judge import judge, publish
from vidfuse.on_ray.packing import OtherSetError, Packed, pack, prepare
from vidfuse.on_ray.runs import RunFolder
from vidfuse.train.errors import RunError

TRAIN, VALIDATION = 1092, 252
"""Videos of the splits."""
BUCKET = "vidfuse"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything goes (default runs/demo)")
    folder = parser.parse_args(argv).folder
    started = time.monotonic()
    with rendering(folder / "videos") as wait_for_videos, local_store.running(folder / "store", BUCKET):
        cli.start_ray()
        wait_for_videos()
        cli.say("packing them to S3")
        packed = pack_videos(folder, f"s3://{BUCKET}/packed")
        cli.say(f"{sum(split.samples for split in packed.manifest.splits.values())} samples in shards")
        figures = train(presets.demo())
        single = train(presets.demo_single_frame())
        result = evaluate(folder)
    report = folder / "report.html"
    result |= {key: figures[key] for key in ("workers", "zero_stage", "steps", "clips_per_second", "data_wait_fraction")}
    result |= {"single_frame_top1": single["best_top1"], "seconds_total": round(time.monotonic() - started, 1)}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    cli.say(json.dumps(result, indent=1))
    cli.say(f"report: {report}")
    return 0


@contextlib.contextmanager
def rendering(folder: Path) -> Iterator[Callable[[], None]]:
    """Render the videos in a process of their own while the servers come up; gives what waits for them."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.render", str(folder), "--train", str(TRAIN), "--validation", str(VALIDATION)]
    )

    def wait() -> None:
        if process.wait():
            raise RunError(f"the videos were not rendered (exit code {process.returncode}); what is there stays in {folder}")

    try:
        yield wait
    finally:
        process.send_signal(signal.SIGINT)  # so that it ends its own processes
        process.wait()


def pack_videos(folder: Path, url: str) -> Packed:
    """Pack what was rendered."""
    try:
        return pack(prepare(read_layout(folder / "videos", "ssv2"), folder / "videos", url))
    except OtherSetError as error:
        raise OtherSetError(
            f"{folder} holds the demo of another version of vidfuse ({error}): remove the folder, or give another one with --folder"
        ) from None


def train(config: Config) -> dict[str, Any]:
    """Train a preset on the packed videos."""
    config = override(config, [f"data.url=s3://{BUCKET}/packed", f"run.storage=s3://{BUCKET}/runs"])
    preflight.check(config)
    line = cli.ProgressLine(config.run.name)
    try:
        return fit.fit(config, facts=cli.facts(), on_progress=line, stop=cli.stop_event())
    finally:
        line.close()


def evaluate(folder: Path) -> dict[str, Any]:
    """Score the best checkpoint with two temporal views; the report and the figures."""
    run = RunFolder.at(f"s3://{BUCKET}/runs/demo")
    judgement = judge(run, override(run.config(), ["evaluate.clips=2"]), "best", facts=cli.facts())
    with tempfile.TemporaryDirectory() as scratch:
        publish(judgement, run, Path(scratch))
        (folder / "report.html").write_bytes((Path(scratch) / "out" / "report.html").read_bytes())
    for line in judgement.lines():
        cli.say(line)
    scores, counts = judgement.scores, judgement.result()
    kept = {key: counts[key] for key in ("samples_scored", "samples_in_manifest")}
    return {"top1": scores.top1.value, "top5": scores.top5.value, "chance": scores.chance.best, **kept}


if __name__ == "__main__":
    cli.main(main)
