"""Transcoding: the same pictures at the same places, in the form that was asked for, once."""

from __future__ import annotations

import io
import itertools
import random

import av
import cv2
import numpy as np
import pytest

from tests.support import make_video, shared_data, shown_index
from vidfuse.config import TranscodeConfig
from vidfuse.data import decode, transcode
from vidfuse.data.decode import decode_frames, probe
from vidfuse.data.shards import DataError
from vidfuse.data.transcode import in_form, into_form
from vidfuse.data.video import DecodeError

FORM = TranscodeConfig()


def structure(video: bytes) -> tuple[str, str, set[int], list[bool]]:
    """Codec, pixel format, distances between times, key frames."""
    with av.open(io.BytesIO(video)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        times = sorted(packet.pts for packet in packets)
        steps = {b - a for a, b in itertools.pairwise(times)}
        return stream.codec_context.name, stream.codec_context.pix_fmt, steps, [packet.is_keyframe for packet in packets]


@pytest.mark.parametrize("suffix", ["mp4", "webm", "avi", "mkv", "mov"])
def test_each_frame_stays_at_its_place(suffix):
    video = make_video(40, suffix=suffix, width=320, height=256, fps=15)
    made, info = into_form(video, TranscodeConfig(short_side=192, gop=7))
    assert (info.frames, info.width, info.height, info.codec) == (40, 240, 192, "h264")
    assert info.duration == pytest.approx(40 / 15, abs=0.01)
    codec, pixels, steps, keys = structure(made)
    assert (codec, pixels, len(steps)) == ("h264", "yuv420p", 1)
    assert [place for place, key in enumerate(keys) if key] == list(range(0, 40, 7))
    shown = [shown_index(cv2.resize(frame, (320, 256))) for _, frame in decode_frames(made, range(40))]
    assert shown == list(range(40))


def test_it_is_encoded_once_and_the_same_each_time():
    video = make_video(30, width=320, height=240)
    made, info = into_form(video, FORM)
    assert into_form(made, FORM) == (made, info)
    assert into_form(made, FORM)[0] is made
    assert into_form(video, FORM)[0] == made


def test_bytes_do_not_depend_on_what_the_memory_held():
    video = make_video(200, suffix="mp4", width=128, height=96, fps=30)
    form = TranscodeConfig(short_side=64, fps=6)
    assert len({into_form(video, form)[0] for _ in range(20)}) == 1


@pytest.mark.parametrize("frames", [1, 2])
def test_videos_of_hardly_any_frames(frames):
    made, info = into_form(make_video(frames, suffix="avi"), FORM)
    assert info.frames == frames
    assert into_form(made, FORM)[0] is made


@pytest.mark.parametrize(("fps", "frames"), [(6.0, 20), (12.0, 40), (24.0, 80)])
def test_another_frame_rate_shows_what_was_shown_then(fps, frames):
    """40 frames at 12 a second: each new frame is what the old video showed in the middle of its time."""
    made, info = into_form(make_video(40, fps=12), TranscodeConfig(fps=fps))
    assert (info.frames, info.fps) == (frames, fps)
    shown = [shown_index(frame) for _, frame in decode_frames(made, range(frames))]
    assert shown == [int((n + 0.5) / fps * 12 + 1e-9) for n in range(frames)]


def test_what_is_not_in_the_form():
    plain = {"g": "12", "preset": "ultrafast"}
    good = make_video(40, options=plain)
    assert in_form(good, probe(good), FORM)
    for video, form in (
        (make_video(40, options={**plain, "g": "13"}), FORM),
        (make_video(40, suffix="mkv", options=plain), FORM),
        (make_video(40, suffix="avi"), FORM),
        (good, TranscodeConfig(short_side=64)),
        (good, TranscodeConfig(fps=25)),
    ):
        assert not in_form(video, probe(video), form)


def test_uneven_times_become_even():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=30, options={"g": "12", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 12 * number, np.uint8), format="rgb24")
            frame.pts = number + (number >= 10) * 20
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(out.getvalue())
    assert not in_form(out.getvalue(), info, FORM)
    made, kept = into_form(out.getvalue(), FORM)
    assert (kept.frames, len(structure(made)[2])) == (20, 1)
    assert kept.duration == pytest.approx(info.duration, abs=0.1)
    made, even = into_form(out.getvalue(), TranscodeConfig(fps=30))
    assert even.frames in (40, 41), "the last one lasts as long as one does on average"
    grey = [frame.mean() for _, frame in decode_frames(made, range(40))]
    assert np.allclose(grey[10:30], grey[9], atol=2), "the picture before the gap stays until it ends"


