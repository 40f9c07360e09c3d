"""What is said of an encoded video, whoever decodes it: what it is, or why it is none.

Comes in: what a decoder found. Goes out: the records of it, and `DecodeError`, which is all that decoding raises.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_GAPS = 2.5
"""Intervals that the frames of a constant rate may lack or have too many: AVIs with B-frames begin with a gap."""
_UNEVEN = 0.05
"""Share of its intervals by which a rate may be off and is still the container's."""

Frame = npt.NDArray[np.uint8]


class DecodeError(ValueError):
    """Bytes that are no whole video, or a frame that the video does not have; the message is the reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, by decoding all of it."""

    frames: int
    """Frames that decode, counted."""
    fps: float
    """Frames a second, on average."""
    duration: float
    """Seconds, from the first frame's start to the last one's end."""
    width: int
    """Pixels, as shown (after rotation)."""
    height: int
    """Pixels, as shown (after rotation)."""
    codec: str
    """The codec's name as FFmpeg has it (not its decoder's: `av1`); empty where the decoder does not tell (decord)."""


@dataclass(frozen=True)
class Inspection:
    """What a video is and how its file is made."""

    info: VideoInfo
    container: str
    """FFmpeg's name of the file's format: `matroska,webm`, `mov,mp4,m4a,3gp,3g2,mj2`, `avi`."""
    pixel_format: str
    """FFmpeg's name: `yuv420p`, `yuv420p10le`."""
    audio_tracks: int
    rotation: int
    """Degrees counter-clockwise by which frames are turned to be shown."""
    interval_spread: float
    """(95th - 5th percentile) / median of the times between neighbouring frames; 0 where frames have no times."""


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Let only `DecodeError` out: on broken files PyAV also raises UnicodeDecodeError, MemoryError and others."""
    try:
        yield
    except DecodeError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DecodeError(" ".join(reason.split())[:300]) from error


def check_pixels(width: int, height: int, most: int) -> None:
    """Refuse a frame of more than `most` pixels, before it is decoded."""
    if width * height > most:
        raise DecodeError(f"a frame of {width} x {height} pixels; at most {most} pixels are read, make the video smaller")


def timing(frames: int, fps: float, span: float) -> tuple[float, float]:
    """Frames a second and seconds, from the container's rate and the time between first and last frame (0: unknown).

    The container's rate is exact where it holds; a WebM of a variable rate names one that it has nowhere.
    """
    if not (math.isfinite(fps) and fps > 0):
        fps = (frames - 1) / span if span > 0 else 25.0
    elif frames > 1 and span > 0 and abs(span * fps - (frames - 1)) > max(_GAPS, _UNEVEN * (frames - 1)):
        fps = (frames - 1) / span
    return fps, span + 1 / fps if span > 0 else frames / fps
