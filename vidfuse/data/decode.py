"""Video bytes -> RGB frames: the only file that knows a decoder.

Comes in: the bytes of one encoded video and the indices of the frames wanted. Goes out: uint8 frames [H, W, 3] as shown
(rotation metadata applied), what the file is, or a `DecodeError`. Frames are counted in presentation order from 0, by decoding: no
header's count is believed and nothing seeks, which is what keeps the frames right on B-frame AVIs and open GOPs. Of videos that
`data.transcode` wrote (each packet is a frame, each GOP is closed) only what leads to a wanted frame is decoded.

One thread a video: parallelism comes from many videos at a time. `pyav` is the default; `decord` is called the way in which it
does not shift frames and seldom crashes (bytes through a file in memory, one thread, every frame in order), and in a process of its
own (`data.contained`), since broken videos make it crash all the same: that, or a hang, is a `DecodeError` of the one video.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import io
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import av
import av.logging
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from vidfuse.data import contained

DECODERS = ("pyav", "decord")
MAX_FRAMES = 36_000
"""Frames of a video; 20 minutes at 30 frames a second. A longer one is refused."""
MAX_PIXELS = 4096 * 4096
"""Width x height of a frame. A larger one is refused before it is decoded."""
CLOSED_GOPS = "vidfuse: closed GOPs, a frame a packet"
"""Comment of an mp4 whose frames can be counted by its packets, and whose GOPs can be decoded by themselves."""
_CLOSED_BY_X264 = b"open_gop=0"
"""In x264's note of its settings. The comment alone does not tell: FFmpeg hands it on to what it makes of such a file."""
_ALONE = {"protocol_whitelist": "none"}
"""Have FFmpeg open nothing but the bytes: playlists, lists of files and descriptions of streams name files and addresses."""
_UNPROBED = {**_ALONE, "codec_whitelist": "none"}
"""Have FFmpeg open a file without decoding a frame of it (it decodes one to guess the delay of the others, and to name the pixels)."""
_GAPS = 2.5
"""Intervals that the frames of a constant rate may lack or have too many: AVIs with B-frames begin with a gap."""
_UNEVEN = 0.05
"""Share of its intervals by which a rate may be off and is still the container's."""
_CHUNK = 16
"""Frames that decord holds at a time."""
_IN_MEMORY = hasattr(os, "memfd_create")

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


def probe(video: bytes, *, decoder: str = "pyav") -> VideoInfo:
    """Decode a whole video and say what it is.

    Args:
        video: The encoded file's bytes.
        decoder: One of `DECODERS`.

    Raises:
        DecodeError: a packet that does not decode, fewer frames than the container promises, none at all, or more frames or
            pixels than `MAX_FRAMES` and `MAX_PIXELS`.
        ValueError: an unknown decoder.
    """
    return _pick(decoder, _probe_pyav, _probe_contained)(video)


def decode_frames(video: bytes, wanted: Sequence[int], *, decoder: str = "pyav") -> Iterator[tuple[int, Frame]]:
    """Yield each distinct wanted frame once, in increasing order, as `(index, RGB [H, W, 3])`.

    Only wanted frames are converted to RGB, and decoding stops after the last of them.

    Args:
        video: The encoded file's bytes.
        wanted: Frame indices from 0, in presentation order; repeats and any order are fine.
        decoder: One of `DECODERS`.

    Raises:
        DecodeError: while iterating: broken bytes, or a wanted frame that the video does not have.
        ValueError: at the call: an unknown decoder or a negative index.
    """
    indices = sorted({int(index) for index in wanted})
    if indices and indices[0] < 0:
        raise ValueError(f"frames are counted from 0, wanted {indices[0]}")
    return _pick(decoder, _decode_pyav, _decode_contained)(video, indices)


