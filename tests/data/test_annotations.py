"""Kinetics, plain folders and lists: each variant as it is found, and each way in which one can be wrong."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support import shared_data
from vidfuse.config import LayoutConfig
from vidfuse.data import decode, tars
from vidfuse.data.annotations.files import csv_header, files_below, folders, read_text
from vidfuse.data.annotations.source import Source, split_of
from vidfuse.data.labels import KINETICS400_CLASSES, SSV2_CLASSES
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError, SampleMeta


def touch(folder: Path, *names: str) -> None:
    """Videos without bytes: layouts read names only."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def fault(folder: Path, layout: str | None = None, **options) -> str:
    with pytest.raises(DataError) as error:
        read_layout(folder, layout, LayoutConfig(**options))
    return str(error.value)


def keys(source: Source) -> dict[str, list[tuple[str, int | None]]]:
    return {split: [(video.key, video.label) for video in videos] for split, videos in source.splits.items()}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"),
        ("trainlist01", "train"),
        ("kinetics400_val_list_videos", "validation"),
        ("Validation", "validation"),
        ("test.csv", "test"),
        ("trainval", None),
        ("constrained", None),
        ("latest", None),
    ],
)
def test_the_split_that_a_name_tells(name, split):
    assert split_of(name) == split


FORMATS = {
    "mp4": ("mp4", "mpeg4"),
    "webm": ("webm", "libvpx"),
    "avi": ("avi", "mpeg4"),
    "mkv": ("matroska", "mpeg4"),
    "mov": ("mov", "mpeg4"),
    "mpg": ("mpeg", "mpeg1video"),
    "mpeg": ("mpeg", "mpeg2video"),
    "m4v": ("mp4", "mpeg4"),
    "wmv": ("asf", "wmv2"),
    "flv": ("flv", "flv"),
    "ts": ("mpegts", "mpeg2video"),
    "3gp": ("3gp", "h263"),
}
"""FFmpeg's names of a container and of a codec that is usual in it."""


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_suffix_is_listed_stored_and_decoded(tmp_path, suffix):
    container, codec = FORMATS[suffix]
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 176, 144, "yuv420p"
        for shade in range(12):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((144, 176, 3), 20 * shade, np.uint8), format="rgb24")))
        file.mux(stream.encode())
    touch(tmp_path, f"train/run/a.{suffix.upper()}", f"train/walk/b.{suffix}", f"val/run/c.{suffix}")
    assert keys(read_layout(tmp_path)) == {"train": [("a", 0), ("b", 1)], "validation": [("c", 0)]}
    info = decode.probe(out.getvalue())
    assert (info.frames, info.width, info.height) == (12, 176, 144)
    meta = SampleMeta(key="a", label=0, text="run", duration=0.48, frames=12, fps=25, width=176, height=144, sha256="0" * 64)
    shard = io.BytesIO()
    tars.write_shard(shard, [(meta, suffix, out.getvalue())])
    shard.seek(0)
    assert [row.suffix for row in tars.index_rows(shard)] == [suffix]


def test_only_files_are_videos(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    for number in range(12):
        (tmp_path / f"{number:02d}.mp4").symlink_to("/nowhere/at.mp4")
    (tmp_path / "frames.mp4").mkdir()
    write(tmp_path / "train.txt", "a.mp4 0", "b.mp4 1", "frames.mp4 1", *(f"{number:02d}.mp4 1" for number in range(12)))
    assert "names 13 of 15 videos that are not there: frames.mp4, 00.mp4, " in fault(tmp_path)
    source = read_layout(tmp_path, options=LayoutConfig(allow_missing=0.87))
    assert keys(source) == {"train": [("a", 0), ("b", 1)]}
    assert len(source.absent) == 13
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).unlink()
    assert "names 15 of 15 videos that are not there: a.mp4, b.mp4, frames.mp4, 00.mp4, " in fault(tmp_path)
    touch(tmp_path, "train/run/a.mp4", "train/walk/b.mp4")
    (tmp_path / "train/walk/frames.mp4").mkdir()
    assert keys(read_layout(tmp_path, "tree")) == {"train": [("a", 0), ("b", 1)]}


# --- Kinetics ---

