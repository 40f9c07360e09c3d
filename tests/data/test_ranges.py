"""Ranges that follow each other in a file are asked for at once, and are what single ones are."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow.fs as pafs
import pytest

from vidfuse.config import DataConfig
from vidfuse.data import clips, ranges
from vidfuse.data.clips import ClipReader, Part
from vidfuse.data.ranges import GAP_BYTES, JOINED_BYTES, EndError, Range, fetch, joined

LOCAL = pickle.dumps(pafs.LocalFileSystem())
A, B, C = Range("a.tar", 0, 100), Range("a.tar", 100 + GAP_BYTES, 50), Range("a.tar", 150 + 2 * GAP_BYTES, 7)

LARGE = A._replace(size=JOINED_BYTES)


@pytest.mark.parametrize(
    ("wanted", "runs"),
    [
        ([], []),
        ([A, B, C], [[A, B, C]]),
        ([A, C], [[A], [C]]),  # too far apart
        ([B, A], [[B], [A]]),  # backwards
        ([A, A], [[A], [A]]),  # a weighted epoch's
        ([A, B._replace(path="b.tar")], [[A], [B._replace(path="b.tar")]]),
        ([None, A, None, B, None], [[], [A], [], [B], []]),
        ([LARGE, B._replace(offset=JOINED_BYTES)], [[LARGE], [B._replace(offset=JOINED_BYTES)]]),
    ],
)
def test_which_are_asked_for_at_once(wanted, runs):
    assert list(joined(wanted)) == runs


@pytest.fixture
def file(tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 3 * GAP_BYTES, np.uint8).tobytes()
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    return str(path), content


def test_each_has_its_own_bytes_by_one_request(file, monkeypatch):
    path, content = file
    run = [each._replace(path=path) for each in (A, B, C)]
    asked, plain = [], ranges.read_range

    def read(filesystem, path, offset, size, *, again):
        asked.append((offset, size))
        if len(asked) == 1:
            again()
        return plain(filesystem, path, offset, size)

    monkeypatch.setattr(ranges, "read_range", read)
    found = fetch(LOCAL, run)
    assert [each.content for each in found] == [content[each.offset : each.end] for each in run]
    assert asked == [(0, C.end)] and [each.retries for each in found] == [1, 0, 0]
    assert [each.content for each in fetch(LOCAL, [])] == [b""]


def test_a_truncated_file_costs_only_what_lies_behind_its_end(file):
    path, content = file
    run = [each._replace(path=path) for each in (A, B, Range("", B.end, len(content)), Range("", len(content) + 10, 5))]
    found = [each.content for each in fetch(LOCAL, run)]
    assert found[:2] == [content[each.offset : each.end] for each in run[:2]]
    assert [type(each) for each in found[2:]] == [EndError] * 2 and found[3].size == len(content)


def test_videos_that_lie_side_by_side_take_one_request_and_give_the_same_clips(videos, monkeypatch):
    root, rows = videos
    reader = ClipReader(pafs.LocalFileSystem(), root, DataConfig(classes=3, frames=4, size=32), 0)
    requests, plain = [], clips.fetch
    monkeypatch.setattr(clips, "fetch", lambda state, run: requests.append(len(run)) or plain(state, run))
    forward, backward = reader.read(Part(0, (*rows, None))), reader.read(Part(0, (None, *rows[::-1])))
    assert sorted(requests) == [0, 0, 1, 1, 1, 3]
    assert forward["error"].astype(bool).tolist() == [False, False, True, False]  # the third is broken
    for name in set(forward) - {"seconds"}:
        assert np.array_equal(forward[name], backward[name][::-1]), name
