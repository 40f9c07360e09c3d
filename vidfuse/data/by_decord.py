"""Frames by decord, called the way in which it does not shift frames and seldom crashes: bytes through a file in memory, one thread,
every frame in order. `data.decode` runs it in a process of its own.

Comes in: the bytes of one encoded video that names no other files, and bounds. Goes out: frames, what the file is, or any error.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from vidfuse.data.video import DecodeError, Frame, VideoInfo, check_pixels, timing

_CHUNK = 16
"""Frames that decord holds at a time."""
_IN_MEMORY = hasattr(os, "memfd_create")


def probed(video: bytes, *, most_frames: int, most_pixels: int) -> Iterator[VideoInfo | None]:
    """Yield `None` for each chunk that decodes, as a sign of life, and in the end what the video is."""
    with _reader(video, most_frames, most_pixels) as reader:
        count, fps = len(reader), float(reader.get_avg_fps())
        height = width = 0
        for start in range(0, count, _CHUNK):
            height, width = reader.get_batch(range(start, min(start + _CHUNK, count))).shape[1:3]
            yield None
        fps, duration = timing(count, fps, 0.0)
        yield VideoInfo(count, fps, duration, width, height, "")


def decoded(video: bytes, indices: Sequence[int], *, most_frames: int, most_pixels: int) -> Iterator[list[tuple[int, Frame]]]:
    """Yield the wanted frames of each chunk, also where there are none; `indices` are increasing."""
    with _reader(video, most_frames, most_pixels) as reader:
        if indices[-1] >= len(reader):
            raise DecodeError(f"frame {indices[-1]} is wanted, the video has {len(reader)}")
        for start in range(0, indices[-1] + 1, _CHUNK):
            chunk = reader.get_batch(range(start, min(start + _CHUNK, indices[-1] + 1))).asnumpy()
            yield [(index, chunk[index - start]) for index in indices if start <= index < start + len(chunk)]


@contextlib.contextmanager
def _reader(video: bytes, most_frames: int, most_pixels: int) -> Iterator[Any]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    # A file without a name: a crash leaves none behind.
    with os.fdopen(os.memfd_create("video"), "wb") if _IN_MEMORY else tempfile.TemporaryFile() as file:
        file.write(video)
        file.flush()
        reader = decord.VideoReader(f"/dev/fd/{file.fileno()}", num_threads=1)
        if not 0 < len(reader) <= most_frames:
            raise DecodeError(f"{len(reader)} frames; 1 to {most_frames} are read")
        height, width = reader[0].shape[:2]
        check_pixels(width, height, most_pixels)
        yield reader
