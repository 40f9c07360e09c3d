"""Both decoders against the same reference: pictures that show their index, real files, and broken ones."""

from __future__ import annotations

import io
import random
import time
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest

from tests.support import make_video, shared_data, shown_index
from vidfuse.config import TranscodeConfig
from vidfuse.data import decode
from vidfuse.data.decode import DECODERS, decode_frames, probe
from vidfuse.data.transcode import into_form
from vidfuse.data.video import DecodeError

SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov")
B_FRAMES = {"bf": "3", "g": "12"}


@pytest.fixture(params=DECODERS)
def decoder(request):
    return request.param


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_frame_is_the_one_asked_for(decoder, suffix):
    video = make_video(40, suffix=suffix)
    wanted = [39, 0, 7, 7, 23]
    found = dict(decode_frames(video, wanted, decoder=decoder))
    assert list(found) == [0, 7, 23, 39]
    assert {index: shown_index(frame) for index, frame in found.items()} == {index: index for index in found}
    assert all(frame.shape == (96, 128, 3) and frame.dtype == np.uint8 for frame in found.values())


@pytest.mark.parametrize("suffix", ["mp4", "avi"])
def test_b_frames_come_in_presentation_order(decoder, suffix):
    video = make_video(40, suffix=suffix, options={**B_FRAMES, **({} if suffix == "avi" else {"preset": "medium"})})
    assert [shown_index(frame) for _, frame in decode_frames(video, range(40), decoder=decoder)] == list(range(40))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_probe_counts_what_is_there(decoder, suffix):
    info = probe(make_video(31, suffix=suffix, fps=15), decoder=decoder)
    assert (info.frames, info.width, info.height) == (31, 128, 96)
    assert info.fps == pytest.approx(15, rel=0.02)
    assert info.duration == pytest.approx(31 / 15, abs=0.1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_decoding_starts_no_threads(suffix):
    video, threads = make_video(20, suffix=suffix), psutil.Process().num_threads
    before = threads()
    assert {threads() for _ in decode_frames(video, range(20))} == {before}, "videos are what is decoded in parallel"


def _webm(codec: str, *frames: int) -> bytes:
    """A track for each number of frames; each shows grey levels of its own."""
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        for track in range(len(frames)):
            stream = container.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = 64 * (track + 1), 48, "yuv420p"
        for track, stream in enumerate(container.streams):
            for index in range(frames[track]):
                picture = np.full((48, stream.width, 3), 20 + 60 * track + 7 * index, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("video", "tried"),
    [
        pytest.param(lambda: make_video(40, suffix="webm"), [False], id="vp9"),
        pytest.param(lambda: _webm("libvpx", 12), [False], id="vp8"),
        pytest.param(lambda: _webm("libsvtav1", 12), [False], id="av1"),
        pytest.param(lambda: _webm("libvpx-vp9", 3, 12), [False, True], id="two tracks"),
        pytest.param(lambda: into_form(make_video(40, suffix="avi"), TranscodeConfig())[0], [False], id="transcoded"),
        pytest.param(lambda: make_video(40, suffix="mkv"), [True], id="h264"),
    ],
)
def test_files_that_tell_the_order_of_frames_are_opened_without_decoding(monkeypatch, video, tried):
    content, opened, opens = video(), [], av.open
    frames = probe(content).frames

    def spy(*args, **options):
        opened.append(options.get("options") != decode._UNPROBED)
        return opens(*args, **options)

    monkeypatch.setattr(decode.av, "open", spy)
    found = dict(decode_frames(content, range(frames)))
    assert opened == tried
    monkeypatch.setattr(decode, "_is_webm", lambda _: False)
    monkeypatch.setattr(decode, "_CLOSED_BY_X264", b"not in any video")
    expected = dict(decode_frames(content, range(frames)))
    assert list(found) == list(expected) == list(range(frames))
    assert all((found[number] == expected[number]).all() for number in expected)


def test_frames_are_rgb(decoder):
    first = dict(decode_frames(make_video(255), [254], decoder=decoder))[254]
    assert shown_index(first) == 254
    red = _coloured()
    assert np.allclose(dict(decode_frames(red, [0], decoder=decoder))[0].mean((0, 1)), (200, 30, 30), atol=12)


def _coloured() -> bytes:
    import io

    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        picture = np.full((64, 64, 3), (200, 30, 30), dtype=np.uint8)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def test_nothing_wanted_reads_nothing(decoder):
    assert list(decode_frames(b"no video", [], decoder=decoder)) == []


def test_decoding_stops_after_the_last_wanted_frame():
    video = make_video(60, suffix="avi")
    cut = video[: len(video) * 3 // 4]
    assert [index for index, _ in decode_frames(cut, [0, 10])] == [0, 10]
    with pytest.raises(DecodeError):
        list(decode_frames(cut, [0, 59]))


def test_a_frame_that_is_not_there(decoder):
    with pytest.raises(DecodeError, match="frame 12 is wanted, the video has 12"):
        list(decode_frames(make_video(12), [3, 12], decoder=decoder))


def test_negative_frames_and_unknown_decoders_are_the_callers_mistake():
    with pytest.raises(ValueError, match="counted from 0, wanted -1"):
        decode_frames(make_video(4), [-1])
    with pytest.raises(ValueError, match="unknown decoder 'ffmpeg'; there are pyav, decord"):
        probe(b"", decoder="ffmpeg")


@pytest.mark.parametrize("content", [b"", b"x", b"no video at all" * 99, bytes(5000)])
def test_bytes_that_are_no_video(content):
    for call in (lambda: probe(content), lambda: list(decode_frames(content, [0]))):
        with pytest.raises(DecodeError) as error:
            call()
        assert str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile x.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{here}/x.ts\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    ],
    ids=["list of files", "playlist", "description of a stream"],
)
def test_text_that_names_other_videos_is_no_video(decoder, text, tmp_path, monkeypatch):
    """Each of them is opened by one of the decoders (the last one for 20 s) unless that is prevented."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.mp4").write_bytes(make_video(12))
    with av.open(str(tmp_path / "x.mp4")) as source, av.open(str(tmp_path / "x.ts"), "w", format="mpegts") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    video = text.format(here=tmp_path).encode()
    started = time.monotonic()
    with pytest.raises(DecodeError):
        probe(video, decoder=decoder)
    with pytest.raises(DecodeError):
        list(decode_frames(video, [0], decoder=decoder))
    assert time.monotonic() - started < 10


def test_audio_alone_is_no_video():
    import io

    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DecodeError, match="no video stream"):
        probe(out.getvalue())


def test_caps(monkeypatch, decoder):
    video = make_video(12)
    monkeypatch.setattr(decode, "MAX_FRAMES", 11)
    with pytest.raises(DecodeError, match="11"):
        probe(video, decoder=decoder)
    monkeypatch.undo()
    monkeypatch.setattr(decode, "MAX_PIXELS", 128 * 96 - 1)
    with pytest.raises(DecodeError, match="128 x 96 pixels"):
        probe(video, decoder=decoder)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_cut_off_videos_are_found(suffix):
    video = make_video(40, suffix=suffix)
    for share in (0.05, 0.3, 0.5, 0.7, 0.9):
        with pytest.raises(DecodeError):
            probe(video[: int(share * len(video))])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_broken_bytes_raise_nothing_but_decode_errors(suffix):
    video = make_video(30, suffix=suffix)
    draw = random.Random(suffix)
    refused = 0
    for _ in range(60):
        try:
            info = probe(_mutated(video, draw))
            assert 0 < info.frames <= 90
        except DecodeError as error:
            refused += 1
            assert 0 < len(str(error)) < 400
    assert refused > 20


def _mutated(video: bytes, draw: random.Random) -> bytes:
    broken = bytearray(video)
    kind = draw.choice(("cut", "flip", "zero", "head"))
    if kind == "cut":
        return bytes(broken[: draw.randrange(len(broken))])
    if kind == "zero":
        start = draw.randrange(len(broken))
        broken[start : start + 1000] = bytes(len(broken[start : start + 1000]))
    for _ in range({"flip": 20, "head": 8}.get(kind, 0)):
        broken[draw.randrange(600 if kind == "head" else len(broken))] ^= 1 << draw.randrange(8)
    return bytes(broken)


# --- real files ---


def test_reference_frames_of_torchcodec(decoder):
    import torch

    folder = shared_data("reference/torchcodec_nasa")
    reference = {
        int(file.stem[-6:]): torch.load(file, weights_only=True).numpy()
        for file in folder.glob("nasa_13013.mp4.stream3.frame*.pt")
    }
    video = (folder / "nasa_13013.mp4").read_bytes()
    found = dict(decode_frames(video, list(reference), decoder=decoder))
    assert found.keys() == reference.keys()
    for index, frame in found.items():
        assert np.abs(frame.astype(int) - reference[index]).max() <= 1, index


@pytest.mark.parametrize("name", ["video_0.mov", "video_90.mov", "video_180.mov", "video_270.mov"])
def test_rotated_videos_have_the_size_they_are_shown_in(decoder, name):
    folder = shared_data("awkward")
    video = (folder / name).read_bytes()
    frame = dict(decode_frames(video, [0], decoder=decoder))[0]
    info = probe(video, decoder=decoder)
    assert frame.shape[:2] == (info.height, info.width)
    turned = name in ("video_90.mov", "video_270.mov")
    assert (info.height > info.width) == turned


def test_decoders_agree_on_real_files():
    """Also on which way rotated ones are turned: decord reads the rotation by itself."""
    folder = shared_data("realclips")
    files = [*sorted(folder.glob("*/*_g01_c01.avi")), *(shared_data("awkward") / f"video_{d}.mov" for d in (0, 90, 180, 270))]
    for file in files:
        video = file.read_bytes()
        wanted = [0, 1, probe(video).frames - 1]
        pair = [dict(decode_frames(video, wanted, decoder=name)) for name in DECODERS]
        for index in pair[0]:
            assert np.abs(pair[0][index].astype(int) - pair[1][index]).mean() < 0.1, (file.name, index)


@pytest.mark.parametrize(
    "name", ["av1_video.mkv", "bt709_full_range.mp4", "h264_10bits.mp4", "h265_video.mp4", "unordered.mov"]
)
def test_awkward_files_decode(name):
    video = (shared_data("awkward") / name).read_bytes()
    info = probe(video)
    assert list(dict(decode_frames(video, range(info.frames)))) == list(range(info.frames))


def test_a_corrupted_file_is_refused():
    with pytest.raises(DecodeError):
        probe((shared_data("awkward") / "corrupted.mp4").read_bytes())


# --- how a file is made ---


def with_sound_and_gaps(gap: int) -> bytes:
    """Twelve frames, of which every fourth comes `gap` frame times late, and a track of silence."""
    out = io.BytesIO()
    with av.open(out, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number + gap * (number // 4), Fraction(1, 10)
            container.mux(stream.encode(frame))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux([*stream.encode(), *sound.encode(silence), *sound.encode()])
    return out.getvalue()


def _changing(*sizes: tuple[int, int]) -> bytes:
    """Twelve frames of each size (width, height), the number of each as its grey level: what a recorded call may look like."""
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=12)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for part, (width, height) in enumerate(sizes):
            encoder = av.CodecContext.create("libvpx-vp9", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base, encoder.framerate = Fraction(1, 12), Fraction(12, 1)
            encoder.options = {"deadline": "realtime", "cpu-used": "8"}
            frames = [np.full((height, width, 3), 8 * number, np.uint8) for number in range(12 * part, 12 * part + 12)]
            shown = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
            for place, frame in enumerate(shown, start=12 * part):
                frame.pts, frame.time_base = place, Fraction(1, 12)
            for packet in [packet for frame in (*shown, None) for packet in encoder.encode(frame)]:
                packet.stream = stream
                container.mux(packet)
    return out.getvalue()


@pytest.mark.parametrize("sizes", [((320, 240), (160, 120)), ((64, 48), (320, 240)), ((96, 64), (64, 96))])
def test_frames_of_a_video_that_changes_its_size_have_that_of_the_first(decoder, sizes):
    video = _changing(*sizes)
    info = probe(video, decoder=decoder)
    assert (info.frames, info.width, info.height) == (24, *sizes[0])
    frames = dict(decode_frames(video, [3, 14, 23], decoder=decoder))
    assert {frame.shape for frame in frames.values()} == {(*sizes[0][::-1], 3)}
    assert [round(frame.mean() / 8) for frame in frames.values()] == [3, 14, 23]
    assert [round(frame.mean() / 8) for _, frame in decode.timed_frames(video)] == list(range(24))
    assert {frame.shape for frame in decode.inspect(video, range(24))[1]} == {(*sizes[0][::-1], 3)}
    assert into_form(video, TranscodeConfig(short_side=64))[1].frames == 24


def test_inspection_tells_how_a_file_is_made_and_keeps_wanted_frames():
    video = make_video(12, suffix="mp4")
    found, kept = decode.inspect(video, [0, 5, 11])
    assert found.info == decode.probe(video)
    assert (found.pixel_format, found.audio_tracks, found.rotation) == ("yuv420p", 0, 0)
    assert found.interval_spread == pytest.approx(0, abs=1e-6)
    assert "mp4" in found.container
    assert [shown_index(frame) for frame in kept] == [0, 5, 11]
    assert len(decode.inspect(video, [3, 40])[1]) == 1


def _timed(milliseconds: list[int]) -> bytes:
    """WebM whose container says 25 frames a second."""
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"deadline": "realtime", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in milliseconds:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), time % 255, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    ("times", "fps"),
    [
        ([0, 33, 66, 500, 533, 900, 933, 1500, 1533, 1566, 1600, 2400], 11 / 2.4),
        ([20 * number for number in range(50)], 50),
        ([40 * number for number in range(12)], 25),
        ([0, *(40 * number for number in range(3, 14))], 25),  # as an AVI with B-frames begins
    ],
)
def test_frames_a_second_are_the_average_where_the_container_is_wrong(times, fps):
    video = _timed(times)
    info = probe(video)
    assert (info.frames, info.fps) == (len(times), pytest.approx(fps))
    assert info.duration == pytest.approx(times[-1] / 1000 + 1 / fps)
    made, found = into_form(video, TranscodeConfig(short_side=64))
    assert (found.frames, found.fps) == (len(times), pytest.approx(info.frames / info.duration, rel=1e-3)) and made != video


@pytest.mark.parametrize(("gap", "uneven"), [(0, False), (2, True)])
def test_inspection_tells_sound_and_uneven_times(gap, uneven):
    found, _ = decode.inspect(with_sound_and_gaps(gap))
    assert found.audio_tracks == 1
    assert (found.interval_spread > 0.25) == uneven
