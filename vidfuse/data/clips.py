"""Videos of shards to clips: what a reading task does with each of its parts.

Comes in: a `Part` (which videos, for which epoch) and a file system. Goes out: columns of rows, a row being one view of one
sample: in training one of its `data.repeats`, in testing one of its temporal and spatial views. A row is a clip, cached tokens of
it, or both. Only the byte ranges of the wanted videos are read, and none of a video whose clips are all in `data.frame_cache`. A
video that cannot be decoded, or that lies behind the end of a truncated shard, gives rows of weight 0 and the reason; a file that
cannot be read raises, since that is the storage's fault and not the video's.

Axes: R rows (videos x views), T frames, H = W = size.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vidfuse.config import DataConfig
from vidfuse.data import augment
from vidfuse.data.augment import Change
from vidfuse.data.decode import decode_frames
from vidfuse.data.features import BITS, FeatureSet
from vidfuse.data.flips import NEVER, Classes
from vidfuse.data.frame_cache import Clip, FrameCache, key_of
from vidfuse.data.ranges import EndError, Fetched, Range, fetch, joined
from vidfuse.data.sampling import PADDING, frame_numbers, generator
from vidfuse.data.shards import DataError, SplitIndex
from vidfuse.data.transforms import Box, centre_box, crop_resize, random_box
from vidfuse.data.video import DecodeError

FETCHES_AT_ONCE = 8
"""Requests that a reading task makes of the storage at the same time."""
CROPS, FRAMES, CHANGES = 1, 2, 3
"""Purposes that keep the draws of one sample apart; after the first clip of a video, the number of the repeat follows, and
after its first use in a weighted epoch the number of the use."""

KEPT_CLIPS = 3
"""Blocks whose memory a thread keeps for those that follow: one is read while Ray Data has the two before it."""

COSTS = ("seconds", "bytes", "retries")
"""Columns of what a video has cost, on the first of its rows: to decode it, read of the storage, and byte ranges asked for again."""

Columns = dict[str, npt.NDArray[Any]]

_own = threading.local()
"""The threads that a thread has fetched with and will again: starting eight for each part took 1 % of reading. And memory for its clips."""
os.register_at_fork(after_in_child=lambda: _own.__dict__.clear())  # a process that is forked off has no threads


class Video(NamedTuple):
    """One row of a split's index, as a reading task needs it."""

    sample: int
    shard: str
    key: str
    label: int
    offset: int
    size: int
    frames: int
    width: int
    height: int
    use: int = 0
    """How many uses of the sample come before this one in the epoch."""
    sha256: bytes = b""
    """Of the video's bytes; empty: not known, and its clips are not kept."""


class View(NamedTuple):
    """How a video becomes one clip."""

    numbers: npt.NDArray[np.int64]
    """[T] frames."""
    box: Box
    label: int
    """The video's, or its mirror image's."""
    changes: tuple[Change, ...] = ()


Missing = list[tuple[View, Clip]]
"""Views that are to be decoded, each with the place of its clip [T, H, W, 3]."""


@dataclass(frozen=True)
class Part:
    """What becomes one block: videos in the order of use; `None` is padding."""

    epoch: int | None
    """Epoch whose random draws hold; `None`: testing, nothing is random."""
    videos: tuple[Video | None, ...]


def parts_of(index: SplitIndex, samples: npt.NDArray[np.int64], per_part: int, *, epoch: int | None) -> Iterator[Part]:
    """Cut entries of an epoch's order into parts of `per_part` videos (the last may be shorter)."""
    for start in range(0, len(samples), per_part):
        yield Part(epoch, tuple(_video(index, int(s)) for s in samples[start : start + per_part]))