def inspect(video: bytes, wanted: Sequence[int] = ()) -> tuple[Inspection, list[Frame]]:
    """Decode a whole video with PyAV, in order, and keep some of its frames.

    Args:
        video: The encoded file's bytes.
        wanted: Indices of frames to keep, increasing, from 0; those the video does not have are left out.

    Returns:
        What the file is, and the wanted frames, RGB [H, W, 3] each.

    Raises:
        DecodeError: as `probe`.
    """
    times: list[float] = []
    kept: list[Frame] = []
    left = set(wanted)
    size, rotation, pixels = (0, 0), 0, ""
    with faults(), _opened(video) as (container, stream):
        convert = VideoReformatter()
        count = 0
        for count, frame in enumerate(_frames(container, stream), start=1):
            if frame.time is not None:
                times.append(frame.time)
            if count == 1:
                size, rotation, pixels = _shown_size(frame), int(frame.rotation), frame.format.name
            if count - 1 in left:
                kept.append(_rgb(convert, frame))
        fps, duration = _timing(
            count, float(stream.average_rate or stream.guessed_rate or 0), times[-1] - times[0] if times else 0.0
        )
        info = VideoInfo(count, fps, duration, *size, stream.codec.canonical_name)
        sound = len(container.streams.audio)
        return Inspection(info, container.format.name, pixels, sound, rotation, _spread(times)), kept


def timed_frames(video: bytes) -> Iterator[tuple[float, Frame]]:
    """Yield all frames in order, as `(seconds since the first, RGB [H, W, 3])`.

    Args:
        video: The encoded file's bytes.

    Raises:
        DecodeError: while iterating: what `probe` raises.
    """
    with faults(), _opened(video) as (container, stream):
        convert, rate = VideoReformatter(), float(stream.average_rate or stream.guessed_rate or 25)
        start: float | None = None
        for count, frame in enumerate(_frames(container, stream)):
            time = count / rate if frame.time is None else frame.time
            start = time if start is None else start
            yield time - start, _rgb(convert, frame)


def _pick(decoder: str, pyav: Any, decord: Any) -> Any:
    if decoder not in DECODERS:
        raise ValueError(f"unknown decoder {decoder!r}; there are {', '.join(DECODERS)}")
    if decoder == "decord" and importlib.util.find_spec("decord") is None:
        raise ValueError("data.decoder=decord needs the package decord, which is not installed here; use data.decoder=pyav")
    return pyav if decoder == "pyav" else decord


# --- PyAV ---


def _probe_pyav(video: bytes) -> VideoInfo:
    return inspect(video)[0].info


def _spread(times: Sequence[float]) -> float:
    intervals = np.diff(times)
    low, middle, high = np.percentile(intervals, [5, 50, 95]) if len(intervals) else (0.0, 0.0, 0.0)
    return float((high - low) / middle) if middle > 0 else 0.0


def _timing(frames: int, fps: float, span: float) -> tuple[float, float]:
    """Frames a second and seconds, from the container's rate and the time between first and last frame (0: unknown).

    The container's rate is exact where it holds; a WebM of a variable rate names one that it has nowhere.
    """
    if not (math.isfinite(fps) and fps > 0):
        fps = (frames - 1) / span if span > 0 else 25.0
    elif frames > 1 and span > 0 and abs(span * fps - (frames - 1)) > max(_GAPS, _UNEVEN * (frames - 1)):
        fps = (frames - 1) / span
    return fps, span + 1 / fps if span > 0 else frames / fps


