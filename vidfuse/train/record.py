"""What a run leaves for people: its folder of records.

    config.yaml      the resolved config; `--config` takes it
    run.json         git revision, versions, hardware, command, start
    metrics.jsonl    one JSON object a line: `kind` is train, validation, checkpoint or event
    tensorboard/     the same as events
    mlflow.json      which MLflow run it is, where `tracking.mlflow` is set (tracking.py)
    result.json      figures of the finished run
    report.html      the same for reading

Comes in: metrics as they happen. Goes out: files in a local folder, which `Worker.publish` puts on the run's storage.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vidfuse.config import Config
from vidfuse.evaluate.metrics import Scores
from vidfuse.train.worker import write_json

METRICS = "metrics.jsonl"


class Record:
    """The records of one run, written by rank 0.

    Args:
        folder: local folder; holds the records of the run so far when it continues.
        config: of the run.
        facts: about the run (git revision, command).
        step: of the checkpoint that the run continues from; later lines of an earlier try are dropped.
    """

    def __init__(self, folder: Path, config: Config, facts: Mapping[str, str], *, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.config = folder, config
        self.facts = {**facts, **surroundings()}
        self.lines = [line for line in read_metrics(folder / METRICS) if line.get("step", 0) <= step]
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        (folder / "config.yaml").write_text(config.to_yaml())
        write_json(folder / "run.json", self.facts)
        self._step = step

    @cached_property
    def _events(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # a second of imports, not to be waited for before the first step

        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=self._step + 1)

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Note values at a step; numbers become TensorBoard scalars `kind/name` too."""
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self.lines.append(line)
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in scalars(line):
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Have everything noted so far in the files."""
        self._events.flush()

    def finish(self, result: Mapping[str, Any], scores: Scores | None, errors: list[tuple[str, str, str]]) -> None:
        """Write result.json and report.html."""
        from vidfuse.evaluate.report import report  # it loads matplotlib, which a worker that starts need not wait for

        self._events.close()
        write_json(self.folder / "result.json", dict(result))
        page = report(
            title=f"{self.config.run.name}: training",
            config_yaml=self.config.to_yaml(),
            records=self.lines,
            scores=scores,
            errors=errors,
            facts=self.facts,
        )
        (self.folder / "report.html").write_text(page, encoding="utf-8")


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics, as TensorBoard and MLflow name them: `kind/name`."""
    for name, value in line.items():
        if name not in ("kind", "step", "time") and isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{line['kind']}/{name}", value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def surroundings() -> dict[str, str]:
    """Versions and hardware of this process."""
    packages = {name: version(name) for name in ("torch", "deepspeed", "ray")}
    gpu = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "none"
    return {"python": platform.python_version(), "machine": f"{platform.machine()}, GPU: {gpu}", **packages}