@dataclass(frozen=True)
class ClipReader:
    """How the videos of a packed set become clips; it travels to the reading tasks."""

    filesystem: Any
    """`pyarrow.fs.FileSystem` of the packed set."""
    root: str
    """Path of the packed set on it."""
    data: DataConfig
    seed: int
    clips: int = 1
    """Temporal views in testing."""
    crops: int = 1
    """Spatial views in testing."""
    flip: bool = False
    """Whether each view in testing is followed by its mirror image."""
    mirrored: Classes | None = None
    """[K] class of a class's mirrored clip, `NEVER` if it has none. `None`: labels name no sides."""
    features: tuple[FeatureSet, ...] = ()
    """Cached tokens that come with, or in the place of, the clips."""
    decodes: bool = True
    """Whether clips are wanted."""

    def views(self, epoch: int | None) -> int:
        """Rows of one video; `None`: in testing."""
        return self.clips * self.crops * (1 + self.flip) if epoch is None else self.data.repeats

    def rows(self, part: Part) -> int:
        """Rows of a part."""
        return len(part.videos) * self.views(part.epoch)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: its clip and cached tokens."""
        clip = self.data.frames * self.data.size**2 * 3 if self.decodes else 0
        return clip + sum(of.row_bytes for of in self.features)

    def read(self, part: Part) -> Columns:
        """Read, decode, crop and resize the videos of a part.

        Returns:
            `clip` uint8 [R, T, H, W, 3], if it is wanted; `tokens.<stream>` bit patterns [R, N, D] of each cache; `label` int64 [R]
            (-1: none); `weight` float32 [R] (0: padding or unreadable); `sample` int64 [R] (-1: padding); `error` str [R]
            (`shard\\tkey\\treason` or empty); and `COSTS`: float32 seconds, int64 bytes, int64 retries [R].

        Raises:
            OSError: the storage does not give the bytes, after its own retries.
        """
        views, rows, size = self.views(part.epoch), self.rows(part), self.data.size
        clips = {"clip": _memory((rows, self.data.frames, size, size, 3))} if self.decodes else {}
        cached = {column_of(of): np.zeros((rows, *of.row_shape), BITS[of.made.precision]) for of in self.features}
        out: Columns = {
            **clips,
            **cached,
            "label": np.full(rows, -1, np.int64),
            "weight": np.zeros(rows, np.float32),
            "sample": np.full(rows, PADDING, np.int64),
            "error": np.full(rows, "", object),
            "seconds": np.zeros(rows, np.float32),
            "bytes": np.zeros(rows, np.int64),
            "retries": np.zeros(rows, np.int64),
        }
        places = [slice(start, start + views) for start in range(0, rows, views)]
        plans = [list(self.plans(video, part.epoch)) if video else [] for video in part.videos]
        cache = self._cache(part.epoch)
        missing = [
            self._missing(cache, video, some, out["clip"][place]) if video and self.decodes else []
            for video, some, place in zip(part.videos, plans, places, strict=True)
        ]
        contents = _fetched(
            self.filesystem,
            [
                Range(f"{self.root}/{video.shard}", video.offset, video.size) if video and left else None
                for video, left in zip(part.videos, missing, strict=True)
            ],
        )
        for video, place, some, left, fetched in zip(part.videos, places, plans, missing, contents, strict=True):
            if video is None:
                if self.decodes:
                    out["clip"][place] = 0
                continue
            out["sample"][place] = video.sample
            out["label"][place] = [plan.label for plan in some]
            out["retries"][place.start], began = fetched.retries, time.perf_counter()
            try:
                if isinstance(fetched.content, EndError):
                    raise _truncated(video, fetched.content)
                out["bytes"][place.start] = len(fetched.content)
                if self.decodes:
                    self._make(cache, video, fetched.content, left)
                    _change(some, out["clip"][place])
                out["weight"][place] = 1
            except DecodeError as error:
                out["clip"][place] = 0
                out["error"][place] = f"{video.shard}\t{video.key}\t{error}"
            out["seconds"][place.start] = time.perf_counter() - began if left else 0
        for of in self.features:
            self._read_features(of, part, out)
        return out

    def _read_features(self, of: FeatureSet, part: Part, out: Columns) -> None:
        """Fill the column of a cache; a row that was unreadable when it was cached is so now, and one that is damaged."""
        views, column = self.views(part.epoch), out[column_of(of)]
        wanted = [
            (number * views + repeat, 0 if part.epoch is None else self.view(video, part.epoch, repeat), video)
            for number, video in enumerate(part.videos)
            if video is not None
            for repeat in range(1 if part.epoch is None else views)
        ]
        places = [of.place(draw, video.sample) for _, draw, video in wanted]
        for (row, draw, video), fetched in zip(wanted, _fetched(of.filesystem, places), strict=True):
            place = slice(row, row + of.made.views)
            out["retries"][row] += fetched.retries
            try:
                bits, reason = of.rows(draw, video.sample, fetched)
                if not reason:
                    column[place] = bits
                    out["bytes"][row] += bits.nbytes
                    continue
            except DataError as error:
                reason = f"{video.shard}\t{video.key}\t{error}"
            out["weight"][place] = 0
            out["error"][place] = [before or reason for before in out["error"][place]]

    def _cache(self, epoch: int | None) -> FrameCache | None:
        """Where clips are kept that come again: those of finite `data.views`, and of testing."""
        data = self.data
        again = epoch is None or data.views is not None
        return FrameCache(data.frame_cache, data.frame_cache_bytes) if data.frame_cache and again else None

    def _key(self, video: Video, plan: View) -> bytes:
        return key_of(video.sha256, plan.numbers, plan.box, self.data.size, self.data.decoder)

    def _missing(self, cache: FrameCache | None, video: Video, plans: Sequence[View], out: Clip) -> Missing:
        """Fill the views [views, T, H, W, 3] that are in the cache; the others with their places."""
        kept = cache if video.sha256 else None
        return [
            (plan, clip)
            for plan, clip in zip(plans, out, strict=True)
            if kept is None or not kept.load(self._key(video, plan), clip)
        ]

    def _make(self, cache: FrameCache | None, video: Video, content: bytes, missing: Missing) -> None:
        """Decode the missing views, and keep them; bytes that the index does not name are an error, though they may decode."""
        if missing and video.sha256 and hashlib.sha256(content).digest() != video.sha256:
            raise DecodeError("altered since it was packed: its sha256 is not the index's")
        _decode(content, [plan for plan, _ in missing], [clip for _, clip in missing], self.data)
        if missing and cache is not None and video.sha256:
            for key, clip in {self._key(video, plan): clip for plan, clip in missing}.items():
                cache.store(key, clip)

    def decode(self, content: bytes, plans: Sequence[View], out: Clip) -> None:
        """Fill `out` [views, T, H, W, 3]; each wanted frame is decoded once, whatever the number of views using it."""
        _decode(content, plans, out, self.data)
        _change(plans, out)

    def plans(self, video: Video, epoch: int | None) -> Iterator[View]:
        """How a video becomes its clips in an epoch; `None`: in testing."""
        data = self.data
        if epoch is not None:
            for repeat in range(data.repeats):
                again = (repeat, video.use) if video.use else (repeat,) if repeat else ()
                if data.views is None:
                    yield self._drawn(video, epoch, *again)
                else:
                    yield self._drawn(video, self.view(video, epoch, repeat))
            return
        for clip in range(self.clips):
            numbers = frame_numbers(
                video.frames, data.frames, sampling=data.sampling, stride=data.stride, view=clip, views=self.clips
            )
            for crop in range(self.crops):
                box = centre_box(video.height, video.width, crop=crop, crops=self.crops)
                yield View(numbers, box, video.label)
                if self.flip:
                    yield View(numbers, replace(box, mirrored=True), video.label)

    def view(self, video: Video, epoch: int, repeat: int) -> int:
        """Which of a training video's `data.views` clips a use of it in an epoch is; that of number v is drawn as epoch v would."""
        assert self.data.views is not None
        return ((epoch + video.use) * self.data.repeats + repeat) % self.data.views

    def _drawn(self, video: Video, epoch: int, *draw: int) -> View:
        data = self.data
        frames, crops, changes = (generator(self.seed, epoch, video.sample, p, *draw) for p in (FRAMES, CROPS, CHANGES))
        how = data.augment.temporal
        numbers = frame_numbers(video.frames, data.frames, sampling=data.sampling, stride=data.stride, rng=frames, temporal=how)
        image = video.label if self.mirrored is None or video.label < 0 else int(self.mirrored[video.label])
        flip = bool(data.flip) and image != NEVER
        box = random_box(video.height, video.width, area=data.crop_area, aspect=data.crop_aspect, flip=flip, rng=crops)
        label = image if box.mirrored else video.label
        return View(numbers, box, label, augment.draw(data.augment, data.size, changes))


