"""What reading a video costs travels with its rows."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
import torch
from ray.data.extensions import ArrowTensorArray

from vidfuse.config import DataConfig
from vidfuse.data import clips, ranges
from vidfuse.data.clips import ClipReader, Part


def reader_of(root: str, **data) -> ClipReader:
    return ClipReader(pafs.LocalFileSystem(), root, DataConfig(classes=3, frames=4, size=32, **data), 0)


def test_the_first_row_of_a_video_tells_its_costs(videos):
    root, rows = videos
    columns = reader_of(root, repeats=2).read(Part(0, (*rows, None)))
    assert (columns["seconds"] > 0).tolist() == [True, False] * 3 + [False] * 2  # the third is broken, and was tried
    assert columns["bytes"].tolist() == [rows[0].size, 0, rows[1].size, 0, rows[2].size, 0, 0, 0]
    assert not columns["retries"].any()


def test_a_video_of_the_cache_costs_nothing(videos, tmp_path):
    root, rows = videos
    reader = reader_of(root, frame_cache=str(tmp_path))
    for again in (False, True):
        columns = reader.read(Part(None, rows[:2]))
        assert (columns["seconds"] > 0).all() != again and (columns["bytes"] > 0).all() != again


class Failing:
    """A file that fails so often, then gives what is wanted."""

    def __init__(self, times: int) -> None:
        self.left = times

    def size(self) -> int:
        return 10

    def read_at(self, size: int, offset: int) -> bytes:
        self.left -= 1
        if self.left >= 0:
            raise OSError("the connection was lost")
        return bytes(size)


def test_rows_without_a_clip_are_black_whatever_memory_held(videos, monkeypatch):
    root, rows = videos
    used = SimpleNamespace(**vars(np))
    used.empty = lambda shape, dtype: np.full(shape, 7, dtype)
    monkeypatch.setattr(clips, "np", used)
    monkeypatch.setattr(clips, "_own", threading.local())
    clip = reader_of(root).read(Part(None, (*rows, None)))["clip"]
    assert [bool(row.any()) for row in clip] == [True, True, False, False]


HOLDERS = {
    "a part of it": lambda clip: clip[1:, 0],
    "torch": torch.from_numpy,
    "Arrow": lambda clip: pa.table({"clip": ArrowTensorArray.from_numpy(clip)}).slice(1),
    "a view as bytes": lambda clip: memoryview(clip).cast("B"),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_of_clips_is_used_again_once_nobody_has_any_of_it(videos, monkeypatch, holder):
    root, rows = videos
    reader, part = reader_of(root), Part(None, rows[:2])
    monkeypatch.setattr(clips, "_own", threading.local())
    clip = reader.read(part)["clip"]
    place, pixels, held = clip.ctypes.data, clip.copy(), HOLDERS[holder](clip)
    del clip
    other = reader.read(Part(None, rows[1::-1]))["clip"]
    assert other.ctypes.data != place and not np.array_equal(other, pixels)
    del held
    again = reader.read(part)["clip"]
    assert again.ctypes.data == place and np.array_equal(again, pixels)
    del again
    assert reader.read(Part(None, rows[:1]))["clip"].shape[0] == 1  # of another size: new


def test_no_more_memory_is_kept_than_is_used_at_a_time(monkeypatch):
    monkeypatch.setattr(clips, "_own", threading.local())
    many = [clips._memory((3, 5)) for _ in range(10)]
    many.clear()
    assert len(clips._own.memory) == clips.KEPT_CLIPS


def test_the_threads_that_fetch_are_kept_unless_a_fetch_fails(videos, monkeypatch):
    root, rows = videos
    rows = rows[::-1]  # each is a request of its own
    reader, seen, release = reader_of(root), [], threading.Event()
    monkeypatch.setattr(clips, "_own", threading.local())

    def fetch(filesystem, run):
        seen.append(threading.current_thread())
        if run[0].size == -1:
            raise OSError("the storage is gone")
        if run[0].size == -2:
            release.wait(60)
        return [ranges.Fetched(b"")] * len(run)

    monkeypatch.setattr(clips, "fetch", fetch)
    for _ in range(3):
        reader.read(Part(None, rows))
    assert len(set(seen)) <= clips.FETCHES_AT_ONCE
    with pytest.raises(OSError, match="the storage is gone"):  # at once: the second one is not waited for
        reader.read(Part(None, (rows[0]._replace(size=-1), rows[1]._replace(size=-2))))
    before = set(seen)
    reader.read(Part(None, rows))
    assert not before & set(seen[-len(rows) :])
    release.set()


@pytest.mark.parametrize("times", [0, 1, 2])
def test_ranges_asked_for_again_are_counted(monkeypatch, times):
    file, again = Failing(times), []
    monkeypatch.setattr(ranges, "_open", lambda *_: file)
    monkeypatch.setattr(ranges, "filesystem_of", lambda _: type("", (), {"open_input_file": lambda *_: file})())
    assert ranges.read_range(b"", "a.tar", 0, 10, again=lambda: again.append(None)) == bytes(10)
    assert len(again) == times
