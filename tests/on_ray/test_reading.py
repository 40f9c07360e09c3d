"""Reading processes of Ray: the decoder's own process beside one, and clips that several of them keep on one disk."""

from __future__ import annotations

import hashlib
import os
import signal

import numpy as np
import pytest
import ray
from pyarrow import fs as pafs

from tests import support
from tests.data.test_contained import alive, wait_for_the_end_of
from vidfuse.config import from_mapping
from vidfuse.data import contained
from vidfuse.data.clips import ClipReader, Part, Video
from vidfuse.data.decode import decode_frames
from vidfuse.data.feed import read_here
from vidfuse.on_ray.stream import pull_through_ray

pytestmark = pytest.mark.ray


@ray.remote(num_cpus=0.5)
class Reader:
    """What a reading process does."""

    def decode(self, video: bytes) -> tuple[list[int], list[str], int, int]:
        """Frames that came, modules in the decoder's process, and the pids of that and of this one."""
        frames = [number for number, _ in decode_frames(video, [0, 5], decoder="decord")]
        modules = list(contained.iterate(eval, "__import__('sys').modules"))
        (its,) = contained.iterate(eval, "[__import__('os').getpid()]")
        return frames, modules, its, os.getpid()


def test_the_decoders_process_is_bare_and_dies_with_the_worker(ray_cluster):
    pytest.importorskip("decord")
    reader = Reader.remote()
    frames, modules, its, its_parent = ray.get(reader.decode.remote(support.make_video(8)), timeout=60)
    assert frames == [0, 5] and not {"ray", "torch", "pydantic"} & {*modules}
    assert alive(its)
    os.kill(its_parent, signal.SIGKILL)
    wait_for_the_end_of(its)


def test_kept_clips_come_through_ray_as_decoded_ones_do(ray_cluster, tmp_path):
    content, rows = b"", []
    for sample in range(6):
        video = support.make_video(20, seed=sample)
        digest = hashlib.sha256(video).digest()
        rows.append(Video(sample, "a.tar", f"key{sample}", 0, len(content), len(video), 20, 128, 96, sha256=digest))
        content += video
    (tmp_path / "a.tar").write_bytes(content)
    parts = [Part(epoch, tuple(rows[start : start + 2])) for epoch in range(3) for start in (0, 2, 4)]

    def columns(pull, **data) -> list:
        config = from_mapping({"data": {"classes": 2, "frames": 4, "size": 32, "views": 2, "decoder": "decord"} | data})
        reader = ClipReader(pafs.LocalFileSystem(), str(tmp_path), config.data, 0)
        return list(pull(config.data)(reader, parts, 2))

    plain = columns(lambda data: read_here)
    for _ in range(2):
        kept = columns(lambda data: pull_through_ray(data, workers=1), frame_cache=str(tmp_path / "cache"))
        assert len(kept) == len(plain) == len(parts)
        for a, b in zip(plain, kept, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in ("clip", "label", "weight", "sample")) and a["weight"].all()
    assert len(list(tmp_path.glob("cache/*/*/*.clip"))) == 2 * len(rows)