def _fetched(filesystem: Any, wanted: Sequence[Range | None]) -> Iterator[Fetched]:
    """The bytes of each range; none of `None`."""
    state = pickle.dumps(filesystem)
    with _threads() as pool:
        for job in [pool.submit(fetch, state, run) for run in joined(wanted)]:
            yield from job.result()


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads that ask the storage; where one fails, the others' tries are not waited for."""
    pool = _own.__dict__.pop("pool", None) or ThreadPoolExecutor(FETCHES_AT_ONCE, "vidfuse-fetch")
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    _own.pool = pool


def _memory(shape: tuple[int, ...]) -> Clip:
    """Memory for clips: that of an earlier part of which nobody has an array any more, or new.

    What malloc asks of the kernel for each block, as it does above 32 MB, comes as pages to clear: with it 10 % of all time were the
    kernel's, without it 4 % (tests/bench).
    """
    kept: list[memoryview] = _own.__dict__.setdefault("memory", [])
    memory = kept.pop() if kept else None  # no other thread takes one, and any may give one back
    if memory is None or memory.nbytes != math.prod(shape):
        memory = np.empty(math.prod(shape), np.uint8).data

    def keep() -> None:
        kept.append(memory)
        del kept[:-KEPT_CLIPS]

    flat = np.frombuffer(memory, np.uint8)  # every array over it holds on to this one
    weakref.finalize(flat, keep).atexit = False
    return flat.reshape(shape)


