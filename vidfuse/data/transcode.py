"""A video in the form that is quick to train from: H.264 in mp4, small, short closed GOPs, a constant frame rate.

Comes in: the bytes of any video, a `TranscodeConfig`. Goes out: bytes in that form, verified by decoding them whole, or a
`DecodeError`. A video that is in the form already comes back as it is, so nothing is encoded twice. Frames go through RGB as
training sees them (upright, 8 bits, limited range), so ten-bit, full-range and rotated videos keep their look.

x264 with `preset=veryfast tune=fastdecode` (no CABAC, no deblocking) and one thread: the same bytes each time with the same
libraries, and less work for the decoder than its other presets. Its macroblock tree is off: with it, bytes differ from one time to the
next, and files are hardly smaller at the same error (a real video: 38.6 dB in 196 KB, 38.4 in 193 without). Three of four frames are
such that no other refers to them, and a mark in the file tells `data.decode` that it can leave those, and whole GOPs, out.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import av
import av.codec
import av.error

from vidfuse.config import TranscodeConfig
from vidfuse.data import decode
from vidfuse.data.opencv import cv2
from vidfuse.data.shards import DataError
from vidfuse.data.video import DecodeError, Frame, VideoInfo, faults

SUFFIX = "mp4"
"""Of what is made."""
_ENCODER = "libx264"
_LIMITED = (0, 1)
"""FFmpeg's numbers of the colour ranges that are not full: not told, limited."""
_LARGEST_DENOMINATOR = 1001
"""Of a frame rate: 30000/1001 is one."""


def check_encoder() -> None:
    """Check that there is one.

    Raises:
        DataError: PyAV was built without it.
    """
    try:
        av.codec.Codec(_ENCODER, "w")
    except (ValueError, av.error.FFmpegError):
        raise DataError(
            f"--transcode needs PyAV with {_ENCODER}; pip's wheels have it: pip install --force-reinstall av"
        ) from None


def into_form(video: bytes, form: TranscodeConfig) -> tuple[bytes, VideoInfo]:
    """Bring a video into a form, unless it is in it.

    Args:
        video: The encoded file's bytes.
        form: What is wanted.

    Returns:
        The video's bytes (the same ones where it is in the form) and what `decode.probe` says of them.

    Raises:
        DecodeError: it does not decode whole, or what was made of it is not what it should be.
    """
    info = decode.probe(video)
    if in_form(video, info, form):
        return video, info
    rate = Fraction(form.fps or info.frames / info.duration).limit_denominator(_LARGEST_DENOMINATOR)
    if not rate:
        raise DecodeError(f"{info.frames} frames in {info.duration:.0f} seconds cannot have a constant rate; give --fps")
    frames = max(1, round(info.duration * rate)) if form.fps else info.frames
    if frames > decode.MAX_FRAMES:
        raise DecodeError(f"{info.duration:.0f} seconds would be {frames} frames; at most {decode.MAX_FRAMES} are read")
    with faults():
        made = _encode(video, info, form, rate, frames)
    found = decode.probe(made)
    _verify(info, found, rate, frames, form)
    return made, found


def into_form_contained(video: bytes, form: TranscodeConfig | None) -> tuple[bytes, VideoInfo]:
    """Bring a video into a form, or only decode it whole, in a process of its own: what crashes libraries there costs the video alone.

    Args:
        video: The encoded file's bytes.
        form: What is wanted; `None`: as it is.

    Returns:
        As `into_form`.

    Raises:
        DecodeError: as `into_form`; and what `decode.apart` raises.
        OSError: as `decode.apart`.
    """
    [(made, info)] = decode.apart(_into_form, video, form, seconds=decode.WHOLE_SECONDS)
    return video if made is None else made, info


def _into_form(video: bytes, form: TranscodeConfig | None) -> Iterator[tuple[bytes | None, VideoInfo]]:
    made, info = into_form(video, form) if form else (video, decode.probe(video))
    yield None if made is video else made, info


def looked_at(video: bytes, form: TranscodeConfig | None) -> Iterator[tuple[VideoInfo, bool]]:
    """Yield what a video is, by decoding all of it, and whether it is in a form, as `decode.apart` takes it; `None`: any is.

    Raises:
        DecodeError: while iterating: as `decode.probe`.
    """
    info = decode.probe(video)
    yield info, form is None or in_form(video, info, form)


