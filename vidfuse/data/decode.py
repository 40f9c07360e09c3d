"""Video bytes -> RGB frames: the only way to a decoder.

Comes in: the bytes of one encoded video and the indices of the frames wanted. Goes out: uint8 frames [H, W, 3] as shown
(rotation metadata applied), what the file is, or a `DecodeError`. Frames are counted in presentation order from 0, by decoding: no
header's count is believed and nothing seeks, which is what keeps the frames right on B-frame AVIs and open GOPs. Of videos that
`data.transcode` wrote (each packet is a frame, each GOP is closed) only what leads to a wanted frame is decoded.

One thread a video: parallelism comes from many videos at a time. `pyav` is the default; `decord` (`data.by_decord`) is called in a
process of its own (`data.contained`), since broken videos make it crash: that, or a hang, is a `DecodeError` of the one video.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import av
import av.logging
import numpy as np
from av.video.reformatter import VideoReformatter

from vidfuse.data import by_decord, contained
from vidfuse.data.video import DecodeError, Frame, Inspection, VideoInfo, check_pixels, faults, timing

DECODERS = ("pyav", "decord")
MAX_FRAMES = 36_000
"""Frames of a video; 20 minutes at 30 frames a second. A longer one is refused."""
MAX_PIXELS = 4096 * 4096
"""Width x height of a frame. A larger one is refused before it is decoded."""
CLOSED_GOPS = "vidfuse: closed GOPs, a frame a packet"
"""Comment of an mp4 whose frames can be counted by its packets, and whose GOPs can be decoded by themselves."""
_CLOSED_BY_X264 = b"open_gop=0"
"""In x264's note of its settings. The comment alone does not tell: FFmpeg hands it on to what it makes of such a file."""
WHOLE_SECONDS = 3600.0
"""How long it may take to decode a whole video, or to transcode it; the longest that are read take less."""
_ALONE = {"protocol_whitelist": "none"}
"""Have FFmpeg open nothing but the bytes: playlists, lists of files and descriptions of streams name files and addresses."""
_UNPROBED = {**_ALONE, "codec_whitelist": "none"}
"""Have FFmpeg open a file without decoding a frame of it (it decodes one to guess the delay of the others, and to name the pixels)."""


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
        fps, duration = timing(
            count, float(stream.average_rate or stream.guessed_rate or 0), times[-1] - times[0] if times else 0.0
        )
        info = VideoInfo(count, fps, duration, *size, stream.codec.canonical_name)
        sound = len(container.streams.audio)
        return Inspection(info, container.format.name, pixels, sound, rotation, _spread(times)), kept


def apart(function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float = contained.SILENT_SECONDS) -> Iterator[Any]:
    """Yield what a function yields that decodes one video, in a process of its own: what crashes libraries there costs that video alone.

    Args:
        function: As for `contained.iterate`.
        arguments: The same.
        seconds: How long it may be silent.

    Raises:
        DecodeError: while iterating: the process crashed, or hangs.
        OSError: it was killed, as where no memory is left, or did not start: not the video's fault.
        Exception: what the function raises.
    """
    try:
        yield from contained.iterate(function, *arguments, seconds=seconds)
    except contained.CrashError as error:
        if error.killed:
            raise OSError(f"the process that decodes a video was killed ({error}): no memory is left there") from None
        raise DecodeError(f"the decoder {error}") from None


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
        check_pixels(stream.codec_context.width, stream.codec_context.height, MAX_PIXELS)
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
            check_pixels(frame.width, frame.height, MAX_PIXELS)
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
            check_pixels(frame.width, frame.height, MAX_PIXELS)
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


def _rgb(convert: VideoReformatter, frame: Any) -> Frame:
    image: Any = convert.reformat(frame, format="rgb24", threads=1).to_ndarray()  # else one for each CPU, for each video
    return _upright(image, frame.rotation)


def _upright(image: Frame, degrees: int) -> Frame:
    """Turn a frame by its rotation metadata, degrees counter-clockwise; other angles than quarter turns are left alone."""
    turns = round(degrees / 90) % 4 if degrees % 90 == 0 else 0
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _shown_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


# --- decord: the functions that call it run in another process, to which the bounds of this one travel ---


def _probe_contained(video: bytes) -> VideoInfo:
    *_, info = apart(_probe_decord, video, MAX_FRAMES, MAX_PIXELS)
    assert info is not None
    return info


def _decode_contained(video: bytes, indices: Sequence[int]) -> Iterator[tuple[int, Frame]]:
    for some in apart(_decode_decord, video, indices, MAX_FRAMES, MAX_PIXELS) if indices else ():
        yield from some


def _probe_decord(video: bytes, most_frames: int, most_pixels: int) -> Iterator[VideoInfo | None]:
    with faults():
        _check_links(video)
        yield from by_decord.probed(video, most_frames=most_frames, most_pixels=most_pixels)


def _decode_decord(
    video: bytes, indices: Sequence[int], most_frames: int, most_pixels: int
) -> Iterator[list[tuple[int, Frame]]]:
    with faults():
        _check_links(video)
        yield from by_decord.decoded(video, indices, most_frames=most_frames, most_pixels=most_pixels)


def _check_links(video: bytes) -> None:
    """Refuse what names other files: decord would open them."""
    with _opened(video, probed=False):
        pass
