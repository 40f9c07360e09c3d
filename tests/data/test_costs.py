"""What reading a video costs travels with its rows."""

from __future__ import annotations

import pyarrow.fs as pafs
import pytest

from vidfuse.config import DataConfig
from vidfuse.data import ranges
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


@pytest.mark.parametrize("times", [0, 1, 2])
def test_ranges_asked_for_again_are_counted(monkeypatch, times):
    file, again = Failing(times), []
    monkeypatch.setattr(ranges, "_open", lambda *_: file)
    monkeypatch.setattr(ranges, "filesystem_of", lambda _: type("", (), {"open_input_file": lambda *_: file})())
    assert ranges.read_range(b"", "a.tar", 0, 10, again=lambda: again.append(None)) == bytes(10)
    assert len(again) == times