def _decode_pyav(video: bytes, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    convert = VideoReformatter()
    with faults():
        yield from ((number, _rgb(convert, frame)) for number, frame in _wanted(video, indices))


def _wanted(video: bytes, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The frames `indices`, which are increasing, with their numbers."""
    if not indices:
        return
    if CLOSED_GOPS.encode() in video and _CLOSED_BY_X264 in video:
        with _opened(video, probed=False) as (container, stream):
            packets, marked = container.demux(stream), container.metadata.get("comment") == CLOSED_GOPS
            first = next(packets)
            if marked and not first.is_discard:  # it is where the start was cut off without encoding
                yield from _frames_of_gops(chain((first,), packets), stream.codec_context, indices)
                return
    with _opened(video, probed=not _is_webm(video)) as (container, stream):
        yield from _frames_by_count(_frames(container, stream), indices)


def _frames_by_count(frames: Iterator[Any], indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    remaining = iter(indices)
    target, count = next(remaining), 0
    for count, frame in enumerate(frames, start=1):
        if count - 1 == target:
            yield target, frame
            target = next(remaining, -1)
            if target < 0:
                return
    raise DecodeError(f"frame {target} is wanted, the video has {count}")


def _is_webm(video: bytes) -> bool:
    """Its codecs give frames in order: they come right without FFmpeg having tried some."""
    return video.startswith(b"\x1a\x45\xdf\xa3") and b"webm" in video[:64]


@contextlib.contextmanager
def _opened(video: bytes, *, probed: bool = True) -> Iterator[tuple[Any, Any]]:
    if (declared := _matroska_bytes(video)) > len(video):
        raise DecodeError(f"the video is cut off: {len(video)} of {declared} bytes are there")
    with contextlib.ExitStack() as opened:
        options = _ALONE if probed else _UNPROBED
        container = opened.enter_context(av.open(io.BytesIO(video), mode="r", metadata_errors="ignore", options=options))
        if not probed and len(container.streams.video) > 1:  # the best of several is chosen by what was tried
            container = opened.enter_context(av.open(io.BytesIO(video), mode="r", metadata_errors="ignore", options=_ALONE))
        stream: Any = container.streams.best("video")
        if stream is None:
            raise DecodeError("no video stream")
        if stream.codec_context is None:
            raise DecodeError("no decoder for the codec of the video stream")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        _check_pixels(stream.codec_context.width, stream.codec_context.height)
        yield container, stream


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    """All frames in presentation order; a packet or frame that is damaged, or missing at the end, is an error.

    A stream may change its frames' size (WebM recorded from a call). As in FFmpeg's programs, all have the first one's here.
    """
    packets = count = 0
    scale, size = VideoReformatter(), (0, 0)
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DecodeError(f"the video is cut off or damaged after {count} frames (packet {packets})")
        packets += packet.size > 0
        for frame in packet.decode():
            if frame.is_corrupt:
                raise DecodeError(f"frame {count} is damaged")
            _check_pixels(frame.width, frame.height)
            count += 1
            if count > MAX_FRAMES:
                raise DecodeError(f"more than {MAX_FRAMES} frames; cut the video into shorter ones")
            size = size if count > 1 else (frame.width, frame.height)
            yield frame if (frame.width, frame.height) == size else scale.reformat(frame, *size, threads=1)
    if not count:
        raise DecodeError("no frame decodes")
    if packets < stream.frames and "mp4" in container.format.name:
        raise DecodeError(f"the video is cut off: {packets} of {stream.frames} packets are there")


def _frames_of_gops(packets: Iterator[Any], decoder: Any, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """The frames `indices`, which are increasing, with their numbers; GOPs without one of them are left out."""
    first, gop = 0, list[Any]()
    for packet in packets:
        if packet.is_keyframe or not packet.size:  # the packet at the end is empty
            wanted = indices[bisect.bisect_left(indices, first) : bisect.bisect_left(indices, first + len(gop))]
            if wanted:
                yield from _frames_of_gop(decoder, first, gop, set(wanted))
            first, gop = first + len(gop), []
            if first > indices[-1]:
                return
        gop.append(packet)
    missing = indices[bisect.bisect_left(indices, first)]
    raise DecodeError(f"frame {missing} is wanted, the video has {first}")


def _frames_of_gop(decoder: Any, first: int, packets: Sequence[Any], wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """As long as some are wanted; frames to which no other refers are not decoded unless they are."""
    number = {time: place for place, time in enumerate(sorted(packet.pts for packet in packets), start=first)}
    last = max(place for place, packet in enumerate(packets) if number[packet.pts] in wanted)
    for packet in (*packets[: last + 1], None):
        if packet is not None:
            decoder.skip_frame = "DEFAULT" if number[packet.pts] in wanted else "NONREF"
        for frame in decoder.decode(packet):
            if frame.is_corrupt:
                raise DecodeError(f"frame {number.get(frame.pts)} is damaged")
            _check_pixels(frame.width, frame.height)
            if (shown := number.get(frame.pts)) in wanted:
                wanted.remove(shown)
                yield shown, frame
    if wanted:
        raise DecodeError(f"frames {sorted(wanted)} do not decode: the video is damaged")
    decoder.flush_buffers()


def _matroska_bytes(video: bytes) -> int:
    """Length that a Matroska or WebM file gives itself, in bytes; 0: another container, or not told.

    FFmpeg ends such a file silently where it is cut off; MP4 and AVI it notices.
    """
    position = 0
    for identifier in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):  # the EBML header, the segment
        start = position + 4
        if video[position:start] != identifier or start >= len(video) or not video[start]:
            return 0
        width = 9 - video[start].bit_length()  # leading zero bits tell how many bytes the size has
        bits = 7 * width
        size = int.from_bytes(video[start : start + width]) & ((1 << bits) - 1)
        if size == (1 << bits) - 1:
            return 0
        position = start + width + size
    return position


def _check_pixels(width: int, height: int, most: int = 0) -> None:
    most = most or MAX_PIXELS
    if width * height > most:
        raise DecodeError(f"a frame of {width} x {height} pixels; at most {most} pixels are read, make the video smaller")


def _rgb(convert: VideoReformatter, frame: Any) -> Frame:
    image: Any = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()  # else one for each CPU, for each video
    return _upright(image, frame.rotation)


def _upright(image: Frame, degrees: int) -> Frame:
    """Turn a frame by its rotation metadata, degrees counter-clockwise; other angles than quarter turns are left alone."""
    turns = round(degrees / 90) % 4 if degrees % 90 == 0 else 0
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _shown_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


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


# --- decord: the functions that import it run in another process, to which the bounds of this one travel ---


def _probe_contained(video: bytes) -> VideoInfo:
    with _crashes():
        *_, info = contained.iterate(_probe_decord, video, MAX_FRAMES, MAX_PIXELS)
    assert info is not None
    return info


def _decode_contained(video: bytes, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    with _crashes():
        for some in contained.iterate(_decode_decord, video, indices, MAX_FRAMES, MAX_PIXELS) if indices else ():
            yield from some


@contextlib.contextmanager
def _crashes() -> Iterator[None]:
    try:
        yield
    except contained.CrashError as error:
        raise DecodeError(f"the decoder {error}") from None


def _probe_decord(video: bytes, most_frames: int, most_pixels: int) -> Iterator[VideoInfo | None]:
    """Yield `None` for each chunk that decodes, as a sign of life, and in the end what the video is."""
    with faults(), _reader(video, most_frames, most_pixels) as reader:
        count, fps = len(reader), float(reader.get_avg_fps())
        height = width = 0
        for start in range(0, count, _CHUNK):
            height, width = reader.get_batch(range(start, min(start + _CHUNK, count))).shape[1:3]
            yield None
        fps, duration = _timing(count, fps, 0.0)
        yield VideoInfo(count, fps, duration, width, height, "")


def _decode_decord(
    video: bytes, indices: Sequence[int], most_frames: int, most_pixels: int
) -> Iterator[list[tuple[int, Frame]]]:
    """Yield the wanted frames of each chunk, also where there are none."""
    with faults(), _reader(video, most_frames, most_pixels) as reader:
        if indices[-1] >= len(reader):
            raise DecodeError(f"frame {indices[-1]} is wanted, the video has {len(reader)}")
        for start in range(0, indices[-1] + 1, _CHUNK):
            chunk = reader.get_batch(range(start, min(start + _CHUNK, indices[-1] + 1))).asnumpy()
            yield [(index, chunk[index - start]) for index in indices if start <= index < start + len(chunk)]


@contextlib.contextmanager
def _reader(video: bytes, most_frames: int, most_pixels: int) -> Iterator[Any]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    with _opened(video, probed=False):  # refuses what names other files: decord would open them
        pass
    # A file without a name: a crash leaves none behind.
    with os.fdopen(os.memfd_create("video"), "wb") if _IN_MEMORY else tempfile.TemporaryFile() as file:
        file.write(video)
        file.flush()
        reader = decord.VideoReader(f"/dev/fd/{file.fileno()}", num_threads=1)
        if not 0 < len(reader) <= most_frames:
            raise DecodeError(f"{len(reader)} frames; 1 to {most_frames} are read")
        height, width = reader[0].shape[:2]
        _check_pixels(width, height, most_pixels)
        yield reader
