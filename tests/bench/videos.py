"""Videos as Something-Something-V2 has them, for measurements: VP9, 240 high, 12 frames a second, 45 of them.

Cut from real videos where the shared test data are there, so that motion, texture and bits are those of real ones: 85 KB each, 88 KB
are the mean of the data set (19.4 GB for 220,847 videos, its page says). Elsewhere noise, whose codecs have more to do: 148 KB.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import av
import cv2
import numpy as np

from tests import support
from vidfuse.config import TranscodeConfig
from vidfuse.data import decode
from vidfuse.data.layouts import read_layout
from vidfuse.data.video import Frame
from vidfuse.on_ray.packing import pack, prepare

VIDEOS, FRAMES, WIDTH, HEIGHT, FPS = 240, 45, 432, 240, 12
_FROM = (
    "ArmWrestling.mp4",
    "flipping_a_pancake.mkv",
    "hitting_baseball.mp4",
    "jesse_dance.mp4",
    "playing_guitar.mp4",
    "test.mp4",
)
_APART = 60
"""Frames of a source between the starts of two cuts."""
_VP9 = {"crf": "34", "b": "0", "deadline": "good", "cpu-used": "4"}


def written(folder: Path, transcode: TranscodeConfig | None, url: str | None = None) -> str:
    """`VIDEOS` of them in shards, as they are or transcoded; where the shards are, by default in the folder."""
    videos = folder / "videos"
    if not videos.exists():
        for name in ("a", "b"):
            (videos / "train" / name).mkdir(parents=True)
        source = support.shared_root() / "originals"
        real = all((source / name).is_file() for name in _FROM)
        kinds = list(_cut(source) if real else _noise())
        print(f"\n{'real' if real else 'noise'}: {sum(map(len, kinds)) / len(kinds) / 1000:.0f} KB a video")
        for number in range(VIDEOS):
            (videos / "train" / "ab"[number % 2] / f"{number}.webm").write_bytes(kinds[number % len(kinds)])
    url = url or str(folder / ("transcoded" if transcode else "as-is"))
    pack(prepare(read_layout(videos, "tree"), videos, url, 3_000_000, transcode))
    return url


def _noise() -> Iterator[bytes]:
    for seed in range(12):
        yield support.make_video(FRAMES, suffix="webm", width=WIDTH, height=HEIGHT, seed=seed)


def _cut(folder: Path) -> Iterator[bytes]:
    for name in _FROM:
        content = (folder / name).read_bytes()
        info = decode.probe(content)
        step = info.fps / FPS
        for start in range(0, info.frames - int(FRAMES * step), _APART):
            numbers = [start + int(place * step) for place in range(FRAMES)]
            yield _encoded(image for _, image in decode.decode_frames(content, numbers))


def _encoded(images: Iterator[Frame]) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=_VP9)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_filled(image), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def _filled(image: Frame) -> Frame:
    """The largest part in the middle that has the shape, resized."""
    height, width = image.shape[:2]
    part_height, part_width = min(height, width * HEIGHT // WIDTH), min(width, height * WIDTH // HEIGHT)
    top, left = (height - part_height) // 2, (width - part_width) // 2
    part = image[top : top + part_height, left : left + part_width]
    return np.ascontiguousarray(cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA))
