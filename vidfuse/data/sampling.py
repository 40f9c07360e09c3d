"""Which samples, in which order, at which step, for which rank; and which frames of a video. Pure functions of a seed.

Comes in: counts, a seed, an epoch, a world. Goes out: arrays of sample numbers (rows of a split's index) and of frame numbers.

The order of an epoch is one permutation of the whole split, drawn from (seed, epoch): no shuffle buffer, the same at every
world size. It is one of single samples, or of short blocks of neighbours that a storage gives at one request. A step takes the
next `global_batch` samples of the order; inside a step, micro step j of rank r takes `micro_batch` of them. So the samples of a
step do not depend on the number of workers, and an epoch has `ceil(samples / global_batch)` steps for any of them. The last step
is padded with `PADDING`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from vidfuse.config import Temporal

PLAIN = Temporal()
"""No more than `sampling` itself draws."""
PADDING = -1
"""In place of a sample number: a row of weight 0."""

Samples = npt.NDArray[np.int64]


@dataclass(frozen=True)
class World:
    """How a global batch is cut over workers and accumulation: global = micro x accumulation x size."""

    size: int
    rank: int
    global_batch: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.global_batch % (self.micro_batch * self.size):
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be divided over {self.size} workers with micro batches of "
                f"{self.micro_batch}: it must be a multiple of {self.micro_batch} x {self.size} = {self.micro_batch * self.size}"
            )

    @property
    def accumulation(self) -> int:
        """Micro steps of an optimizer step."""
        return self.global_batch // (self.micro_batch * self.size)


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a pure function of `key` (seed, epoch, sample, purpose ...)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([k & 0xFFFFFFFF for k in key])))


def epoch_order(samples: int, *, seed: int, epoch: int, uses: npt.NDArray[np.uint8] | None = None, block: int = 1) -> Samples:
    """The order of an epoch: a random permutation of its uses, a pure function of (uses, seed, epoch, block).

    Args:
        samples: of the split.
        seed: of the run.
        epoch: from 0.
        uses: of each sample, if it is not once; their sum is `samples`.
        block: samples that are neighbours in the index and stay so. Where blocks begin is drawn for each epoch; what fills none comes
            last. (Blocks of shards are shuffled by MosaicML's Streaming, too: its `shuffle_block_size`.)

    Returns:
        [samples] sample numbers; the n-th further use of a sample in this order is its number + n x samples (`use_of`).
    """
    rng = generator(seed, epoch, 0)
    order = rng.permutation(samples).astype(np.int64) if block == 1 else _blocks(samples, block, rng)
    if uses is None:
        return order
    entries = np.repeat(np.arange(samples), uses)
    if block > 1:  # all first uses, then all second ones: neighbours are other samples
        entries = np.concatenate([np.flatnonzero(uses > use) for use in range(int(uses.max()))])
    order = entries[order]
    grouped = np.argsort(order, kind="stable")
    before = np.cumsum(uses, dtype=np.int64) - uses
    further = np.empty(samples, np.int64)
    further[grouped] = np.arange(samples) - before[order[grouped]]
    return order + further * samples


def _blocks(samples: int, block: int, rng: np.random.Generator) -> Samples:
    first = rng.integers(samples)
    numbers = (np.arange(samples, dtype=np.int64) + first) % samples
    whole = samples // block * block
    shuffled = rng.permutation(numbers[:whole].reshape(-1, block)).reshape(-1)
    return np.concatenate([shuffled, numbers[whole:]])


def use_of(numbers: Samples, samples: int) -> tuple[Samples, Samples]:
    """Sample numbers, and how many uses of the sample come before, of an entry of an epoch's order."""
    return numbers % samples, numbers // samples


def steps_of(samples: int, global_batch: int) -> int:
    """Optimizer steps that `samples` samples take."""
    return -(-samples // global_batch)


def rank_rows(order: Samples, world: World) -> Samples:
    """What one rank reads of an order, in the order in which it uses it.

    Args:
        order: sample numbers still to be used, in order.
        world: how a global batch is cut.

    Returns:
        [steps x accumulation, micro_batch] sample numbers, `PADDING` where the last step is not full.
    """
    steps = steps_of(len(order), world.global_batch)
    padded = np.full(steps * world.global_batch, PADDING, dtype=np.int64)
    padded[: len(order)] = order
    cut = padded.reshape(steps, world.accumulation, world.size, world.micro_batch)
    return np.ascontiguousarray(cut[:, :, world.rank]).reshape(steps * world.accumulation, world.micro_batch)


def frame_numbers(
    frames: int,
    count: int,
    *,
    sampling: Literal["uniform", "dense", "single"],
    stride: int = 1,
    rng: np.random.Generator | None = None,
    view: int = 0,
    views: int = 1,
    temporal: Temporal = PLAIN,
) -> npt.NDArray[np.int64]:
    """Frames of a clip.

    `uniform` cuts the video into `count` equal segments and takes one frame of each (TSN, Wang et al. 2016, section 3.1):
    a random one in training, the centre in testing; further test views are shifted inside the segments. `dense` takes
    frames `stride` apart from a random start in training, and from `views` evenly spaced starts in testing; a video
    that is too short is walked round from its beginning. `single` takes one frame and repeats it.

    Args:
        frames: frames of the video.
        count: frames of the clip.
        sampling: see above.
        stride: distance of neighbouring frames under `dense`.
        rng: randomness of a training clip; `None` for testing.
        view: which temporal view of `views`, in testing.
        views: temporal views of the video, in testing.
        temporal: what else is random in training.

    Returns:
        [count] frame numbers, each 0..frames-1, not decreasing unless a short video is walked round or the clip runs backwards.

    Raises:
        ValueError: a video without frames.
    """
    if frames < 1:
        raise ValueError("a video without frames has no clip")
    place = (view + 0.5) / views
    temporal = temporal if rng is not None else PLAIN
    speed, begin = _drawn_speed(rng, temporal)
    if sampling == "uniform":
        inside = rng.random(count) if rng is not None else np.full(count, place)
        if temporal.jitter is not None:
            inside = 0.5 + (inside - 0.5) * temporal.jitter
        numbers = frames * (1 - speed) * begin + (np.arange(count) + inside) * (frames * speed / count)
    elif sampling == "dense":
        step = stride * speed
        span = math.floor((count - 1) * step) + 1
        start = math.floor(_place(place, rng) * max(frames - span + 1, 1))
        moved = (rng.random(count) - 0.5) * temporal.jitter * step if rng is not None and temporal.jitter else 0.0
        numbers = np.clip((start + np.arange(count) * step) % frames + moved, 0, frames - 1)
    else:
        numbers = np.full(count, _place(place, rng) * frames)
    found = np.minimum(np.floor(numbers).astype(np.int64), frames - 1)
    return found if rng is None else _lost_and_turned(found, temporal, rng)


def _place(place: float, rng: np.random.Generator | None) -> float:
    return float(rng.random()) if rng is not None else place


def _drawn_speed(rng: np.random.Generator | None, temporal: Temporal) -> tuple[float, float]:
    """The factor of the distance of neighbouring frames, and where what is cut out begins, 0..1; nothing is drawn if it is fixed."""
    low, high = temporal.speed
    if rng is None or low == high == 1:  # what is drawn after it stays as it is without
        return 1.0, 0.0
    return math.exp(rng.uniform(math.log(low), math.log(high))), float(rng.random())


def _lost_and_turned(numbers: npt.NDArray[np.int64], temporal: Temporal, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Frames held in the place of lost ones, and perhaps backwards; nothing is drawn for what is off."""
    if temporal.dropped:
        kept = np.concatenate([[True], rng.random(len(numbers) - 1) >= temporal.dropped])
        numbers = numbers[np.maximum.accumulate(np.where(kept, np.arange(len(numbers)), 0))]
    return numbers[::-1].copy() if temporal.reverse and rng.random() < temporal.reverse else numbers
