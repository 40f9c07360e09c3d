"""Helpers of the tests: small real videos, data sets in their distributed layouts, an S3 server, shared test data."""

from __future__ import annotations

import configparser
import contextlib
import io
import itertools
import json
import os
import select
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pytest

from vidfuse.data import contained
from vidfuse.data.shards import Recipe

REPO = Path(__file__).resolve().parents[1]
RECIPE = Recipe(layout="list", options={}, shard_bytes=1, transcode=None)
"""Of a set that was never packed."""
CODECS = {"mp4": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4", "mkv": "libx264", "mov": "libx264"}
_BITS = 8
_BLOCK = 16

# --- videos ---

VIDEO = (40, 128, 96)
"""Frames, width and height of the videos of the fixture `videos`."""


def make_video(
    frames: int = 12,
    *,
    suffix: str = "mp4",
    width: int = _BITS * _BLOCK,
    height: int = 96,
    fps: int = 12,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
) -> bytes:
    """A real encoded video over noise; each frame shows its index (0..255) as eight black or white squares at the top."""
    out = io.BytesIO()
    with av.open(out, "w", format={"mkv": "matroska"}.get(suffix, suffix)) as container:
        stream = container.add_stream(CODECS[suffix], rate=fps, options={**_fast(suffix), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(_picture(index, width, height, seed), format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


@contextlib.contextmanager
def decoding_dies(video: bytes, status: int) -> Iterator[None]:
    """The process in which a video is decoded apart dies of a signal, each time that it is given that video."""
    ask = contained._Child.ask

    def asking(child: contained._Child, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        ask(child, function, arguments)
        if video in arguments:
            child.process.send_signal(status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contained._Child, "ask", asking)
        yield


def shown_index(frame: np.ndarray) -> int:
    """The index that a frame of `make_video` shows."""
    squares = [frame[4 : _BLOCK - 4, bit * _BLOCK + 4 : (bit + 1) * _BLOCK - 4].mean() for bit in range(_BITS)]
    return sum(1 << bit for bit, square in enumerate(squares) if square > 127)


def _fast(suffix: str) -> dict[str, str]:
    return {"webm": {"deadline": "realtime", "cpu-used": "8"}, "avi": {"qscale": "4"}}.get(suffix, {"preset": "ultrafast"})


def _picture(index: int, width: int, height: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng([seed, index // 4]).integers(60, 196, (height // 8, width // 8, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))
    for bit in range(_BITS):
        picture[:_BLOCK, bit * _BLOCK : (bit + 1) * _BLOCK] = 255 * (index >> bit & 1)
    return picture


# --- data sets as they are distributed ---

CLASSES = ("Pushing [something] left", "Pushing [something] right", "Lifting [something]")


def make_ssv2(folder: Path, counts: Mapping[str, int], *, seed: int = 0, frames: int = 10, fps: int = 12) -> Path:
    """A folder in the layout of Something-Something-V2 with `counts` videos in each split; every fourth is an mp4."""
    videos = folder / "20bn-something-something-v2"
    (folder / "labels").mkdir(parents=True, exist_ok=True)
    videos.mkdir(exist_ok=True)
    write_json(
        folder / "labels/labels.json", {name.replace("[", "").replace("]", ""): str(i) for i, name in enumerate(CLASSES)}
    )
    number = 0
    for split, count in counts.items():
        entries = []
        for _ in range(count):
            number += 1
            suffix = "mp4" if number % 4 == 0 else "webm"
            content = make_video(frames + number % 3, suffix=suffix, seed=seed + number, fps=fps)
            (videos / f"{1000 + number}.{suffix}").write_bytes(content)
            template = CLASSES[number % len(CLASSES)]
            entry = {"id": str(1000 + number)}
            if split != "test":
                entry |= {
                    "label": template.replace("[something]", "a cup").lower(),
                    "template": template,
                    "placeholders": ["a cup"],
                }
            entries.append(entry)
        write_json(folder / f"labels/{split}.json", entries)
    return folder


def make_ucf101(folder: Path, classes: Sequence[str] = ("Archery", "Yoga"), *, per_class: int = 3) -> Path:
    """A folder in the layout of UCF101; the last video of each class is in the test list."""
    folder.mkdir(parents=True, exist_ok=True)
    train, test = [], []
    for number, name in enumerate(classes, start=1):
        (folder / name).mkdir()
        for group in range(1, per_class + 1):
            path = f"{name}/v_{name}_g{group:02d}_c01.avi"
            (folder / path).write_bytes(make_video(8, suffix="avi", seed=100 * number + group))
            (test if group == per_class else train).append(path if group == per_class else f"{path} {number}")
    (folder / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    (folder / "trainlist01.txt").write_text("\n".join(train) + "\n")
    (folder / "testlist01.txt").write_text("\n".join(test) + "\n")
    return folder


def many_videos(folder: Path, count: int) -> Path:
    """So many that reading them takes seconds: the same few videos under many names, as `make_ssv2` lays them out."""
    make_ssv2(folder, {"train": 12, "validation": 3}, frames=200, fps=30)
    first = json.loads((folder / "labels/train.json").read_text())
    more = [{**first[number % len(first)], "id": str(20_000 + number)} for number in range(count)]
    for entry, copy in zip(more, itertools.cycle(first), strict=False):
        video = next((folder / "20bn-something-something-v2").glob(f"{copy['id']}.*"))
        (video.parent / f"{entry['id']}{video.suffix}").hardlink_to(video)
    write_json(folder / "labels/train.json", first + more)
    return folder


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def shared_root() -> Path:
    """Where the shared test data are, if they are anywhere."""
    return Path(os.environ.get("VIDFUSE_TEST_DATA") or REPO.parent / "shared/data")


def shared_data(path: str) -> Path:
    """A file or folder of the shared test data; skips the test where there is none."""
    root = shared_root()
    if not (root / path).exists():
        pytest.skip(f"no {path} in {root}; VIDFUSE_TEST_DATA names the folder of shared test data")
    return root / path


# --- models ---

CLIPS = ((2, 112), (8, 32), (8, 112), (16, 32), (16, 112), (8, 224), (16, 224))
"""Frames and size of clips to try on a backbone, cheap ones first; 112 is tiled by patches of 14 and of 16."""


def clip_for(backbone: str, clips: Sequence[tuple[int, int]] = CLIPS) -> tuple[int, int] | None:
    """Frames and size of the first of `clips` that a backbone with its default options takes; `None`: of none."""
    import torch

    from vidfuse.models import select as components

    for frames, size in clips:
        with contextlib.suppress(ValueError), torch.device("meta"):
            components.build("backbones", backbone, frames=frames, size=size)
            return frames, size
    return None


def few_blocks(backbone: str, blocks: int = 2) -> dict[str, int]:
    """Options that make a backbone no deeper than it must be: of equal blocks two show what all do."""
    from vidfuse.models import select as components

    return {"depth": blocks} if "depth" in components.options("backbones", backbone) else {}


# --- an S3 server ---


@dataclass(frozen=True)
class ObjectStore:
    """A running S3 server with a bucket."""

    endpoint: str
    key: str = field(repr=False)
    secret: str = field(repr=False)
    bucket: str
    pid: int
    """Of the server itself: SIGKILL it for an outage that lasts."""
    program: subprocess.Popen[str]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, name: str = "place") -> str:
        """A fresh `s3://` prefix."""
        return f"s3://{self.bucket}/{name}-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def object_store(folder: Path, *, port: int = 0, bucket: str = "vidfuse-test") -> Iterator[ObjectStore]:
    """Start `cluster/local/object_store.py` with its data in `folder`; it dies with this process."""
    command = [sys.executable, str(REPO / "cluster/local/object_store.py"), "--dir", str(folder), "--port", str(port)]
    program = subprocess.Popen([*command, "--bucket", bucket, "--with-parent"], stdout=subprocess.PIPE, text=True)
    try:
        assert program.stdout is not None
        if not select.select([program.stdout], [], [], 120)[0]:
            raise RuntimeError("the S3 server was not ready after 120 seconds")
        ready = json.loads(program.stdout.readline())
        ini = configparser.ConfigParser(interpolation=None)
        ini.read(ready["credentials_file"])
        keys = ini["default"]
        yield ObjectStore(
            ready["endpoint"], keys["aws_access_key_id"], keys["aws_secret_access_key"], bucket, ready["pid"], program
        )
    finally:
        program.terminate()
        program.wait(20)


# --- commands ---


def end_cluster(scratch: Path) -> None:
    """Kill what has a Ray session's folder in its command line. `ray stop` would end every cluster of this machine."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(scratch) in word for word in process.info["cmdline"] or ()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def run_job(name: str, *arguments: str, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m jobs.<name>` from the repository's root."""
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *arguments],
        cwd=REPO,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
