"""Parts of a plan -> Ray Data -> columns of rows in one worker, in order.

Comes in: a `ClipReader` and the parts that this rank uses, in order. Goes out: blocks of exactly the rows asked for (the last may
be shorter). Every worker has a stream of its own over its own parts: what a rank reads is decided by the plan
(`data.sampling`), never by who is faster, so nothing is dropped, repeated or dealt out unevenly. Decoding runs as Ray tasks on
any node with free CPUs. A task reads one part after another and gives a block of each: where the buffer has room for it several, since
Ray Data looks for tasks that have ended only every 0.1 s, in which CPUs idle. It ends though nobody takes its blocks: one that waited
with a CPU in its hands would keep it from the worker for whom all others wait.

Memory: the streams of all workers together hold at most `data.buffer_bytes` of decoded clips in the object store: each has its
share, of which Ray Data is told to fill a third with blocks that are made or wait. The rest is for what Ray overshoots (its bound is a
soft one), for the blocks that the worker is looking at, and for the next stream, which starts before this one is used up.
`tests/on_ray/test_stream.py` holds it.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, repeat, zip_longest
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ExecutionResources, ReadTask
from ray.data._internal.block_batching.iter_batches import BatchIterator
from ray.data._internal.execution.backpressure_policy import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
)
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from ray.data.block import Block, BlockMetadata
from ray.data.extensions import ArrowTensorArray

from vidfuse.config import DataConfig
from vidfuse.data.clips import COSTS, ClipReader, Columns, Part
from vidfuse.data.feed import in_rows, tasks_at_once
from vidfuse.on_ray.observe import Board
from vidfuse.on_ray.standby import of_tasks

RETRIES = 5
"""Of a reading task whose storage fails for longer than `ClipReader` tries; one whose process is killed is started again by Ray."""
PAUSE_SECONDS = 0.05
"""How long Ray Data's control loop rests when it can do nothing until the worker takes a block."""
REST_SECONDS = 0.01
"""How long the loop rests in each turn, for each block that waits for the worker: a task that has given a block of which Ray Data has not
fetched the facts yet, in another thread, is not waited for, and the loop would turn a thousand times a second."""
LONGEST_REST_SECONDS = 0.2
"""Of a turn, however many blocks wait. One takes 3 ms of the training worker's interpreter."""
PARTS_PER_TASK = 4
"""Most parts that one task reads. With one part of 8 clips in each, 2 cores idled for 19 % of their time between tasks (tests/bench)."""
ROWS_PER_BLOCK = 16
"""Fewest rows of a block, where the stream and its buffer have room: what each block costs beside its rows, in the worker and in Ray's own
processes, was 7.4 % of 2 cores' time with blocks of 8 clips, 5.6 % with 16 (tests/bench)."""
TASKS_PER_CPU = 4
"""Tasks in a stream, at least, for each that can run at a time: so that the last ones do not keep a worker waiting."""
STATISTICS_SECONDS = 60.0
"""Between two messages of a stream's statistics to Ray's dashboard. They have all of its blocks; every 5 s, as Ray Data has it, the thread
that trains stood for 20 to 90 ms to pickle those of 2,000, and the actor that takes them took 0.6 % of 2 cores' time."""
FAILED = "failed"
"""Column of how many readings of a block's part had failed before."""
QUEUE = "vidfuse.queue"
"""Name of a stream in its context, which travels to tasks, as its board cannot."""
WORKERS = "vidfuse.workers"
"""How many workers share the cluster, in a stream's context."""

_boards: dict[str, Board] = {}
"""Of this process' streams, by name."""
_failed: Counter[Part] = Counter()
"""Readings by this process that the storage has failed, by part, until the part's block carries them away."""


