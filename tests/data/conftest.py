"""Fixtures of this room."""

from __future__ import annotations

import hashlib

import pytest

from tests import support
from vidfuse.data.clips import Video

FRAMES, WIDTH, HEIGHT = 40, 128, 96


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A file of three videos, the last of them broken, as its folder and index rows."""
    root = tmp_path_factory.mktemp("shard")
    content, rows = b"", []
    for sample in range(3):
        video = support.make_video(FRAMES, seed=sample, width=WIDTH, height=HEIGHT)
        video = video if sample < 2 else bytes(len(video))
        facts = (sample, "a.tar", f"key{sample}", sample, len(content), len(video), FRAMES, WIDTH, HEIGHT)
        rows.append(Video(*facts, sha256=hashlib.sha256(video).digest()))
        content += video
    (root / "a.tar").write_bytes(content)
    return str(root), tuple(rows)
