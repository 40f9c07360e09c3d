"""Repeated augmentation: several clips of a video from one decoding, drawn apart and drawn again the same."""

from __future__ import annotations

import numpy as np
from pyarrow import fs as pafs

from tests import support
from vidfuse.config import from_mapping
from vidfuse.data import clips as module
from vidfuse.data.clips import ClipReader, Part, Video
from vidfuse.data.feed import read_here


def reader_of(root: str, repeats: int, **data) -> ClipReader:
    config = from_mapping({"data": {"classes": 3, "frames": 4, "size": 32, "flip": True, "repeats": repeats} | data})
    return ClipReader(pafs.LocalFileSystem(), root, config.data, seed=3)


def test_one_repeat_draws_what_was_drawn_before_there_were_repeats():
    """Frame numbers and boxes (top, left, height, width, mirrored) as commit ca7de1a drew them."""
    for epoch, sample, numbers, box in (
        (0, 0, [5, 11, 22, 37], (3, 27, 88, 80, True)),
        (2, 7, [6, 15, 29, 37], (1, 6, 84, 78, False)),
    ):
        video = Video(sample, "s", "k", 0, 0, 0, *support.VIDEO)
        [plan] = reader_of("", 1).plans(video, epoch)
        at = plan.box
        assert plan.numbers.tolist() == numbers and (at.top, at.left, at.height, at.width, at.mirrored) == box


def test_repeats_differ_and_are_reproducible(videos):
    root, rows = videos
    part = Part(1, rows[:2])
    one, three, again = (reader_of(root, n).read(part) for n in (1, 3, 3))
    clips = three["clip"].reshape(2, 3, *three["clip"].shape[1:])
    assert np.array_equal(clips[:, 0], one["clip"])  # the first is the clip there is without repeats
    assert all(np.array_equal(three[name], again[name]) for name in three if name != "seconds")
    for video in clips:
        assert len({clip.tobytes() for clip in video}) == 3
    assert not np.array_equal(clips[:, 1], reader_of(root, 3).read(Part(2, rows[:2]))["clip"].reshape(clips.shape)[:, 1])


def test_frames_and_crops_are_both_drawn_anew():
    video = Video(0, "s", "k", 0, 0, 0, *support.VIDEO)
    plans = list(reader_of("", 8).plans(video, 0))
    assert len({tuple(plan.numbers) for plan in plans}) == len({plan.box for plan in plans}) == 8


def test_uses_of_an_epoch_are_different_views_while_there_are_some():
    """A weighted epoch has a video several times, and each use has repeats: no view twice before all are used."""
    reader = reader_of("", 2, views=8)
    video = Video(0, "s", "k", 0, 0, 0, *support.VIDEO)
    for epoch in range(4):
        views = [reader.view(video._replace(use=use), epoch, repeat) for use in range(4) for repeat in range(2)]
        assert sorted(views) == list(range(8))
    once = [reader_of("", 1, views=3).view(video._replace(use=use), epoch, 0) for epoch in range(3) for use in range(2)]
    assert once == [0, 1, 1, 2, 2, 0]


def test_a_video_is_decoded_once(videos, monkeypatch):
    root, rows = videos
    calls, decode = [], module.decode_frames

    def counting(content, numbers, **options):
        calls.append(list(numbers))
        return decode(content, numbers, **options)

    monkeypatch.setattr(module, "decode_frames", counting)
    reader_of(root, 4).read(Part(0, rows[:2]))
    assert len(calls) == 2 and all(len(set(numbers)) == len(numbers) > 4 for numbers in calls)


def test_padding_and_broken_videos_weigh_nothing_in_any_repeat(videos):
    root, rows = videos
    columns = reader_of(root, 2).read(Part(0, (rows[0], rows[2], None)))
    assert columns["sample"].tolist() == [0, 0, 2, 2, -1, -1]
    assert columns["label"].tolist() == [0, 0, 2, 2, -1, -1]
    assert columns["weight"].tolist() == [1, 1, 0, 0, 0, 0]
    assert [bool(error) for error in columns["error"]] == [False, False, True, True, False, False]


def test_testing_does_not_repeat(videos):
    root, rows = videos
    assert reader_of(root, 3).read(Part(None, rows[:2]))["sample"].tolist() == [0, 1]


def test_micro_batches_hold_all_repeats_of_their_videos(videos):
    root, rows = videos
    reader = reader_of(root, 3)
    blocks = list(read_here(reader, [Part(0, (rows[0], rows[1])), Part(0, (rows[2], None))], 6))
    assert [block["sample"].tolist() for block in blocks] == [[0, 0, 0, 1, 1, 1], [2, 2, 2, -1, -1, -1]]