class Share(BackpressurePolicy):
    """Plan with a worker's share of the cluster, and let the control loop rest while the buffer is full.

    Ray Data 2.60 lets the streams that were busy first ask for all CPUs (`DefaultClusterAutoscalerV2`): the others have one task at a
    time, and all workers wait for theirs.

    Its control loop waits for running tasks only. When all blocks that fit are made, it turns without a pause, in a thread of the
    training worker: measured on 2 cores, more of the worker's time than the training itself.
    """

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        workers = self._data_context.get_config(WORKERS)
        self._resource_manager._get_total_resources = lambda: _share(workers)

    def max_task_output_bytes_to_read(self, op: Any) -> None:
        """Called in every turn, for every operator, before the wait for tasks.

        A block that comes after one that is still being read does not wait for the worker, but the worker for it.
        """
        waiting = 0
        if op is next(reversed(self._topology)):
            waiting = self._topology[op].output_queue.num_blocks
            board = _boards.get(self._data_context.get_config(QUEUE, ""))
            if board is not None:
                board.set("queue_blocks", waiting)
                board.set("reading_tasks", op.num_active_tasks())
        if op.num_active_tasks() == 0:
            busy = any(other.num_active_tasks() for other in self._topology)
        else:
            busy = self._resource_manager.max_task_output_bytes_to_read(op) != 0
        rest = min(REST_SECONDS * waiting, LONGEST_REST_SECONDS)
        time.sleep(rest if busy else max(rest, PAUSE_SECONDS))


class ClipDatasource(Datasource):
    """Ray Data's view of a plan: read tasks that give one block a part. No dataclass: of one, Ray Data copies all it has, for its log.

    Args:
        reader: of the parts.
        parts: in order.
        numbers: If given: of the parts, which rows carry in a column `part`.
        size: Parts of a task.
        short: Tasks at the start that read one part: whoever waits for the first ones would be fed by one process.
    """

    def __init__(
        self, reader: ClipReader, parts: Sequence[Part], numbers: Sequence[int] = (), *, size: int = 1, short: int = 0
    ) -> None:
        super().__init__()
        self.reader, self.parts, self.numbers, self.size, self.short = reader, parts, numbers, size, short

    def get_name(self) -> str:
        """Shown in Ray's dashboard."""
        return "Clips"

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of all decoded clips."""
        return sum(self.reader.rows(part) for part in self.parts) * self.reader.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Tasks of whole parts, whatever `parallelism` says: a block must hold whole micro batches."""
        return [
            ReadTask(_Read(self.reader, tuple(numbered)), self._metadata(numbered), per_task_row_limit=per_task_row_limit)
            for numbered in self._tasks()
        ]

    def _tasks(self) -> Iterator[list[tuple[Part, int | None]]]:
        """Parts and their numbers, by task. A short part is its task's last: Ray Data would join its block with the next one."""
        sizes, numbered = chain(repeat(1, self.short), repeat(self.size)), list[tuple[Part, int | None]]()
        size, whole = next(sizes), max((len(part.videos) for part in self.parts), default=0)
        for part, number in zip_longest(self.parts, self.numbers):
            numbered.append((part, number))
            if len(numbered) == size or len(part.videos) < whole:
                yield numbered
                numbered, size = [], next(sizes)
        if numbered:
            yield numbered

    def _metadata(self, numbered: Sequence[tuple[Part, int | None]]) -> BlockMetadata:
        rows = sum(self.reader.rows(part) for part, _ in numbered)
        return BlockMetadata(num_rows=rows, size_bytes=rows * self.reader.row_bytes, input_files=None, exec_stats=None)