def in_form(video: bytes, info: VideoInfo, form: TranscodeConfig) -> bool:
    """Whether a video that decodes whole is in a form already; no frame but the first is decoded."""
    if info.codec != "h264" or min(info.width, info.height) > form.short_side:
        return False
    if form.fps and abs(info.fps - form.fps) > 1e-3 * form.fps:
        return False
    with faults(), av.open(io.BytesIO(video), metadata_errors="ignore") as container:
        if "mp4" not in container.format.name.split(",") or len(container.streams) != 1:
            return False
        stream: Any = container.streams.video[0]
        context = stream.codec_context
        if context.pix_fmt != "yuv420p" or context.color_range not in _LIMITED or info.width % 2 or info.height % 2:
            return False
        packets = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        return (
            _constant([pts for pts, _ in packets]) and _short_gops([key for _, key in packets], form.gop) and _is_upright(video)
        )


def _constant(times: list[int | None]) -> bool:
    """Whether times, in ticks of the container, are one distance apart, but for rounding."""
    known = sorted(time for time in times if time is not None)
    steps = {later - earlier for earlier, later in pairwise(known)}
    return len(known) == len(times) and (not steps or max(steps) - min(steps) <= 1)


def _short_gops(keys: list[bool], gop: int) -> bool:
    places = [place for place, key in enumerate(keys) if key]
    return places[:1] == [0] and all(later - earlier <= gop for earlier, later in pairwise([*places, len(keys)]))


def _is_upright(video: bytes) -> bool:
    with av.open(io.BytesIO(video), metadata_errors="ignore") as container:
        return next(container.decode(video=0)).rotation == 0


# --- encoding ---


def _encode(video: bytes, info: VideoInfo, form: TranscodeConfig, rate: Fraction, frames: int) -> bytes:
    width, height = _size(info, form)
    gop = str(form.gop)
    options = {
        "preset": "veryfast",
        "tune": "fastdecode",
        "crf": str(form.crf),
        "g": gop,
        "keyint_min": gop,
        "sc_threshold": "0",
        "bf": "3",
        "b_strategy": "0",
        "b-pyramid": "none",
        "mbtree": "0",
    }
    out = io.BytesIO()
    with av.open(out, "w", format=SUFFIX) as container:
        container.metadata["comment"] = decode.CLOSED_GOPS
        stream: Any = container.add_stream(_ENCODER, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        source = decode.timed_frames(video)
        for image in _resampled(source, float(rate), frames) if form.fps else (image for _, image in source):
            if image.shape[:2] != (height, width):
                image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _size(info: VideoInfo, form: TranscodeConfig) -> tuple[int, int]:
    """Width and height that are even, not larger than they were, and not more than the form's shorter side."""
    scale = min(1.0, form.short_side / min(info.width, info.height))
    return max(2, int(info.width * scale + 1e-6) // 2 * 2), max(2, int(info.height * scale + 1e-6) // 2 * 2)


def _resampled(source: Iterator[tuple[float, Frame]], fps: float, count: int) -> Iterator[Frame]:
    """`count` frames at a constant rate: each is what the source shows in the middle of its time."""
    shown, given = next(source)[1], 0
    for time, image in source:
        while given < count and (given + 0.5) / fps < time:
            yield shown
            given += 1
        shown = image
    for _ in range(given, count):
        yield shown


def _verify(before: VideoInfo, after: VideoInfo, rate: Fraction, frames: int, form: TranscodeConfig) -> None:
    frame = float(1 / rate)
    if after.frames != frames:
        raise DecodeError(f"transcoding gave {after.frames} frames, {frames} were to be")
    if abs(after.duration - before.duration) > frame + 0.01 * before.duration:
        raise DecodeError(f"transcoding gave {after.duration:.3f} seconds of {before.duration:.3f}")
    if (after.width, after.height) != _size(before, form):
        raise DecodeError(f"transcoding gave {after.width} x {after.height} pixels, {_size(before, form)} were to be")
