"""The table of all metrics: what Prometheus can be asked.

Comes in: nothing. Goes out: `METRICS` by name, and the README's table of them (`python -m jobs.metrics` prints it). Who tells a figure
calls it by its name here; Ray puts `PREFIX` before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

PREFIX = "ray_vidfuse_"
"""Of the names that Prometheus sees: Ray's agents put `ray_` before every metric of an application."""

Kind = Literal["gauge", "counter", "histogram"]
Teller = Literal["worker", "rank 0", "driver", "evaluation", "search"]
LABELS: Mapping[Teller, tuple[str, ...]] = {
    "worker": ("run", "rank"),
    "rank 0": ("run",),
    "driver": ("run",),
    "evaluation": ("run", "split"),
    "search": ("search",),
}
"""Labels of what each tells. `run` is `run.name`, `rank` is below the world size, `search` is a search's folder."""
BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of a histogram's buckets, in seconds."""


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    name: str
    kind: Kind
    teller: Teller
    unit: str
    meaning: str
    more: tuple[str, ...] = ()
    """Labels besides those of its teller."""
    gpu: bool = False
    """Whether there is a figure on known GPUs only."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels of it that are vidfuse's; Ray adds its own (`NodeAddress`, `WorkerId`)."""
        return (*LABELS[self.teller], *self.more)

    @property
    def full_name(self) -> str:
        """As Prometheus has it."""
        return f"{PREFIX}{self.name}"

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its series in Prometheus."""
        return tuple(f"{self.full_name}_{part}" for part in PARTS) if self.kind == "histogram" else (self.full_name,)


PARTS = ("bucket", "sum", "count")
"""Series of a histogram."""


# fmt: off
def _rows() -> Iterator[Metric]:
    yield Metric("step", "gauge", "rank 0", "steps", "optimizer steps that are in the weights; a restart goes back to its checkpoint's")
    yield Metric("planned_steps", "gauge", "rank 0", "steps", "optimizer steps of the whole run")
    yield Metric("epoch", "gauge", "rank 0", "epochs", "epochs that are over")
    yield Metric("step_seconds", "gauge", "worker", "seconds", "an optimizer step with its wait for data; mean since it was told last")
    yield Metric("clips_per_second", "gauge", "rank 0", "clips/s", "clips that all workers together train on, since it was told last")
    yield Metric("data_wait_ratio", "gauge", "worker", "0 to 1", "share of a step's time spent waiting for data")
    yield Metric("loss", "gauge", "rank 0", "", "training loss of the newest step that was looked at; none while it is not finite")
    yield Metric("nonfinite_losses_total", "counter", "rank 0", "steps", "looked-at steps whose loss, or gradient (not fp16), is not finite")
    yield Metric("accuracy_ratio", "gauge", "rank 0", "0 to 1", "training accuracy of the newest step that was looked at")
    yield Metric("gradient_norm", "gauge", "rank 0", "", "norm of the gradient, before clipping")
    yield Metric("learning_rate", "gauge", "rank 0", "", "the schedule's learning rate")
    yield Metric("accumulation_steps", "gauge", "rank 0", "micro batches", "micro batches of a step and worker")
    yield Metric("loss_scale", "gauge", "rank 0", "", "factor of the loss in fp16; 1 in other precisions")
    yield Metric("mfu_ratio", "gauge", "rank 0", "0 to 1", "operations of training over the GPUs' peak in 16 bits", gpu=True)
    yield Metric("samples_total", "counter", "worker", "videos", "videos that came from the stream, corrupt ones included")
    yield Metric("corrupt_samples_total", "counter", "worker", "videos", "those that could not be read, and have weight 0")
    yield Metric("decode_seconds", "histogram", "worker", "seconds", "decoding, cropping and resizing a video, in a reading task")
    yield Metric("read_bytes_total", "counter", "worker", "bytes", "bytes read of shards and of cached features")
    yield Metric("read_retries_total", "counter", "worker", "reads", "byte ranges asked for again, beyond the file system's own retries")
    yield Metric("read_errors_total", "counter", "worker", "tasks", "reading tasks that the storage failed, and that were tried again")
    yield Metric("queue_blocks", "gauge", "worker", "blocks", "blocks of clips that are read and wait for the worker")
    yield Metric("reading_tasks", "gauge", "worker", "tasks", "reading tasks of the worker's stream that run")
    yield Metric("checkpoint_seconds", "gauge", "rank 0", "seconds", "the last checkpoint, from its begin until it was whole on the storage")
    yield Metric("checkpoint_stall_seconds", "gauge", "rank 0", "seconds", "what training waited for it")
    yield Metric("checkpoint_bytes", "gauge", "rank 0", "bytes", "its size")
    yield Metric("checkpoints_total", "counter", "rank 0", "checkpoints", "checkpoints that were stored")
    yield Metric("checkpoint_good_timestamp_seconds", "gauge", "rank 0", "Unix time", "of the last good checkpoint, or of the start if none"
                 " was stored since; `time()` less it is its age, the work that a crash would cost")
    yield Metric("world_size", "gauge", "rank 0", "workers", "workers that train")
    yield Metric("world_size_wanted", "gauge", "driver", "workers", "workers that the config asks for, at most")
    yield Metric("progress_timestamp_seconds", "gauge", "driver", "Unix time", "when a new step or a validation was last heard of")
    yield Metric("restarts_total", "counter", "driver", "restarts", "starts of the workers after the first")
    yield Metric("resizes_total", "counter", "driver", "restarts", "those with another number of workers than before")
    yield Metric("lost_seconds_total", "counter", "driver", "seconds", "from the last step before a restart to the first new one after it")
    yield Metric("validation_loss", "gauge", "rank 0", "", "loss of the last validation")
    yield Metric("validation_top1_ratio", "gauge", "rank 0", "0 to 1", "its top-1 accuracy")
    yield Metric("validation_top5_ratio", "gauge", "rank 0", "0 to 1", "its top-5 accuracy")
    yield Metric("best_top1_ratio", "gauge", "rank 0", "0 to 1", "the best validation top-1 so far")
    yield Metric("evaluation_top1_ratio", "gauge", "evaluation", "0 to 1", "top-1 of `jobs.evaluate`")
    yield Metric("evaluation_top5_ratio", "gauge", "evaluation", "0 to 1", "its top-5")
    yield Metric("evaluation_mean_class_ratio", "gauge", "evaluation", "0 to 1", "its mean class accuracy")
    yield Metric("evaluation_samples", "gauge", "evaluation", "videos", "videos that it scored")
    yield Metric("search_planned_trials", "gauge", "search", "trials", "trials that a search is to have")
    yield Metric("search_trials", "gauge", "search", "trials", "its trials that are `running`, `finished` or `failed`", ("state",))
    yield Metric("search_best_top1_ratio", "gauge", "search", "0 to 1", "best validation top-1 of its trials")
# fmt: on


METRICS: Mapping[str, Metric] = {metric.name: metric for metric in _rows()}


def markdown() -> list[str]:
    """The README's table, by lines."""
    head = ["| metric | kind | unit | labels | meaning |", "|---|---|---|---|---|"]
    return [*head, *(f"| {' | '.join(_cells(metric))} |" for metric in METRICS.values())]


def _cells(metric: Metric) -> tuple[str, ...]:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    meaning = f"{metric.meaning} (on GPUs of a known peak)" if metric.gpu else metric.meaning
    return f"`{metric.full_name}`", metric.kind, metric.unit, labels, meaning
