"""Which samples, in which order, at which step, for which rank; and which frames of a video. Pure functions of a seed.

Comes in: counts, a seed, an epoch, a world. Goes out: arrays of sample numbers (rows of a split's index) and of frame numbers.

The order of an epoch is one permutation of the whole split, drawn from (seed, epoch): no shuffle buffer, the same at every
world size. A step takes the next `global_batch` samples of the order; inside a step, micro step j of rank r takes
`micro_batch` of them. So the samples of a step do not depend on the number of workers, and an epoch has
`ceil(samples / global_batch)` steps for any of them. The last step is padded with `PADDING`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

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


def epoch_order(samples: int, *, seed: int, epoch: int) -> Samples:
    """The order of an epoch: a permutation of 0..samples-1 that is a pure function of (samples, seed, epoch)."""
    return generator(seed, epoch, 0).permutation(samples).astype(np.int64)


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

    Returns:
        [count] frame numbers, each 0..frames-1, not decreasing unless a short video is walked round.

    Raises:
        ValueError: a video without frames.
    """
    if frames < 1:
        raise ValueError("a video without frames has no clip")
    place = (view + 0.5) / views
    if sampling == "uniform":
        inside = rng.random(count) if rng is not None else np.full(count, place)
        numbers = (np.arange(count) + inside) * (frames / count)
    elif sampling == "dense":
        span = (count - 1) * stride + 1
        start = (rng.random() if rng is not None else place) * max(frames - span + 1, 1)
        numbers = (np.floor(start) + np.arange(count) * stride) % frames
    else:
        numbers = np.full(count, (rng.random() if rng is not None else place) * frames)
    return np.minimum(np.floor(numbers).astype(np.int64), frames - 1)