@pytest.mark.parametrize("content", [b"", b"no video" * 99])
def test_broken_videos_are_refused(content):
    with pytest.raises(DecodeError):
        into_form(content, FORM)
    video = make_video(40)
    with pytest.raises(DecodeError):
        into_form(video[: len(video) // 2], FORM)


def test_what_comes_out_is_verified(monkeypatch):
    real = decode.timed_frames
    monkeypatch.setattr(decode, "timed_frames", lambda video: list(real(video))[:-1])
    with pytest.raises(match="transcoding gave 29 frames, 30 were to be"):
        into_form(make_video(30, suffix="avi"), FORM)
    monkeypatch.undo()
    monkeypatch.setattr(transcode, "_encode", lambda *_: make_video(30, fps=24))
    with pytest.raises(match=r"transcoding gave 1.250 seconds of 2.500"):
        into_form(make_video(30, suffix="avi"), FORM)


def test_no_encoder(monkeypatch):
    transcode.check_encoder()
    monkeypatch.setattr(transcode, "_ENCODER", "no_such_encoder")
    with pytest.raises(DataError, match="needs PyAV with no_such_encoder"):
        transcode.check_encoder()


@pytest.mark.parametrize("gop", [5, 12])
def test_what_is_left_out_changes_no_frame(gop):
    """The mark has `decode_frames` skip; without it every frame is decoded in order: both give the same frames."""
    made, _ = into_form(make_video(61, suffix="avi", fps=25), TranscodeConfig(gop=gop))
    unmarked = made.replace(decode.CLOSED_GOPS.encode(), b"x" * len(decode.CLOSED_GOPS))
    assert unmarked != made
    whole = dict(decode_frames(unmarked, range(61)))
    draw = random.Random(0)
    for wanted in ([60], [0], [4, 5], [59, 60], [17, 18, 44], *(draw.sample(range(61), 16) for _ in range(10))):
        found = dict(decode_frames(made, wanted))
        assert list(found) == sorted(wanted)
        assert all(np.array_equal(found[number], whole[number]) for number in wanted)
    with pytest.raises(match="frame 61 is wanted, the video has 61"):
        list(decode_frames(made, [3, 61]))
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(DecodeError):
            list(decode_frames(made[: int(share * len(made))], [60]))


def test_a_frame_to_which_no_other_refers_is_decoded_only_if_it_is_wanted():
    made, _ = into_form(make_video(24, suffix="avi", fps=25), FORM)
    with av.open(io.BytesIO(made)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        order = sorted(packet.pts for packet in packets)
        spare = {  # nal_ref_idc: H.264, 7.4.1; a key frame's packet has other things before it
            order.index(packet.pts): (packet.pos, packet.size)
            for packet in packets
            if not packet.is_keyframe and not bytes(packet)[4] >> 5 & 3
        }
    assert len(spare) >= 24 // 2
    damaged = bytearray(made)
    for position, size in spare.values():
        damaged[position + 5 : position + size] = b"\xff" * (size - 5)
    others = sorted(set(range(24)) - set(spare))
    found, whole = (dict(decode_frames(bytes(video), others)) for video in (damaged, made))
    assert list(found) == others and all(np.array_equal(found[number], whole[number]) for number in others)
    with pytest.raises(DecodeError):
        list(decode_frames(bytes(damaged), range(24)))


def _without_start(video: bytes, frames: int) -> bytes:
    """As `ffmpeg -ss ... -c copy` cuts it: packets that lead to the first frame shown stay, and are not shown."""
    out = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(out, "w", format="mp4") as made:
        stream = source.streams.video[0]
        copy = made.add_stream_from_template(stream)
        made.metadata.update(source.metadata)
        for packet in (packet for packet in source.demux(stream) if packet.size):
            packet.pts, packet.dts = packet.pts - frames * packet.duration, packet.dts - frames * packet.duration
            packet.stream = copy
            made.mux(packet)
    return out.getvalue()


def _encoded_anew(video: bytes, codec: str, **options: str) -> bytes:
    """As `ffmpeg -c:v codec` makes it: with what the file says of itself."""
    out = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(out, "w", format="mp4") as made:
        made.metadata.update(source.metadata)
        stream = made.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = source.streams.video[0].width, source.streams.video[0].height, "yuv420p"
        for frame in source.decode(video=0):
            made.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        made.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        lambda video: _without_start(video, 5),
        lambda video: _encoded_anew(video, "libx264"),
        lambda video: _encoded_anew(video, "libx264", **{"x264-params": "open-gop=1:keyint=12"}),
        lambda video: _encoded_anew(video, "libx265", **{"x265-params": "open-gop=1:keyint=12:log-level=none"}),
        lambda video: _encoded_anew(video, "mpeg4", bf="2"),
    ],
    ids=["cut", "x264", "x264, open GOPs", "x265, open GOPs", "mpeg4"],
)
def test_a_mark_that_others_hand_on_costs_no_frame(change):
    made, _ = into_form(make_video(40, suffix="avi", fps=25), FORM)
    changed = change(made)
    with av.open(io.BytesIO(changed)) as container:
        assert container.metadata["comment"] == decode.CLOSED_GOPS
    expected = [frame for _, frame in decode.timed_frames(changed)]
    assert len(expected) in (35, 40)
    found = dict(decode_frames(changed, range(len(expected))))
    assert all(np.array_equal(found[number], frame) for number, frame in enumerate(expected))
    assert np.array_equal(dict(decode_frames(changed, [11]))[11], expected[11])


# --- real files ---


@pytest.mark.parametrize(
    "name",
    ["awkward/video_90.mov", "awkward/video_180.mov", "awkward/video_270.mov", "awkward/bt709_full_range.mp4", "awkward/h264_10bits.mp4",
     "awkward/h265_video.mp4", "originals/demo_skeleton.mp4", "originals/ApplyEyeMakeup.avi"],
)  # fmt: skip
def test_awkward_videos_keep_their_look(name):
    """Rotated, full-range, ten-bit, uneven: what training sees before and after is the same picture but for the loss of x264.

    FFmpeg's way from YUV to RGB rounds down, by 1.2 of 255 levels on average (3 where colours are saturated), and does so once more.
    """
    video = shared_data(name).read_bytes()
    before = probe(video)
    made, after = into_form(video, FORM)
    assert after.frames == before.frames
    assert min(after.width, after.height) == min(256, before.width, before.height)
    for number in (0, before.frames - 1):
        (old,), (new,) = ([f for _, f in decode_frames(v, [number])] for v in (video, made))
        old = cv2.resize(old, (after.width, after.height), interpolation=cv2.INTER_AREA)
        difference = np.abs(old.astype(int) - new)
        assert difference.mean() < 5, (name, number)
        assert np.abs(old.mean((0, 1)) - new.mean((0, 1))).max() < 4, "no shift of colour or brightness"
    assert into_form(made, FORM)[0] is made