HEADER = "label,youtube_id,time_start,time_end,split,is_cc"
FILES = {"a": "-3B32lodo2M_000059_000069.mp4", "b": "bbbbbbbbbbb_000000_000010.mp4", "c": "ccccccccccc_000123_000133.mp4"}


@pytest.fixture
def kinetics(tmp_path) -> Path:
    write(
        tmp_path / "annotations/train.csv",
        HEADER,
        "playing guitar,-3B32lodo2M,59,69,train,0",
        '"riding, or walking",bbbbbbbbbbb,0,10,train,0',
    )
    write(tmp_path / "annotations/val.csv", HEADER, "playing guitar,ccccccccccc,123,133,val,1")
    write(tmp_path / "annotations/test.csv", "youtube_id,time_start,time_end,split", "ddddddddddd,1,11,test")
    touch(tmp_path, f"train/{FILES['a']}", f"train/{FILES['b']}", f"val/{FILES['c']}", "test/ddddddddddd_000001_000011.mkv")
    return tmp_path


def test_kinetics_by_splits_by_classes_and_by_both(kinetics):
    expected = {
        "train": [("-3B32lodo2M_000059_000069", 0), ("bbbbbbbbbbb_000000_000010", 1)],
        "validation": [("ccccccccccc_000123_000133", 0)],
        "test": [("ddddddddddd_000001_000011", None)],
    }
    source = read_layout(kinetics)
    assert (source.dataset, source.layout, source.classes) == ("kinetics", "kinetics", ("playing guitar", "riding, or walking"))
    assert keys(source) == expected
    assert source.splits["train"][0].path == f"train/{FILES['a']}"
    assert [video.text for video in source.splits["train"]] == ["playing guitar", "riding, or walking"]
    (kinetics / "train/playing guitar").mkdir()
    (kinetics / f"train/{FILES['a']}").rename(kinetics / f"train/playing guitar/{FILES['a']}")
    assert keys(read_layout(kinetics)) == expected
    for folder, name in (("playing_guitar", FILES["c"]), ("riding", FILES["b"])):
        (kinetics / folder).mkdir()
        next(kinetics.glob(f"*/{name}")).rename(kinetics / folder / name)
    for file in (kinetics / "annotations").iterdir():
        file.rename(kinetics / file.name)
    touch(kinetics, "riding/not_in_a_list_000000_000010.mp4")
    source = read_layout(kinetics)
    assert keys(source) == expected
    assert source.unlisted == 1


def test_kinetics_quoted_and_in_capitals(kinetics):
    expected = keys(read_layout(kinetics))
    train = kinetics / "annotations/train.csv"
    quoted = train.read_text().replace("playing guitar,-3B32lodo2M,59", '"playing guitar","-3B32lodo2M","59"').splitlines()
    write(train, ",".join(f'"{name}"' for name in HEADER.split(",")), *quoted[1:])
    assert (read_layout(kinetics).layout, keys(read_layout(kinetics))) == ("kinetics", expected)
    write(train, HEADER.title(), *quoted[1:])
    assert keys(read_layout(kinetics)) == expected


@pytest.mark.parametrize("rows", [0, 9000])
def test_kinetics_with_a_quote_that_is_not_closed(kinetics, rows):
    lines = (f"yoga,{n:011d},0,10,train,0" for n in range(rows))
    write(kinetics / "annotations/train.csv", HEADER, '"sky, diving",-3B32lodo2M,59,69,"train,0', *lines)
    assert "train.csv: line 2, column 33: a quote is opened and not closed; correct the line" in fault(kinetics)
    write(kinetics / "annotations/train.csv", HEADER, '"sky" diving,-3B32lodo2M,59,69,train,0', *lines)
    assert "train.csv: line 2: ',' expected after" in fault(kinetics)


def test_kinetics_as_mmaction2_lays_it_out_has_its_lists_besides(kinetics):
    for split in ("train", "val"):
        (kinetics / split).rename(kinetics / f"videos_{split}")
        (kinetics / f"annotations/{split}.csv").rename(kinetics / f"annotations/kinetics_{split}.csv")
    write(kinetics / "kinetics400_train_list_videos.txt", f"{FILES['a']} 1", f"{FILES['b']} 0")
    write(kinetics / "kinetics400_val_list_videos.txt", f"{FILES['c']} 1")
    assert "the annotations of kinetics and of list are here; say which with --layout" in fault(kinetics)
    assert [video.label for video in read_layout(kinetics, "kinetics").splits["train"]] == [0, 1]
    assert [video.label for video in read_layout(kinetics, "list").splits["train"]] == [1, 0]


