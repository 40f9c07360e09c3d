"""Batches of a run, by plan.

Comes in: the index of a packed set, a `World`, and `pull`, which says how parts are read (Ray Data: `on_ray.stream`; threads of
this process: `read_here`). Goes out: micro batches in the planned order, the same number on every rank.

What is read is decided here alone, and it does not depend on how it is read: samples of a step are the next `global_batch` of
the epoch's order (`sampling`), less what was used before a restart.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidfuse.config import Config, DataConfig
from vidfuse.data.batch import Batch, Features, SampleError
from vidfuse.data.clips import ClipReader, Columns, Part, column_of, parts_of
from vidfuse.data.draws import Draws, Uses
from vidfuse.data.features import FeatureSet
from vidfuse.data.flips import mirrored_classes
from vidfuse.data.relay import Pull, relay
from vidfuse.data.sampling import Samples, World, epoch_order, rank_rows, steps_of
from vidfuse.data.shards import Manifest, SplitIndex

BLOCKS_AT_ONCE = 8
"""Blocks that a worker's share of `data.buffer_bytes` must hold: some being made, some waiting, some being used."""
BYTES_PER_TASK = 4
"""Bytes of the buffer for each byte that a reading task makes."""


def block_bytes(data: DataConfig, workers: int) -> int:
    """Bytes of a block, if a micro batch has no more; the share of each of `workers` workers has room for several."""
    return min(data.block_bytes, data.buffer_bytes // workers // BLOCKS_AT_ONCE)


def tasks_at_once(data: DataConfig, workers: int, block: int) -> int:
    """Reading tasks that run at a time for one of `workers` workers, each making a block of so many bytes.

    Half of a worker's share of the buffer is one stream's, since the next one starts before it is used up; half of that is being made.
    """
    return max(data.buffer_bytes // workers // (BYTES_PER_TASK * block), 2)


@dataclass(frozen=True)
class PackedSet:
    """An opened packed set: its manifest and the index of the splits in use."""

    filesystem: object
    root: str
    manifest: Manifest
    indices: dict[str, SplitIndex]
    draws: Draws = field(default_factory=Draws)
    """How often training samples are used."""
    features: Mapping[str, Mapping[str, FeatureSet]] = field(default_factory=dict)
    """Caches by split and stream."""


class Feed:
    """Training steps and validation batches of one rank."""

    def __init__(self, config: Config, packed: PackedSet, world: World, pull: Pull) -> None:
        self.config, self.packed, self.world, self._pull = config, packed, world, pull
        self._stream: Generator[Batch, None, None] | None = None
        self._next_epoch = -1

    @property
    def train_samples(self) -> int:
        """Samples of the training split."""
        return len(self.packed.indices[self.config.data.train_split])

    def uses(self, epoch: int) -> Uses:
        """How often each training sample is used in an epoch."""
        return self.packed.draws.uses(self.train_samples, seed=self.config.seed, epoch=epoch)

    def order(self, epoch: int) -> Samples:
        """The order of an epoch."""
        block = self.config.data.shuffle_block
        return epoch_order(self.train_samples, seed=self.config.seed, epoch=epoch, uses=self.uses(epoch), block=block)

    def train(self, epoch: int, left: Samples) -> Iterator[tuple[Batch, ...]]:
        """Optimizer steps of what is left of an epoch, each as its micro batches.

        Args:
            epoch: number of the epoch, from 0.
            left: entries of the epoch's order that are still to be used.
        """
        if self._stream is None or self._next_epoch != epoch or len(left) != self.train_samples:
            self._stream = self._open(epoch, left)
        stream, self._next_epoch = self._stream, epoch + 1
        for _ in range(steps_of(len(left), self.world.global_batch)):
            yield tuple(next(stream) for _ in range(self.world.accumulation))

    def score(self, split: str, *, clips: int, crops: int, micro_batch: int, flip: bool = False) -> Iterator[Batch]:
        """Every sample of a split once, as its views, shared out over the ranks; the same number of batches on each.

        The views of a sample follow each other; under `flip` each is followed by its mirror image.
        """
        index = self.packed.indices[split]
        # the cache of the training split has training's clips
        cached = (clips, crops, flip) == (1, 1, False) and split != self.config.data.train_split
        reader = self._reader(split, clips, crops, flip, cached=cached)
        per_part = self._videos_per_part(reader, micro_batch, views=reader.views(None))
        block = self.config.data.shuffle_block
        world = World(self.world.size, self.world.rank, global_batch=self.world.size * block, micro_batch=block)
        mine = rank_rows(np.arange(len(index), dtype=np.int64), world).reshape(-1)
        parts = parts_of(index, mine, per_part, epoch=None)
        return (_batch(columns, reader) for columns in relay(self._pull, reader, iter(parts), micro_batch))

    def close(self) -> None:
        """Let go of a stream that is not read to its end; one that another thread waits for ends when that lets go of it, too."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(ValueError):  # a thread is in it (`train.ahead`)
                stream.close()

    def _open(self, epoch: int, left: Samples) -> Generator[Batch, None, None]:
        reader = self._reader(self.config.data.train_split)
        views = self.config.data.repeats
        rows = self.world.micro_batch * views
        parts = self._parts(epoch, left, self._videos_per_part(reader, rows, views=views))
        for columns in relay(self._pull, reader, parts, rows):
            yield _batch(columns, reader)

    def _parts(self, epoch: int, left: Samples, per_part: int) -> Iterator[Part]:
        """What is left of an epoch, and all that follow."""
        index, first = self.packed.indices[self.config.data.train_split], epoch
        for number in range(epoch, self.config.train.epochs):
            mine = rank_rows(left if number == first else self.order(number), self.world).reshape(-1)
            yield from parts_of(index, mine, per_part, epoch=number)

    def _reader(self, split: str, clips: int = 1, crops: int = 1, flip: bool = False, *, cached: bool = True) -> ClipReader:
        """The reader of a split; tokens come from its caches if it has any and these clips are in them."""
        packed, config = self.packed, self.config
        mirrored = mirrored_classes(packed.manifest.classes, config.data.flip)
        caches = packed.features.get(split, {}) if cached else {}
        streams = [name for name in ("semantic", "motion") if getattr(config.model, name) is not None]
        return ClipReader(
            packed.filesystem,
            packed.root,
            config.data,
            config.seed,
            clips,
            crops,
            flip,
            mirrored,
            features=tuple(caches[name] for name in sorted(caches)),
            decodes=any(name not in caches for name in streams),
        )

    def _videos_per_part(self, reader: ClipReader, batch_rows: int, *, views: int) -> int:
        """As many videos as a block holds, in whole micro batches; a worker's share of the buffer has room for several blocks."""
        data = self.config.data
        rows = max(block_bytes(data, self.world.size) // reader.row_bytes, 1)
        step = batch_rows // math.gcd(batch_rows, views)
        return max(rows // (step * views), 1) * step


def read_here(reader: ClipReader, parts: Sequence[Part], rows: int, *, threads: int = 2) -> Iterator[Columns]:
    """`Pull` without Ray: threads of this process read ahead (the decoder releases the interpreter's lock)."""
    pool = ThreadPoolExecutor(threads)

    def blocks() -> Iterator[Columns]:
        waiting: deque[Future[Columns]] = deque()
        for part in [*parts, *[None] * threads]:
            if part is not None:
                waiting.append(pool.submit(reader.read, part))
            if len(waiting) > threads or (part is None and waiting):
                yield waiting.popleft().result()

    try:
        yield from in_rows(blocks(), rows)
    finally:  # one that is not read to its end may be let go by any thread, one of the pool's too: it waits for none
        pool.shutdown(wait=False, cancel_futures=True)


def in_rows(blocks: Iterable[Columns], rows: int) -> Iterator[Columns]:
    """The same rows, `rows` at a time; what is left in the end is less. Where blocks are of whole `rows`, nothing is copied."""
    left: list[Columns] = []
    for block in blocks:
        left.append(block)
        del block  # or it would be held while the next one is waited for
        yield from _whole(left, rows)
    if left and len(left[0]["sample"]):
        yield _joined(left)


def _whole(left: list[Columns], rows: int) -> Iterator[Columns]:
    """Take as many blocks of `rows` rows from `left` as it has; the rest stays there."""
    columns = _joined(left)
    count = len(columns["sample"])
    for start in range(0, count - count % rows, rows):
        yield {name: values[start : start + rows] for name, values in columns.items()}
    left[:] = [{name: values[count - count % rows :] for name, values in columns.items()}] if count % rows else []


def _joined(blocks: Sequence[Columns]) -> Columns:
    if len(blocks) == 1:
        return blocks[0]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _batch(columns: Columns, reader: ClipReader) -> Batch:
    errors = tuple(dict.fromkeys(SampleError(*str(e).split("\t", 2)) for e in columns["error"] if e))
    clips = columns["clip"] if reader.decodes else np.zeros((len(columns["label"]), 0, 1, 1, 3), np.uint8)
    return Batch(
        clips=_tensor(clips).permute(0, 1, 4, 2, 3),
        labels=_tensor(columns["label"]),
        weights=_tensor(columns["weight"]),
        samples=_tensor(columns["sample"]),
        errors=errors,
        features={of.stream: _features(of, columns[column_of(of)]) for of in reader.features},
    )


def _features(of: FeatureSet, bits: npt.NDArray[Any]) -> Features:
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[of.made.precision]
    return Features(_tensor(bits).view(dtype), torch.tensor(of.made.positions))


def _tensor(values: npt.NDArray[Any]) -> Tensor:
    """A tensor over the same memory, which may be the object store's: nothing writes to a batch."""
    _let_read_only()
    return torch.from_numpy(values)


@cache
def _let_read_only() -> None:
    """Once: to set a filter for each tensor took a fifth of the time that a worker's interpreter has for its stream."""
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
