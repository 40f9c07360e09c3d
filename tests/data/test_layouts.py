"""Something-Something-V2 and UCF101 as they are distributed, in each variant, and each way in which a folder can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest

from tests.support import shared_data, write_json
from vidfuse.config import LayoutConfig, PackConfig
from vidfuse.data.layouts import LAYOUTS, read_layout
from vidfuse.data.shards import DataError

TEMPLATES = ("Pushing [something] from left to right", "Lifting [something] up")


def entry(number: int, template: str = TEMPLATES[0]) -> dict[str, object]:
    return {"id": str(number), "label": "pushing a cup", "template": template, "placeholders": ["a cup"]}


@pytest.fixture
def ssv2(tmp_path) -> Path:
    """As distributed, without bytes in the videos: layouts read names only."""
    (tmp_path / "labels").mkdir()
    (tmp_path / "20bn-something-something-v2").mkdir()
    for number, suffix in ((1, "webm"), (2, "mp4"), (3, "webm"), (4, "webm"), (9, "webm")):
        (tmp_path / f"20bn-something-something-v2/{number}.{suffix}").touch()
    write_json(tmp_path / "labels/labels.json", {"Lifting something up": "1", "Pushing something from left to right": "0"})
    write_json(tmp_path / "labels/train.json", [entry(1), entry(2, TEMPLATES[1])])
    write_json(tmp_path / "labels/validation.json", [entry(3)])
    write_json(tmp_path / "labels/test.json", [{"id": "4"}])
    return tmp_path


@pytest.fixture
def ucf101(tmp_path) -> Path:
    for name in ("Archery/v_Archery_g01_c01", "Archery/v_Archery_g02_c01", "Yoga/v_Yoga_g01_c01", "Yoga/v_Yoga_g02_c01"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.avi").touch()
    (tmp_path / "classInd.txt").write_text("1 Archery\r\n2 Yoga\r\n\r\n")
    (tmp_path / "trainlist01.txt").write_text("Archery/v_Archery_g01_c01.avi 1\nYoga/v_Yoga_g01_c01.avi 2\n")
    (tmp_path / "testlist01.txt").write_text("Archery/v_Archery_g02_c01.avi\n")
    return tmp_path


def fault(folder: Path, layout: str | None = None, **options) -> str:
    with pytest.raises(DataError) as error:
        read_layout(folder, layout, LayoutConfig(**options))
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "option", "users"), [("holdout", "--holdout", "tree"), ("classes", "--classes", "kinetics, list, tree")]
)
def test_an_option_that_the_layout_has_no_use_for_is_refused(ucf101, name, option, users):
    words = f"read as ucf101, which has no use for {option} (of {users}); leave it out, or choose another layout with --layout"
    assert words in fault(ucf101, **{name: 0.2 if name == "holdout" else "names.txt"})


def test_layouts_tell_the_options_that_they_use():
    for name, layout in LAYOUTS.items():
        assert set(re.findall(r"\boptions\.([a-z_]+)", Path(layout.__file__).read_text())) == layout.USES, name
        assert set(LayoutConfig.model_fields) >= layout.USES


def test_each_layout_can_be_asked_for():
    assert get_args(get_args(PackConfig.model_fields["layout"].annotation)[0]) == tuple(LAYOUTS)


def test_ssv2_as_distributed(ssv2):
    source = read_layout(ssv2)
    assert source.classes == ("Pushing something from left to right", "Lifting something up")
    assert {split: [(v.key, v.label, v.text) for v in videos] for split, videos in source.splits.items()} == {
        "train": [("1", 0, "pushing a cup"), ("2", 1, "pushing a cup")],
        "validation": [("3", 0, "pushing a cup")],
        "test": [("4", None, "")],
    }
    assert [v.placeholders for v in (*source.splits["train"], *source.splits["test"])] == [("a cup",), ("a cup",), ()]
    assert source.splits["train"][1].path == "20bn-something-something-v2/2.mp4"
    assert source.unlisted == 1


@pytest.mark.parametrize("name", ["{}.json", "something-something-v2-{}.json", "labels/something-something-v2-{}.json"])
def test_ssv2_in_other_places(ssv2, name):
    before = read_layout(ssv2)
    for part in ("labels", "train", "validation", "test"):
        (ssv2 / f"labels/{part}.json").rename(ssv2 / name.format(part))
    for video in (ssv2 / "20bn-something-something-v2").iterdir():
        video.rename(ssv2 / video.name)
    (ssv2 / "20bn-something-something-v2").rmdir()
    after = read_layout(ssv2, "ssv2")
    assert [v.key for v in after.splits["train"]] == [v.key for v in before.splits["train"]]
    assert after.splits["test"][0].path == "4.webm"


def test_ssv2_without_a_test_split(ssv2):
    (ssv2 / "labels/test.json").unlink()
    assert list(read_layout(ssv2).splits) == ["train", "validation"]


def test_ssv2_without_a_sentence_has_the_template(ssv2):
    write_json(ssv2 / "labels/train.json", [{**entry(1), "label": None}, {**entry(2), "label": ""}])
    assert [v.text for v in read_layout(ssv2).splits["train"]] == ["Pushing something from left to right", ""]


def test_ssv2_faults(ssv2):
    labels = ssv2 / "labels"
    write_json(labels / "train.json", [entry(n) for n in range(1, 30)])
    missing = "5, 6, 7, 8, 10, 11, 12, 13, 14, 15 and 14 more"
    assert f"train.json names 24 of 29 videos that are not there: {missing}; unpack all parts" in fault(ssv2)
    write_json(labels / "train.json", [entry(1, "Eating [something]")])
    assert "train.json: line 1: video 1: class 'Eating something' is not in the list of 2 classes" in fault(ssv2)
    (labels / "train.json").write_text(json.dumps([entry(1), entry(2, "Eating [something]")], indent=2))
    assert "train.json: line 10: video 2: class 'Eating something' is not in the list of 2 classes" in fault(ssv2)
    write_json(labels / "train.json", [{"id": "1"}])
    assert 'video 1 has no "template"; add it: only the test split is without labels' in fault(ssv2)
    (labels / "train.json").write_text('[\n{"id": "1", "template": "Pushing [something] from left to right"},\n\n {}\n]')
    assert 'train.json: line 4: an object with "id" is needed' in fault(ssv2)
    write_json(labels / "train.json", [{**entry(1), "placeholders": "a cup"}])
    assert "video 1: \"placeholders\" is 'a cup'; a list of what the sentence names is needed" in fault(ssv2)
    write_json(labels / "train.json", {"id": "1"})
    assert "train.json: a JSON list is needed, [entry, ...]" in fault(ssv2)
    (labels / "train.json").write_text('[\n {"id": "1",}\n]')
    assert "train.json: line 2, column" in fault(ssv2)
    write_json(labels / "train.json", [entry(3)])
    assert "video 3 is listed in train and in validation" in fault(ssv2)
    write_json(labels / "train.json", [entry(1), entry(1)])
    assert "video 1 is listed twice in train" in fault(ssv2)
    write_json(labels / "train.json", [])
    assert "split 'train' of something-something-v2 lists no videos" in fault(ssv2)
    (labels / "train.json").unlink()
    assert "no train.json beside labels.json" in fault(ssv2)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"a": "0", "b": "2"}, "numbers are 0 to 1, each once"),
        ({"a": "0", "b": "0"}, "numbers are 0 to 1, each once"),
        ({"a": "0"}, "at least two"),
        ({"a": "zero"}, 'an object {"class": "number", ...} is needed'),
        (["a"], 'an object {"class": "number", ...} is needed'),
    ],
)
def test_ssv2_class_lists_that_are_none(ssv2, labels, words):
    write_json(ssv2 / "labels/labels.json", labels)
    assert words in fault(ssv2)


def test_ssv2_two_files_of_one_id(ssv2):
    (ssv2 / "20bn-something-something-v2/1.mp4").touch()
    assert "1.mp4 and 1.webm have the same id" in fault(ssv2)


def test_ucf101_as_distributed(ucf101):
    source = read_layout(ucf101)
    assert (source.dataset, source.classes, source.unlisted) == ("ucf101", ("Archery", "Yoga"), 1)
    train = [(v.key, v.path, v.label, v.text) for v in source.splits["train"]]
    assert train == [
        ("v_Archery_g01_c01", "Archery/v_Archery_g01_c01.avi", 0, "Archery"),
        ("v_Yoga_g01_c01", "Yoga/v_Yoga_g01_c01.avi", 1, "Yoga"),
    ]
    assert [v.key for v in source.splits["validation"]] == ["v_Archery_g02_c01"]


def test_ucf101_in_other_places(ucf101):
    (ucf101 / "UCF-101").mkdir()
    (ucf101 / "ucfTrainTestlist").mkdir()
    for name in ("Archery", "Yoga"):
        (ucf101 / name).rename(ucf101 / "UCF-101" / name)
    for file in ucf101.glob("*.txt"):
        file.rename(ucf101 / "ucfTrainTestlist" / file.name)
    assert read_layout(ucf101).splits["train"][0].path == "UCF-101/Archery/v_Archery_g01_c01.avi"
    assert len(read_layout(ucf101 / "UCF-101").splits["train"]) == 2


@pytest.mark.parametrize("place", ["annotations", "labels"])
def test_ucf101_as_mmaction2_lays_it_out(ucf101, place):
    for name, parts in (("videos", ("Archery", "Yoga")), (place, ("classInd.txt", "trainlist01.txt", "testlist01.txt"))):
        (ucf101 / name).mkdir()
        for part in parts:
            (ucf101 / part).rename(ucf101 / name / part)
    source = read_layout(ucf101)
    assert (source.layout, source.splits["train"][0].path) == ("ucf101", "videos/Archery/v_Archery_g01_c01.avi")


def test_ucf101_with_one_name_in_two_classes_tabs_and_spaces(ucf101):
    for name in ("Archery", "Yoga"):
        (ucf101 / name / f"v_{name}_g01_c01.avi").rename(ucf101 / name / "001.avi")
        (ucf101 / name / f"v_{name}_g02_c01.avi").rename(ucf101 / name / f"{name} 1.avi")
    (ucf101 / "classInd.txt").write_text("1\tArchery\n2  Yoga\n")
    (ucf101 / "trainlist01.txt").write_text("Archery/001.avi\t1\nYoga/001.avi  2\nYoga/Yoga 1.avi 2\n")
    (ucf101 / "testlist01.txt").write_text("Archery/Archery 1.avi\n")
    source = read_layout(ucf101)
    assert [(v.path, v.label) for v in source.splits["train"]] == [
        ("Archery/001.avi", 0),
        ("Yoga/001.avi", 1),
        ("Yoga/Yoga 1.avi", 1),
    ]
    assert [v.path for v in source.splits["validation"]] == ["Archery/Archery 1.avi"]
    keys = [v.key for videos in source.splits.values() for v in videos]
    assert len(set(keys)) == 4
    assert keys[0].startswith("Archery_001-")


def test_ucf101_faults(ucf101):
    train = ucf101 / "trainlist01.txt"
    assert "trainlist02.txt: there is no such list; choose a split number" in fault(ucf101, split_number=2)
    for line, words in (
        ("Dancing/v_Dancing_g01_c01.avi 3", "line 1: class 'Dancing' is not in classInd.txt"),
        ("Yoga/v_Yoga_g01_c01.avi 1", "line 1: label 1, but Yoga is 2"),
        ("Yoga/v_Yoga_g07_c01.avi 2", "names 1 of 1 videos that are not there: Yoga/v_Yoga_g07_c01.avi"),
        ("Archery/v_Archery_g02_c01.avi 1", "v_Archery_g02_c01 is listed in train and in validation"),
    ):
        train.write_text(line + "\n")
        assert words in fault(ucf101)
    (ucf101 / "classInd.txt").write_text("1 Archery\n3 Yoga\n")
    assert "line 2: '3 Yoga'; '2 ClassName' is needed" in fault(ucf101)


def test_folders_without_a_data_set(tmp_path, ucf101):
    assert "there is no such folder" in fault(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no annotations; a folder is needed that holds" in fault(tmp_path / "empty")
    assert "unknown layout 'imagenet'; there are ssv2, ucf101, hmdb51, kinetics, list, tree" in fault(ucf101, layout="imagenet")
    assert "no labels/labels.json" in fault(ucf101, layout="ssv2")
    for video in ucf101.glob("*/*.avi"):
        video.unlink()
    assert "no class folder of classInd.txt is here with a video in it" in fault(ucf101)


def test_videos_missing_altogether(ssv2):
    for video in (ssv2 / "20bn-something-something-v2").iterdir():
        video.unlink()
    assert "no videos (.mp4, .webm" in fault(ssv2)


def test_the_shared_real_clips():
    source = read_layout(shared_data("realclips"))
    assert {split: len(videos) for split, videos in source.splits.items()} == {"train": 70, "validation": 30}


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_official_lists_of_ucf101(tmp_path, number):
    from vidfuse.data.labels import UCF101_CLASSES, UCF101_SPLITS

    lists = shared_data("labels/ucf101")
    (tmp_path / "ucfTrainTestlist").symlink_to(lists)
    for file in (f"trainlist{number:02d}.txt", f"testlist{number:02d}.txt"):
        for line in (lists / file).read_text().split():
            if line.endswith(".avi"):
                (tmp_path / line).parent.mkdir(exist_ok=True)
                (tmp_path / line).touch()
    source = read_layout(tmp_path, options=LayoutConfig(split_number=number))
    assert len(source.classes) == UCF101_CLASSES
    assert (len(source.splits["train"]), len(source.splits["validation"])) == UCF101_SPLITS[number]


# --- HMDB51 ---


@pytest.fixture(params=["annotations", "testTrainMulti_7030_splits"])
def hmdb51(tmp_path, request) -> Path:
    lists = tmp_path / request.param
    lists.mkdir()
    for name in ("run", "brush_hair"):
        folder = tmp_path / ("videos" if request.param == "annotations" else "") / name
        folder.mkdir(parents=True)
        for video in ("a#1", "b", "c", "d"):
            (folder / f"{video}.avi").touch()
        for number, uses in ((1, "120"), (2, "012")):
            rows = (f"{video}.avi {use} \n" for video, use in zip(("a#1", "b", "c"), uses, strict=True))
            (lists / f"{name}_test_split{number}.txt").write_text("".join(rows))
    return tmp_path


def test_hmdb51(hmdb51):
    source = read_layout(hmdb51)
    assert (source.layout, source.dataset, source.classes) == ("hmdb51", "hmdb51", ("brush_hair", "run"))
    found = {split: [(Path(v.path).name, v.label, v.text) for v in videos] for split, videos in source.splits.items()}
    assert found == {
        "train": [("a#1.avi", 0, "brush_hair"), ("a#1.avi", 1, "run")],
        "validation": [("b.avi", 0, "brush_hair"), ("b.avi", 1, "run")],
    }
    assert source.unlisted == 2, "d.avi of each class; c.avi is listed, for neither split"
    other = read_layout(hmdb51, options=LayoutConfig(split_number=2))
    assert [Path(v.path).name for videos in other.splits.values() for v in videos] == ["b.avi"] * 2 + ["c.avi"] * 2
    assert "no <class>_test_split3.txt of two classes; there are lists of 1, 2; choose --split-number" in fault(
        hmdb51, split_number=3
    )
    file = next(hmdb51.glob("*/run_test_split1.txt"))
    file.write_text("a#1.avi 1\nz.avi 2\n")
    assert "run_test_split1.txt names 1 of 1 videos that are not there: " in fault(hmdb51)
    file.write_text("a#1.avi 3\n")
    assert "run_test_split1.txt: line 1: 'a#1.avi 3'; '<video> 0', '<video> 1' or '<video> 2' is needed" in fault(hmdb51)
    for video in hmdb51.rglob("*.avi"):
        video.unlink()
    assert "no class folder of <class>_test_split1.txt is here with a video in it (.mp4, " in fault(hmdb51)


def test_hmdb51_with_a_class_called_train(hmdb51):
    next(hmdb51.glob("*/run_test_split1.txt")).rename(
        next(hmdb51.glob("*/brush_hair_test_split1.txt")).parent / "train_test_split1.txt"
    )
    next(hmdb51.rglob("run")).rename(next(hmdb51.rglob("brush_hair")).parent / "train")
    assert read_layout(hmdb51).classes == ("brush_hair", "train")


def test_lists_that_were_made_from_those_of_hmdb51(hmdb51):
    for split, video in (("train", "a#1"), ("val", "b")):
        place = "videos/" if (hmdb51 / "videos").is_dir() else ""
        rows = (f"{place}{name}/{video}.avi {label}\n" for label, name in enumerate(("brush_hair", "run")))
        (hmdb51 / f"hmdb51_{split}_split_1_videos.txt").write_text("".join(rows))
    source = read_layout(hmdb51)
    assert (source.layout, [len(videos) for videos in source.splits.values()]) == ("list", [2, 2])
    assert read_layout(hmdb51, "hmdb51").classes == ("brush_hair", "run")


# --- any layout ---


def test_missing_videos_may_be_allowed(ssv2, ucf101):
    """Both are made in one folder: the layout has to be named."""
    write_json(ssv2 / "labels/train.json", [entry(n) for n in (1, 2, 5)])
    assert "are here; say which with --layout" in fault(ssv2)
    assert "or leave them out with --allow-missing 0.34" in fault(ssv2, "ssv2")
    source = read_layout(ssv2, "ssv2", LayoutConfig(allow_missing=0.34))
    assert [v.key for v in source.splits["train"]] == ["1", "2"]
    assert [(v.split, v.key, v.reason) for v in source.absent] == [("train", "5", "not in the source folder")]
    (ucf101 / "Archery/v_Archery_g01_c01.avi").unlink()
    source = read_layout(ucf101, "ucf101", LayoutConfig(allow_missing=0.5))
    assert [(v.key, v.path) for v in source.absent] == [("v_Archery_g01_c01", "Archery/v_Archery_g01_c01.avi")]


def test_annotations_that_are_no_text(ssv2, tmp_path):
    file = ssv2 / "labels/train.json"
    file.write_bytes(b'[\n {"id": "1", "template": "\xff"}\n]')
    assert "train.json: line 2, column 27: byte 0xff is not UTF-8" in fault(ssv2)
    file.unlink()
    file.mkdir()
    assert "no train.json beside labels.json" in fault(ssv2)


def test_json_that_python_does_not_read(ssv2):
    (ssv2 / "labels/train.json").write_text("[" * 100_000)
    assert "train.json: JSON nested too deep to be annotations" in fault(ssv2)
    (ssv2 / "labels/labels.json").write_text(f'{{"a": 0, "b": {"1" * 5000}}}')
    assert "labels.json: a number of thousands of digits" in fault(ssv2)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("set.zip", "unzip set.zip"),
        ("set.tar.gz", "tar -xf set.tar.gz"),
        ("UCF101.rar", "unrar x UCF101.rar"),
        ("20bn-something-something-v2-00", "cat 20bn-something-something-v2-?? | tar -xz"),
    ],
)
def test_archives_instead_of_a_folder(tmp_path, name, command):
    (tmp_path / name).write_bytes(b"x")
    assert f"{name} is an archive; unpack it first ({command}) and give the folder" in fault(tmp_path / name)
    assert f"archives are there ({name}): unpack them first, {command}" in fault(tmp_path)
    (tmp_path / "notes").write_bytes(b"x")
    assert "notes is a file; give the folder" in fault(tmp_path / "notes")


def test_archives_beside_the_annotations(ssv2):
    for video in (ssv2 / "20bn-something-something-v2").iterdir():
        video.unlink()
    for part in range(12):
        (ssv2 / f"20bn-something-something-v2-{part:02d}").touch()
    assert "-09 and 2 more): unpack them first, cat 20bn-something-something-v2-?? | tar -xz" in fault(ssv2)


def test_archives_in_folders_of_splits(tmp_path):
    for name in ("train/part_0.tar.gz", "train/part_1.tar.gz", "val/part_0.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    advice = (
        "archives are there (train/part_0.tar.gz, train/part_1.tar.gz, val/part_0.tar.gz): unpack them first, cd train; tar -xf"
    )
    assert advice in fault(tmp_path)
    (tmp_path / "train.txt").write_text("a.mp4 0\nb.mp4 1\n")
    assert advice in fault(tmp_path)