def test_kinetics_in_one_file_with_times_as_floats(kinetics):
    rows = [line for name in ("train", "val") for line in (kinetics / f"annotations/{name}.csv").read_text().splitlines()[1:]]
    for file in (kinetics / "annotations").iterdir():
        file.unlink()
    write(
        kinetics / "kinetics.csv",
        HEADER,
        *(row.replace(",59,69,", ",59.0,69.0,").replace(",val,", ",validate,") for row in rows),
    )
    assert [len(videos) for videos in read_layout(kinetics).splits.values()] == [2, 1]


def test_kinetics_replacements_stand_in_for_damaged_videos(kinetics):
    touch(kinetics, f"replacement/replacement_for_corrupted_k400/{FILES['a']}")
    source = read_layout(kinetics)
    assert source.splits["train"][0].path.startswith("replacement/")
    assert source.unlisted == 0
    touch(kinetics, f"val/{FILES['b']}")
    assert "have the same id; remove one" in fault(kinetics)


def test_kinetics_faults(kinetics):
    train = kinetics / "annotations/train.csv"
    write(train, HEADER, *(f"yoga,{n:011d},0,10,train,0" for n in range(14)))
    assert "names 14 of 14 videos that are not there: 00000000000_000000_000010.mp4, " in fault(kinetics)
    assert "and 4 more; unpack all parts" in fault(kinetics)
    for row, words in (
        ("yoga,bbbbbbbbbbb,zero,10,train,0", "train.csv: line 2, column 3 (time_start): 'zero' is not a number of seconds"),
        ("yoga,bbbbbbbbbbb,0,10,train", "train.csv: line 2: 5 columns, the first line names 6: label,youtube_id"),
        (
            ",bbbbbbbbbbb,0,10,train,0",
            "train.csv: line 2: no label; add it or remove the line: only the test split is without labels",
        ),
        ("yoga,bbbbbbbbbbb,0,10,dev,0", "train.csv: line 2: split 'dev' is none of train, training, val"),
        ("playing guitar,ccccccccccc,123,133,train,0", "at least two classes are needed, found: playing guitar"),
    ):
        write(train, HEADER, row)
        assert words in fault(kinetics)
    write(train, HEADER, "yoga,ccccccccccc,123,133,train,0")
    assert "video ccccccccccc_000123_000133 is listed in train and in validation" in fault(kinetics)
    train.write_bytes(f"{HEADER}\nyoga,\xe9".encode("latin-1"))
    assert "train.csv: line 2, column 6: byte 0xe9 is not UTF-8" in fault(kinetics)
    assert "no CSV with the columns label,youtube_id,time_start,time_end,split" in fault(kinetics / "val", "kinetics")


def test_kinetics_with_the_published_list_of_classes(kinetics):
    names = shared_data("labels/kinetics/label_map_k400.txt")
    (kinetics / "annotations/train.csv").write_text(
        f"{HEADER}\nabseiling,-3B32lodo2M,59,69,train,0\nzumba,bbbbbbbbbbb,0,10,train,0\n"
    )
    source = read_layout(kinetics, options=LayoutConfig(classes=str(names)))
    assert (source.dataset, len(source.classes)) == ("kinetics400", KINETICS400_CLASSES)
    assert list(source.classes) == sorted(source.classes), "alphabetical order is the published one"
    assert [video.label for video in source.splits["train"]] == [0, 399]
    (kinetics / "annotations/train.csv").write_text(f"{HEADER}\nsleeping,-3B32lodo2M,59,69,train,0\n")
    assert "train.csv: line 2: class 'sleeping' is not in the list of 400 classes" in fault(kinetics, classes=str(names))


# --- folders ---


@pytest.fixture
def tree(tmp_path) -> Path:
    folder = tmp_path / "clips"
    touch(folder, *(f"{name}/{n:03d}.mp4" for name in ("run", "walk") for n in range(20)), "sit/only one.mp4", "loose.mp4")
    return folder


