"""The plan of a packed set: a pure function of names, labels, sizes and options."""

from __future__ import annotations

import shutil

import pytest

from tests.support import make_ssv2, make_ucf101
from vidfuse.config import TranscodeConfig
from vidfuse.data.layouts import read_layout
from vidfuse.data.planning import make_plan
from vidfuse.data.shards import DataError

SHARD, OTHER = 64_000, 90_000


def test_the_plan_is_a_function_of_names_labels_and_sizes(tmp_path):
    folder = make_ssv2(tmp_path / "one", {"train": 24, "validation": 7, "test": 3})
    shutil.copytree(folder, tmp_path / "two")
    plan = make_plan(read_layout(folder), folder, SHARD)
    again = make_plan(read_layout(tmp_path / "two"), tmp_path / "two", SHARD)
    assert (plan.digest, plan.shards) == (again.digest, again.shards)
    assert len(plan.shards) > 5
    keys = [planned.video.key for shard in plan.shards for planned in shard.videos]
    assert sorted(keys) == sorted(str(number) for number in range(1001, 1035))
    assert keys != sorted(keys)
    labels = [planned.video.label for planned in plan.shards[0].videos]
    assert len(set(labels)) > 1, "a shard is a mixture of classes"
    assert make_plan(read_layout(folder), folder, OTHER).digest != plan.digest
    forms = [TranscodeConfig(), TranscodeConfig(short_side=240), TranscodeConfig(fps=12)]
    assert len({plan.digest, *(make_plan(read_layout(folder), folder, SHARD, form).digest for form in forms)}) == 4


def test_a_video_larger_than_a_shard_has_its_own(tmp_path):
    make_ucf101(tmp_path)
    big = tmp_path / "Yoga/v_Yoga_g01_c01.avi"
    big.write_bytes(bytes(3 * SHARD))
    plan = make_plan(read_layout(tmp_path), tmp_path, SHARD)
    assert [p.video.key for p in next(s for s in plan.shards if s.bytes > SHARD).videos] == ["v_Yoga_g01_c01"]


def test_videos_that_went_away_are_told_together(tmp_path):
    folder = make_ssv2(tmp_path, {"train": 24, "validation": 2})
    source = read_layout(folder)
    for video in source.splits["train"][:12]:
        (folder / video.path).unlink()
    (folder / source.splits["train"][0].path).mkdir()
    with pytest.raises(
        DataError, match=r"12 of 24 videos cannot be packed: .*/1001\.\w+ \(not a file\), .*No such.* and 2 more"
    ):
        make_plan(source, folder, SHARD)


@pytest.mark.parametrize("spelling", ["{set}/v/a.avi", "w/a.avi", "v/link.avi"])
def test_a_file_under_two_names_is_told(tmp_path, spelling):
    folder = tmp_path / "set"
    (folder / "v").mkdir(parents=True)
    for name in ("a.avi", "b.avi"):
        (folder / "v" / name).write_bytes(b"x")
    (folder / "w").symlink_to("v")
    (folder / "v/link.avi").symlink_to("a.avi")
    (folder / "v/hard.avi").hardlink_to(folder / "v/b.avi")
    (folder / "train.txt").write_text("v/a.avi 0\nv/b.avi 1\nv/hard.avi 1\n")
    for label, words in ((0, "; a video is in one split, once"), (1, " with different labels, '0' and '1'")):
        (folder / "val.txt").write_text(f"{spelling.format(set=folder)} {label}\n")
        with pytest.raises(
            DataError, match=f"is listed in train and in validation{words}; .*train.txt: line 1, .*val.txt: line 1"
        ):
            make_plan(read_layout(folder), folder)


def test_a_split_folder_that_is_a_link_to_another_is_told(tmp_path):
    for name in ("train/run/a.avi", "train/walk/b.avi"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(
        DataError, match=r"each two: \S+ \(train/run/a.avi, val/run/a.avi\), \S+ \(train/walk/b.avi, val/walk/b.avi\)"
    ):
        make_plan(read_layout(tmp_path), tmp_path)
