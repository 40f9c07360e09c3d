"""Clips a second out of a warm `data.frame_cache` against decoding them, and what filling it costs.

Clips of 16 x 224 px, one of each video, read from a file on the local disk by one process: decoded; decoded and kept in an empty cache;
from the cache as it is held in memory by the system; from the cache on the disk (the system is told to forget it). All in turn, several
times: the ratios are the figures. Real AVIs of 320 x 240 where the shared test data are there, and always videos rendered at 640 x 480.
Run by `make bench`; the figures go into README.md beside this file by hand, with hardware and commit.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import statistics
import time
from pathlib import Path

import pytest
from pyarrow import fs as pafs

from tests import support
from tests.bench.test_transcode import rendered
from vidfuse.config import from_mapping
from vidfuse.data.clips import ClipReader, Part, Video
from vidfuse.data.decode import probe

pytestmark = pytest.mark.bench
ROUNDS, COPIES, GOAL = 7, 4, 2.0


def set_of(folder: Path, contents: list[bytes]) -> Part:
    """A shard of the videos, `COPIES` times as other samples, as all of them in epoch 0."""
    start, rows = 0, []
    for content in contents * COPIES:
        info, digest = probe(content), hashlib.sha256(content).digest()
        facts = (len(rows), "a.tar", f"key{len(rows)}", 0, start, len(content), info.frames, info.width, info.height)
        rows.append(Video(*facts, sha256=digest))
        start += len(content)
    (folder / "a.tar").write_bytes(b"".join(contents * COPIES))
    return Part(0, tuple(rows))


def forget(folder: Path) -> None:
    """Have the system write the files of a folder to the disk and keep none of them in memory."""
    for path in folder.rglob("*.clip"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("source", ["real", "h264"])
def test_kept_clips_come_faster_than_decoded_ones(source, tmp_path):
    if source == "real":
        contents = [file.read_bytes() for file in sorted(support.shared_data("realclips").glob("*/*_g01_c01.avi"))]
    else:
        contents = [rendered("h264", seed) for seed in range(2)]
    part, cache = set_of(tmp_path, contents), tmp_path / "cache"

    def rate(place: Path | None) -> float:
        data = from_mapping({"data": {"views": 1, "frame_cache": place and str(place)}}).data
        reader = ClipReader(pafs.LocalFileSystem(), str(tmp_path), data, seed=0)
        start = time.monotonic()
        assert reader.read(part)["weight"].all()
        return len(part.videos) / (time.monotonic() - start)

    rows = []
    for _ in range(ROUNDS + 1):
        shutil.rmtree(cache, ignore_errors=True)
        plain, filling, memory = rate(None), rate(cache), rate(cache)
        forget(cache)
        rows.append((plain, filling, memory, rate(cache)))
    rows = rows[1:]
    sides = zip(("decoded", "decoded and kept", "from memory", "from disk"), zip(*rows, strict=True), strict=True)
    print(f"\n{source}, {len(part.videos)} clips of {len(contents)} videos")
    for name, rates in sides:
        ratios = [rate / row[0] for rate, row in zip(rates, rows, strict=True)]
        print(
            f"  {name}: {statistics.median(rates):.0f} clips/s, ratio median {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    assert statistics.median(row[3] / row[0] for row in rows) >= GOAL