def test_a_hold_out_is_stated_seeded_and_of_each_class(tree):
    assert "give --holdout 0.1 to validate on a tenth of each class, or put them into train/ and val/" in fault(tree)
    source = read_layout(tree, options=LayoutConfig(holdout=0.2))
    assert (source.dataset, source.classes, source.unlisted) == ("clips", ("run", "sit", "walk"), 1)
    assert source.options == {"holdout": 0.2, "seed": 0}
    held = [video.text for video in source.splits["validation"]]
    assert sorted(held) == ["run"] * 4 + ["walk"] * 4, "a class of one video stays in training"
    assert len(source.splits["train"]) == 33
    assert read_layout(tree, options=LayoutConfig(holdout=0.2)) == source
    other = read_layout(tree, options=LayoutConfig(holdout=0.2, seed=1))
    assert {v.path for v in other.splits["validation"]} != {v.path for v in source.splits["validation"]}


def test_a_hold_out_hardly_changes_when_videos_are_added(tree):
    before = {v.path for v in read_layout(tree, options=LayoutConfig(holdout=0.2)).splits["validation"]}
    touch(tree, "run/new.mp4")
    after = {v.path for v in read_layout(tree, options=LayoutConfig(holdout=0.2)).splits["validation"]}
    assert len(before & after) >= len(before) - 1


def test_names_that_are_not_unique_or_not_allowed_get_keys(tree):
    source = read_layout(tree, options=LayoutConfig(holdout=0.2))
    found = [video.key for videos in source.splits.values() for video in videos]
    assert len(set(found)) == 41
    assert any(key.startswith("sit_only_one-") for key in found)


def test_a_source_tells_as_what_it_was_read(tree):
    source = read_layout(tree, options=LayoutConfig(holdout=0.2))
    assert source.line() == "read as tree: 33 train, 8 validation videos of 3 classes (run, sit, walk)"


def test_split_folders(tmp_path):
    touch(
        tmp_path,
        "train/run/a.mp4",
        "train/walk/b.avi",
        "valid/run/c.webm",
        "test/d.mp4",
        "notes/e.txt",
        "train/run/.hidden.mp4",
    )
    source = read_layout(tmp_path)
    assert keys(source) == {"train": [("a", 0), ("b", 1)], "validation": [("c", 0)], "test": [("d", None)]}
    assert (source.layout, source.options) == ("tree", {})
    assert "has folders of splits; --holdout is for one without" in fault(tmp_path, holdout=0.1)
    touch(tmp_path, "valid/swim/f.mp4")
    assert "valid/swim/f.mp4: class 'swim' is not in the list of 2 classes (run, walk)" in fault(tmp_path)
    write(tmp_path / "names.txt", "walk", "run", "swim")
    source = read_layout(tmp_path, options=LayoutConfig(classes=str(tmp_path / "names.txt")))
    assert keys(source)["validation"] == [("c", 1), ("f", 2)]
    touch(tmp_path, "val/run/g.mp4")
    assert "valid/ and val/ are both the split 'validation'" in fault(tmp_path) or "val/ and valid/ are both" in fault(tmp_path)


def test_one_class_of_a_list_is_enough(tmp_path):
    touch(tmp_path, "train/run/a.mp4", "val/walk/b.mp4")
    write(tmp_path / "classes.txt", "walk", "run")
    assert keys(read_layout(tmp_path)) == {"train": [("a", 1)], "validation": [("b", 0)]}