def pull_through_ray(
    data: DataConfig, *, workers: int, board: Board | None = None
) -> Callable[[ClipReader, Sequence[Part], int], Iterator[Columns]]:
    """`Pull` of one of `workers` workers, each with its share of the buffer; what reading costs is told on `board`.

    Each block carries its own costs to the worker: reading tasks tell nobody else, so that no call is made for it.
    """
    share = data.buffer_bytes // workers  # of two streams: one that is being used up, and the next one

    def pull(reader: ClipReader, parts: Sequence[Part], rows: int) -> Iterator[Columns]:
        if not parts:
            return
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        name, running = uuid.uuid4().hex, _running(data, workers)
        parts = _joined(reader, parts, tasks_at_once(data, workers, _block(reader, parts)), running)
        block = _block(reader, parts)
        at_once = tasks_at_once(data, workers, block)
        size = max(min(PARTS_PER_TASK, at_once // running, len(parts) // (TASKS_PER_CPU * running)), 1)
        dataset = ray.data.read_datasource(
            ClipDatasource(reader, parts, size=size, short=running),
            concurrency=min(max(at_once // size, 2), len(parts)),
            override_num_blocks=len(parts),
            num_cpus=data.cpus_per_task,
            runtime_env=of_tasks(),
            ray_remote_args={"_generator_backpressure_num_objects": -1},  # a task waits for none of its blocks to be taken
        )
        BatchIterator.UPDATE_METRICS_INTERVAL_S = StreamingExecutor.UPDATE_METRICS_INTERVAL_S = STATISTICS_SECONDS
        context = dataset.context
        context.enable_progress_bars = False
        context.retried_map_errors, context.max_map_retries = True, RETRIES
        # what is larger is given at once, as a block: that of each part is, since it has other columns, too
        context.target_max_block_size = block - 1
        context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, Share])
        context.set_config(QUEUE, name)
        context.set_config(WORKERS, workers)
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ExecutionResources(object_store_memory=max(share // 3, 2 * block))
        if board is not None:
            _boards[name] = board
        ahead = math.ceil(data.prefetch_batches * rows / max(reader.rows(part) for part in parts))
        try:
            # whole blocks, cut here: Ray Data takes longer for a batch than all else does that a worker does for it
            blocks = dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=ahead)
            yield from in_rows(map(partial(_told, views=reader.views(parts[0].epoch), board=board), blocks), rows)
        finally:
            _boards.pop(name, None)

    return pull


def _block(reader: ClipReader, parts: Sequence[Part]) -> int:
    """Bytes of the largest block."""
    return max(reader.rows(part) for part in parts) * reader.row_bytes


def _joined(reader: ClipReader, parts: Sequence[Part], at_once: int, running: int) -> Sequence[Part]:
    """Parts of `ROWS_PER_BLOCK` rows, or as many as leave `TASKS_PER_CPU` tasks and room for as many blocks for each that runs."""
    wanted = math.ceil(ROWS_PER_BLOCK / max(reader.rows(part) for part in parts))
    many = min(wanted, min(at_once, len(parts)) // (TASKS_PER_CPU * running))
    if many < 2:
        return parts
    epochs = (list(some) for _, some in groupby(parts, key=lambda part: part.epoch))
    together = (some[start : start + many] for some in epochs for start in range(0, len(some), many))
    return [replace(first, videos=sum((part.videos for part in rest), first.videos)) for first, *rest in together]


def _share(workers: int) -> ExecutionResources:
    """What the cluster has for the reading of one of `workers` workers."""
    return ExecutionResources.from_resource_dict(ray.cluster_resources()).scale(1 / workers)


def _running(data: DataConfig, workers: int) -> int:
    """Reading tasks of one of `workers` workers that the cluster's CPUs run at a time, at most."""
    return max(int(_share(workers).cpu / data.cpus_per_task), 1)


def _told(columns: Columns, views: int, board: Board | None) -> Columns:
    """The columns without what they have cost, which is noted."""
    costs = {cost: columns.pop(cost) for cost in (*COSTS, FAILED)}
    if board is not None:
        _tell(board, columns, costs, views=views)
    return columns


def _tell(board: Board, columns: Columns, costs: Columns, *, views: int) -> None:
    seconds = costs["seconds"]
    board.observe("decode_seconds", seconds[seconds > 0])
    board.add("samples_total", int((columns["sample"] >= 0).sum()) / views)
    board.add("corrupt_samples_total", len({error for error in columns["error"] if error}))
    for name, cost in (("read_bytes", "bytes"), ("read_retries", "retries"), ("read_errors", FAILED)):
        board.add(f"{name}_total", int(costs[cost].sum()))


@dataclass(frozen=True)
class _Read:
    """What a read task does. A class of this module: a function made here would travel with its code, milliseconds a task."""

    reader: ClipReader
    numbered: tuple[tuple[Part, int | None], ...]

    def __call__(self) -> Iterator[Block]:
        """Ray Data begins anew where one of them fails, and leaves out the blocks that it has."""
        return (self._block(part, number) for part, number in self.numbered)

    def _block(self, part: Part, number: int | None) -> Block:
        try:
            columns = self.reader.read(part)
        except OSError:
            _failed[part] += 1
            raise
        columns[FAILED] = np.zeros(len(columns["sample"]), np.int64)
        columns[FAILED][0] = _failed.pop(part, 0) if _failed else 0
        if number is not None:
            columns["part"] = np.full(len(columns["sample"]), number, np.int64)
        errors = pa.array(np.asarray(columns.pop("error"), object), pa.string())
        arrays = {
            name: ArrowTensorArray.from_numpy(values) if values.ndim > 1 else pa.array(values)
            for name, values in columns.items()
        }
        return pa.table({**arrays, "error": errors})