def _decode(content: bytes, plans: Sequence[View], out: Sequence[Clip] | Clip, data: DataConfig) -> None:
    """Fill a clip [T, H, W, 3] of each plan, before its changes."""
    places: dict[int, list[tuple[int, int]]] = {}
    for view, plan in enumerate(plans):
        for place, number in enumerate(plan.numbers):
            places.setdefault(int(number), []).append((view, place))
    for number, frame in decode_frames(content, sorted(places), decoder=data.decoder):
        done: dict[Box, npt.NDArray[np.uint8]] = {}
        for view, place in places[number]:
            box, image = plans[view].box, out[view][place]
            if box.top + box.height > frame.shape[0] or box.left + box.width > frame.shape[1]:
                raise DecodeError(f"frame {number} has {frame.shape[1]} x {frame.shape[0]} pixels, fewer than the index says")
            if box in done:
                image[:] = done[box]
            else:
                crop_resize(frame, box, image)
                done[box] = image


def _change(plans: Sequence[View], out: Clip) -> None:
    for view, plan in enumerate(plans):
        if plan.changes:
            out[view] = augment.apply(out[view], plan.changes)


def column_of(features: FeatureSet) -> str:
    """The column of a cache's tokens."""
    return f"tokens.{features.stream}"


def _video(index: SplitIndex, number: int) -> Video | None:
    if number == PADDING:
        return None
    sample, use = number % len(index), number // len(index)
    return Video(
        sample=sample,
        shard=index.shards[index.shard[sample]],
        key=str(index.key[sample]),
        use=use,
        sha256=index.sha256[sample].tobytes(),
        **{name: int(getattr(index, name)[sample]) for name in ("label", "offset", "size", "frames", "width", "height")},
    )


def _truncated(video: Video, end: EndError) -> DecodeError:
    return DecodeError(f"the shard ends at byte {end.size}, this video at {video.offset + video.size}: it is truncated")