def test_folders_without_classes(tmp_path):
    touch(tmp_path, "a.mp4")
    assert "no annotations; a folder is needed that holds" in fault(tmp_path)
    touch(tmp_path, "run/b.mp4", "run/c.mp4")
    assert "the folder of one class alone, 'run'; at least two classes are needed" in fault(tmp_path, holdout=0.5)
    assert "there is no such folder" in fault(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no videos (.mp4" in fault(tmp_path / "empty", "tree")


def test_classes_that_a_set_would_lack(tree):
    for name in ("swim", "dive"):
        (tree / name).mkdir()
    assert "is in the class folders dive, swim; put their videos there, or remove these folders" in fault(tree, holdout=0.2)
    for number in range(12):
        (tree / f"hop{number:02d}.rar").touch()
    advice = "hop09.rar and 2 more): unpack them first, unrar x hop00.rar, or move them away if that is done"
    assert "class folders dive, swim; archives lie beside them (hop00.rar, " in fault(tree, holdout=0.2)
    for name in ("swim", "dive"):
        (tree / name).rmdir()
    assert advice in fault(tree, holdout=0.2)
    for file in tree.glob("hop*.rar"):
        file.rename(tree / "run.rar")
    (tree / "labels").mkdir()
    assert read_layout(tree, options=LayoutConfig(holdout=0.2)).classes == ("run", "sit", "walk"), "run.rar is unpacked"


def test_classes_of_split_folders_that_a_set_would_lack(tmp_path):
    touch(tmp_path, "train/run/a.mp4", "train/walk/b.mp4", "val/run/c.mp4")
    (tmp_path / "train/swim").mkdir()
    assert "is in the class folders train/swim; put their videos there" in fault(tmp_path)
    (tmp_path / "train/swim").rmdir()
    (tmp_path / "val/walk.zip").touch()
    assert "(val/walk.zip): unpack them first, cd val; unzip walk.zip, or move" in fault(tmp_path)


def test_a_group_of_a_class_is_held_out_whole(tmp_path):
    touch(tmp_path, *(f"{name}/v_{name}_{g:02d}/{n}.mpg" for name in ("run", "walk") for g in range(10) for n in range(4)))
    source = read_layout(tmp_path, options=LayoutConfig(holdout=0.2))
    assert (source.classes, source.unlisted) == (("run", "walk"), 0)
    groups = [{video.path.rpartition("/")[0] for video in videos} for videos in source.splits.values()]
    assert [len(group) for group in groups] == [16, 4]
    assert not groups[0] & groups[1]


def test_folders_of_which_the_classes_cannot_be_told(tmp_path):
    touch(tmp_path, *(f"a/videos/{name}/{n}.mp4" for name in ("run", "walk") for n in range(2)))
    write(tmp_path / "a/notes/split.csv", "a,b")
    for options in ({}, {"holdout": 0.5}):
        words = (
            f"one class alone, 'videos'; at least two classes are needed: videos are a level deeper; give {tmp_path}/a/videos;"
        )
        assert f"{words} these were not taken for annotations: notes/split.csv" in fault(tmp_path / "a", **options)
    touch(tmp_path, *(f"b/part{part}/{name}/x.mp4" for name in ("run", "walk") for part in (1, 2)))
    words = "which folders are the classes, part1, part2 or those in them, run, walk? Give the folder of the classes, or a list"
    assert words in fault(tmp_path / "b", holdout=0.5)
    write(tmp_path / "b/classes.txt", "part1", "part2", "part3")
    assert read_layout(tmp_path / "b", options=LayoutConfig(holdout=0.5)).classes == ("part1", "part2", "part3")
    touch(tmp_path, *(f"c/{name}/{split}/x.mp4" for name in ("run", "walk") for split in ("train", "val")))
    assert "the classes, run, walk or those in them, train, val?" in fault(tmp_path / "c", holdout=0.5)
    touch(tmp_path, "d/train/videos/run/a.mp4", "d/train/videos/walk/b.mp4")
    assert f"videos are a level deeper; move what is in {tmp_path}/d/train/videos up" in fault(tmp_path / "d")
    touch(tmp_path, "e/val/run/a.mp4", "e/val/walk/b.mp4")
    (tmp_path / "e/train/run").mkdir(parents=True)
    for options in ({}, {"holdout": 0.5}):
        assert "no training videos: val/ has some, and no train/<class>/; put them there" in fault(tmp_path / "e", **options)


def test_folders_of_splits_are_no_classes(tmp_path):
    touch(tmp_path, *(f"{split}/{n}.mp4" for split in ("train", "val", "test") for n in range(3)))
    write(tmp_path / "more/deep/train.CSV", "some,thing")
    for options in ({}, {"holdout": 0.5}):
        words = fault(tmp_path, **options)
        assert "videos are directly in train/, val/, and no annotations tell their classes: put them into folders" in words
        assert "a CSV with youtube_id (Kinetics), train*.txt" in words
        assert words.endswith("these were not taken for annotations: more/deep/train.CSV")
    write(tmp_path / "lists/train.txt", "0.mp4 0", "1.mp4 1")
    assert keys(read_layout(tmp_path))["train"] == [("0", 0), ("1", 1)]


def test_annotations_that_are_not_read_are_told_before_a_hold_out(tree):
    write(tree / "run/split.txt", "x")
    assert fault(tree).endswith("put them into train/ and val/; these were not taken for annotations: run/split.txt")
    write(tree / "old/split.csv", "x")
    words = "class folders old; put their videos there, or remove these folders; these were not taken for annotations: old/split.csv"
    assert words in fault(tree)


def test_names_that_are_not_utf8(tree):
    for number in range(12):
        (tree / f"run/caf{number:02d}\udce9.mp4").touch()
    words = fault(tree, holdout=0.2)
    assert "names that are not UTF-8 (12): run/caf00\\xe9.mp4, " in words
    assert words.endswith("run/caf09\\xe9.mp4 and 2 more; rename them")


# --- lists ---


@pytest.fixture
def videos(tmp_path) -> Path:
    folder = tmp_path / "set"
    touch(folder, "playing guitar/one 1.mp4", "yoga/two.mp4", "yoga/three.avi")
    return folder


@pytest.mark.parametrize(
    ("train", "rows"),
    [
        ("train.txt", ["playing guitar/one 1.mp4 0", "yoga/two.mp4 1"]),
        ("train.csv", ["playing guitar/one 1.mp4,0", "yoga/two.mp4, 1"]),
        ("annotations/kinetics400_train_list_videos.txt", ["playing guitar/one 1.mp4 0", "yoga/two.mp4\t1"]),
        ("train_rawframes.txt", ["playing guitar/one 1 250 0", "yoga/two 300 1"]),
        ("train.txt", ["playing guitar/one 1.mp4 250 0", "yoga/two.mp4 300 1"]),
    ],
)
def test_lists_of_each_kind(videos, train, rows):
    write(videos / train, *rows)
    write(
        videos / Path(train).parent / Path(train).name.replace("train", "val"),
        rows[1].replace("two", "three").replace(".mp4", ".avi"),
    )
    write(videos / "test.txt", "yoga/two.mp4")
    (videos / "yoga/two.mp4").rename(videos / "yoga/two.webm")
    for file in (videos / train, videos / "test.txt"):
        file.write_text(file.read_text().replace("two.mp4", "two.webm"))
    write(videos / "test.txt", "yoga/four.mp4")
    touch(videos, "yoga/four.mp4")
    source = read_layout(videos)
    assert (source.layout, source.dataset, source.classes, source.unlisted) == ("list", "set", ("0", "1"), 0)
    first = source.splits["train"][0]
    assert first.key.startswith("playing_guitar_one_1-"), "a space is not allowed in a key"
    assert (first.path, first.label) == ("playing guitar/one 1.mp4", 0)
    assert [v.path for v in source.splits["train"]][1:] == ["yoga/two.webm"]
    assert [(v.path, v.label) for v in source.splits["validation"]] == [("yoga/three.avi", 1)]
    assert [(v.path, v.label) for v in source.splits["test"]] == [("yoga/four.mp4", None)]


def test_lists_beside_folders_of_splits_and_absolute_paths(tmp_path):
    touch(tmp_path / "set", "videos_train/a.mp4", "videos_val/b.mp4")
    touch(tmp_path, "elsewhere/c.mp4")
    write(tmp_path / "set/train.txt", "a.mp4 0", f"{tmp_path}/elsewhere/c.mp4 1")
    write(tmp_path / "set/val.txt", "b.mp4 1")
    source = read_layout(tmp_path / "set")
    assert [v.path for v in source.splits["train"]] == ["videos_train/a.mp4", f"{tmp_path}/elsewhere/c.mp4"]
    assert [v.path for v in source.splits["validation"]] == ["videos_val/b.mp4"]


def test_lists_of_numbered_splits(videos):
    for number in (1, 2):
        write(videos / f"hmdb51_train_split_{number}_videos.txt", f"yoga/{'two.mp4' if number == 1 else 'three.avi'} 1")
        write(videos / f"hmdb51_train_split_{number}_rawframes.txt", "yoga/two 9 1")
        write(videos / f"hmdb51_val_split_{number}_videos.txt", "playing guitar/one 1.mp4 0")
    source = read_layout(videos, options=LayoutConfig(split_number=2))
    assert [v.key for v in source.splits["train"]] == ["three"]
    assert source.options == {"split_number": 2}


@pytest.mark.parametrize(
    "name", ["x_train_split_{}_videos.txt", "train_split{}.txt", "train_split0{}.txt", "train_split_0{}.csv"]
)
def test_lists_of_another_split_alone(videos, name):
    for number in (2, 3):
        write(videos / name.format(number), "playing guitar/one 1.mp4 0", f"yoga/{'two.mp4' if number == 2 else 'three.avi'} 1")
    assert "no training list of split 1; give --split-number 2 (there are lists of 2, 3)" in fault(videos)
    assert [v.path for v in read_layout(videos, options=LayoutConfig(split_number=3)).splits["train"]][1:] == ["yoga/three.avi"]


def test_lists_with_quotes(videos):
    touch(videos, 'yoga/a, "b".avi', 'yoga/"c".avi')
    write(
        videos / "train.csv", '"playing guitar/one 1.mp4",0', '"yoga/two.mp4", "1"', '"yoga/a, ""b"".avi",1', 'yoga/"c".avi,1'
    )
    write(videos / "val.csv", '"yoga/three.avi" 25 1')
    (videos / "yoga/two.mp4").rename(videos / "yoga/2 two.mp4")
    write(videos / "test.csv", '"yoga/2 two.mp4"')
    write(videos / "train.csv", *(line for line in (videos / "train.csv").read_text().splitlines() if "two" not in line))
    found = {split: [v.path for v in listed] for split, listed in read_layout(videos).splits.items()}
    assert found == {
        "train": ["playing guitar/one 1.mp4", 'yoga/a, "b".avi', 'yoga/"c".avi'],
        "validation": ["yoga/three.avi"],
        "test": ["yoga/2 two.mp4"],
    }


def test_hidden_files_are_no_lists(videos):
    write(videos / "train.txt", "playing guitar/one 1.mp4 0", "yoga/two.mp4 1")
    (videos / "._train.txt").write_bytes(b"\0\5\x16\7")
    assert len(read_layout(videos).splits["train"]) == 2


def test_videos_in_no_list_are_counted_by_file(videos):
    (videos / "link").symlink_to("yoga")
    write(
        videos / "train.txt",
        f"{videos}/playing guitar/one 1.mp4 0",
        f"{videos.parent}/../{videos.parent.name}/set/link/two.mp4 1",
    )
    assert read_layout(videos).unlisted == 1, "yoga/three.avi"


def test_names_of_classes(videos):
    write(videos / "train.txt", "playing guitar/one 1.mp4 0", "yoga/two.mp4 1")
    write(videos / "classes.txt", "guitar", "yoga")
    assert [v.text for v in read_layout(videos).splits["train"]] == ["guitar", "yoga"]
    write(videos / "label_map_x.txt", "guitar", "yoga")
    assert "are all lists of classes; name the right one with --classes" in fault(videos)
    write(videos / "label_map_x.txt", "guitar", "yoga", "guitar")
    assert "line 3: class 'guitar' is there twice, first in line 1" in fault(videos, classes=str(videos / "label_map_x.txt"))
    assert "nowhere.txt: cannot be read: No such file" in fault(videos, classes="nowhere.txt")
    names = shared_data("labels/ssv2/label_map.txt")
    assert len(read_layout(videos, options=LayoutConfig(classes=str(names))).classes) == SSV2_CLASSES


def test_the_folder_of_a_list_is_found_though_its_first_videos_are_not_there(tmp_path):
    names = [f"v{number:02d}.mp4" for number in range(60)]
    touch(tmp_path, *(f"videos/{name}" for name in names[25:]))
    write(tmp_path / "train.txt", *(f"{name} {number % 2}" for number, name in enumerate(names)))
    assert "names 25 of 60 videos that are not there: v00.mp4, v01.mp4, " in fault(tmp_path)
    source = read_layout(tmp_path, options=LayoutConfig(allow_missing=0.5))
    assert [video.path for video in source.splits["train"]] == [f"videos/{name}" for name in names[25:]]
    assert len(source.absent) == 25


def test_what_cannot_be_read_is_named(tmp_path):
    gone = tmp_path / "gone"
    for reading in (csv_header, folders, lambda path: files_below(path, bool), read_text):
        with pytest.raises(DataError, match=f"^{gone}: cannot be read: No such file or directory; give the account"):
            reading(gone)


def test_list_faults(videos):
    train = videos / "train.txt"
    write(train, "playing guitar/one 1.mp4 0", "yoga/two.mp4 1", *(f"gone/{n}.mp4 1" for n in range(13)))
    missing = ", ".join(f"gone/{n}.mp4" for n in range(10))
    assert f"train.txt names 13 of 15 videos that are not there: {missing} and 3 more; unpack" in fault(videos)
    assert len(read_layout(videos, options=LayoutConfig(allow_missing=0.87)).absent) == 13
    write(train, "gone/0.mp4 0", "gone/1.mp4 1")
    assert fault(videos).endswith("gone/0.mp4, gone/1.mp4; unpack all parts of the data set"), "no share helps"
    for rows, words in (
        (["yoga/two.mp4 yoga"], "train.txt: line 1, column 14: 'yoga/two.mp4 yoga'; 'path label' or 'path total_frames label'"),
        (["yoga/two.mp4 1", "yoga/three.avi 1 0"], "line 2 has 3 columns, line 1 has 2; .* (one label a video)"),
        (["yoga/two.mp4 0"], "at least two classes are needed, labels 0 and 1; the largest label is 0"),
        (["yoga/two.mp4 20240131"], "label 20240131; at most 100000 classes are read"),
        (["yoga/two.mp4 1", "yoga/three.avi -1"], "line 2: label -1, but the training list has 2 classes: 0 to 1 are allowed"),
        (["yoga/two.mp4 1", "yoga/two.mp4 1"], "video two is listed twice in train"),
        ([], "at least two classes are needed"),
    ):
        write(train, *rows)
        assert all(part in fault(videos) for part in words.split(".*")), fault(videos)
    write(train, "yoga/two.mp4 1")
    write(videos / "val.txt", "yoga/two.mp4 1")
    assert "video two is listed in train and in validation; a video is in one split" in fault(videos)
    write(videos / "val.txt", "yoga/three.avi 5")
    assert "val.txt: line 1: label 5, but the training list has 2 classes" in fault(videos)
    write(videos / "classes.txt", "guitar", "yoga")
    assert f"label 5, but {videos / 'classes.txt'} has 2 classes" in fault(videos)
    write(videos / "validation.csv", "yoga/three.avi 1")
    assert "are all lists of the split 'validation'; keep one" in fault(videos)
    (videos / "validation.csv").unlink()
    (videos / "val.txt").unlink()
    touch(videos, "yoga/frames/img_00001.jpg")
    write(train, "yoga/frames 1 1")
    assert "yoga/frames is a folder of frames; videos are packed" in fault(videos)
    assert "no list called train*.txt or train*.csv" in fault(videos / "yoga", "list")


def test_videos_listed_twice_are_told_with_their_lines(videos):
    touch(videos, *(f"v/{n:02d}.avi" for n in range(13)))
    write(videos / "train.txt", "yoga/two.mp4 1", *(f"v/{n:02d}.avi 0" for n in range(13)))
    write(videos / "val.txt", *(f"v/{n:02d}.avi 0" for n in range(13)))
    words = fault(videos)
    assert f"; keep one of each two: 00 ({videos}/train.txt: line 2, {videos}/val.txt: line 1), 01 (" in words
    assert words.endswith("val.txt: line 10) and 3 more")
    write(videos / "val.txt", "v/00.avi 0", "v/01.avi 1")
    words = f"keep one of each two: 01 ({videos}/train.txt: line 3, {videos}/val.txt: line 2)"
    assert f"video 01 is listed in train and in validation with different labels, '0' and '1'; {words}" in fault(videos)


def test_ambiguous_folders(videos):
    write(videos / "train.txt", "yoga/two.mp4 1")
    write(videos / "kinetics.csv", HEADER)
    assert "the annotations of kinetics and of list are here; say which with --layout" in fault(videos)
    assert read_layout(videos, "list").layout == "list"
