"""Packing on a real Ray cluster and a real S3 server: what is planned, what is left out, what is continued."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import make_ssv2, make_ucf101, make_video
from vidfuse.data import shards
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError
from vidfuse.on_ray import packing, storage
from vidfuse.on_ray.checking import check

SHARD, OTHER = 64_000, 90_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_ssv2(tmp_path_factory.mktemp("ssv2"), {"train": 24, "validation": 7, "test": 3})


@pytest.fixture
def own_folder(folder, tmp_path) -> Path:
    shutil.copytree(folder, tmp_path / "source")
    return tmp_path / "source"


def prepare(folder: Path, url: str, shard_bytes: int = SHARD) -> packing.Packing:
    return packing.prepare(read_layout(folder), folder, url, shard_bytes)


def pack(folder: Path, url: str, shard_bytes: int = SHARD) -> packing.Packed:
    return packing.pack(prepare(folder, url, shard_bytes))


def contents(url: str) -> dict[str, bytes]:
    fs, root = storage.open_storage(url)
    return {name: storage.read_bytes(fs, storage.join(root, name)) for name in storage.list_files(fs, root)}


# --- the plan (no Ray) ---


def test_the_plan_is_a_function_of_names_labels_and_sizes(folder, own_folder):
    plan = packing.make_plan(read_layout(folder), folder, SHARD)
    again = packing.make_plan(read_layout(own_folder), own_folder, SHARD)
    assert (plan.digest, plan.shards) == (again.digest, again.shards)
    assert len(plan.shards) > 5
    keys = [planned.video.key for shard in plan.shards for planned in shard.videos]
    assert sorted(keys) == sorted(str(number) for number in range(1001, 1035))
    assert keys != sorted(keys)
    labels = [planned.video.label for planned in plan.shards[0].videos]
    assert len(set(labels)) > 1, "a shard is a mixture of classes"
    assert packing.make_plan(read_layout(folder), folder, OTHER).digest != plan.digest


def test_a_video_larger_than_a_shard_has_its_own(tmp_path):
    make_ucf101(tmp_path)
    big = tmp_path / "Yoga/v_Yoga_g01_c01.avi"
    big.write_bytes(bytes(3 * SHARD))
    plan = packing.make_plan(read_layout(tmp_path), tmp_path, SHARD)
    assert [p.video.key for p in next(s for s in plan.shards if s.bytes > SHARD).videos] == ["v_Yoga_g01_c01"]


@pytest.mark.parametrize(
    ("text", "number"),
    [("256MB", 256_000_000), ("1GiB", 1024**3), ("64kb", 64_000), ("123456", 123_456), ("1.5 MB", 1_500_000)],
)
def test_bytes_in_words(text, number):
    assert packing.parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "3 apples", "1e6"])
def test_bytes_that_are_none(text):
    with pytest.raises(DataError, match="such as 256000000, 256MB or 1GiB"):
        packing.parse_bytes(text)


def test_a_bound_that_is_too_small(folder, tmp_path):
    with pytest.raises(DataError, match="--shard-bytes 10: at least 64000"):
        prepare(folder, str(tmp_path / "set"), 10)
    assert not (tmp_path / "set").exists()


# --- packing ---


@pytest.fixture(scope="module")
def packed(folder, s3, ray_cluster) -> str:
    url = s3.url("packed")
    pack(folder, url)
    return url


@pytest.mark.s3
@pytest.mark.ray
def test_the_set_holds_every_video_as_it_was(packed, folder):
    files = contents(packed)
    manifest = shards.parse_record(shards.Manifest, files["manifest.json"], "")
    assert {split: info.samples for split, info in manifest.splits.items()} == {"train": 24, "validation": 7, "test": 3}
    assert manifest.classes == ("Pushing something left", "Pushing something right", "Lifting something")
    fs, root = storage.open_storage(packed)
    source = read_layout(folder)
    for split, videos in source.splits.items():
        index = shards.read_index(fs, root, split, manifest=manifest)
        by_key = {video.key: video for video in videos}
        assert sorted(index.key) == sorted(by_key)
        for row, key in enumerate(index.key):
            tar = files[index.shards[index.shard[row]]]
            video = tar[index.offset[row] : index.offset[row] + index.size[row]]
            assert video == (folder / by_key[key].path).read_bytes()
            assert index.label[row] == (-1 if by_key[key].label is None else by_key[key].label)
            assert (index.width[row], index.height[row]) == (128, 96)
    assert check(packed) == []


@pytest.mark.s3
@pytest.mark.ray
def test_shards_are_what_the_manifest_says_and_within_the_bound(packed):
    files = contents(packed)
    manifest = shards.parse_record(shards.Manifest, files["manifest.json"], "")
    listed = [shard for info in manifest.splits.values() for shard in info.shards]
    assert {shard.name for shard in listed} == {name for name in files if name.endswith(".tar")}
    for shard in listed:
        assert len(files[shard.name]) == shard.bytes <= SHARD
        assert hashlib.sha256(files[shard.name]).hexdigest() == shard.sha256


@pytest.mark.s3
@pytest.mark.ray
def test_a_finished_set_is_left_alone(packed, folder):
    before = contents(packed)
    again = pack(folder, packed)
    assert (again.written, again.already) == (0, True)
    assert "nothing written" in next(again.lines(packed))
    assert contents(packed) == before


@pytest.mark.s3
@pytest.mark.ray
def test_another_set_is_not_written_over(packed, folder):
    with pytest.raises(DataError, match=r"holds another packed set .*give another URL"):
        prepare(folder, packed, OTHER)


@pytest.mark.s3
@pytest.mark.ray
def test_an_interrupted_run_continues_to_the_same_bytes(packed, folder, tmp_path):
    """What a crash leaves: some records, a tar without one, a tar that is cut off, no manifest."""
    whole = contents(packed)
    names = sorted(name for name in whole if name.endswith(".tar"))
    for name, content in whole.items():
        if name.endswith(".tar") or name.replace(".json", ".tar") in names:
            (tmp_path / name).write_bytes(content)
    (tmp_path / shards.record_name(names[0])).unlink()
    (tmp_path / names[1]).write_bytes(whole[names[1]][:1000])
    (tmp_path / names[2]).unlink()
    (tmp_path / shards.record_name(names[2])).unlink()
    seen = []
    done = packing.pack(prepare(folder, str(tmp_path)), on_progress=lambda p: seen.append((p.videos, p.line())))
    assert (done.written, done.kept, done.already) == (3, len(names) - 3, False)
    assert contents(str(tmp_path)) == whole
    assert seen[-1][0] == 34
    assert "34/34 videos (100 %)" in seen[-1][1]


@pytest.mark.s3
@pytest.mark.ray
def test_leftovers_of_another_plan_are_named(packed, folder, tmp_path):
    record = "train-00000.json"
    (tmp_path / record).write_bytes(contents(packed)[record])
    with pytest.raises(DataError, match=rf"holds {record} of an interrupted run over another source or with other options"):
        prepare(folder, str(tmp_path), OTHER)
    (tmp_path / record).rename(tmp_path / "other-00099.tar")
    with pytest.raises(DataError, match=r"holds other-00099.tar, part of another packed set"):
        prepare(folder, str(tmp_path))


@pytest.mark.ray
def test_videos_that_do_not_decode_are_left_out_named_and_counted(ray_cluster, own_folder, tmp_path):
    videos = own_folder / "20bn-something-something-v2"
    (videos / "1001.webm").write_bytes(b"no video")
    whole = (videos / "1002.webm").read_bytes()
    (videos / "1002.webm").write_bytes(whole[: len(whole) // 2])
    (videos / "1003.webm").write_bytes(b"")
    url = str(tmp_path / "set")
    done = pack(own_folder, url)
    assert done.manifest.quarantined == 3
    assert done.manifest.splits["train"].samples == 21
    found = json.loads((tmp_path / "set/quarantine.json").read_text())["videos"]
    assert {(v["split"], v["key"], v["path"]) for v in found} == {
        ("train", str(n), f"20bn-something-something-v2/{n}.webm") for n in (1001, 1002, 1003)
    }
    assert all(video["reason"] for video in found)
    assert "cut off" in next(video["reason"] for video in found if video["key"] == "1002")
    assert list(done.lines("u"))[-1] == "3 videos left out, see u/quarantine.json"
    assert check(url) == []
    assert pack(own_folder, url).already


@pytest.mark.ray
def test_a_shard_without_a_readable_video_is_no_shard(ray_cluster, tmp_path):
    folder = make_ucf101(tmp_path / "source")
    (folder / "Archery/v_Archery_g01_c01.avi").write_bytes(bytes(2 * SHARD))
    url = str(tmp_path / "set")
    manifest = pack(folder, url).manifest
    train = manifest.splits["train"]
    assert (train.samples, manifest.quarantined) == (3, 1)
    empty = {f"train-{n:05d}.tar" for n in range(len(train.shards) + 1)} - {shard.name for shard in train.shards}
    assert len(empty) == 1
    assert not (tmp_path / "set" / empty.pop()).exists()
    assert check(url) == []
    (tmp_path / "set/manifest.json").unlink()
    again = pack(folder, url)
    assert (again.written, again.already, again.manifest) == (0, False, manifest)


@pytest.mark.ray
def test_a_split_of_which_nothing_decodes(ray_cluster, tmp_path):
    folder = make_ucf101(tmp_path / "source")
    for name in ("Archery", "Yoga"):
        (folder / f"{name}/v_{name}_g03_c01.avi").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"no video of split 'validation' decodes; the first one, .*g03_c01.avi: "):
        pack(folder, str(tmp_path / "set"))
    assert not (tmp_path / "set/manifest.json").exists()


@pytest.mark.ray
def test_a_source_that_changes_or_cannot_be_seen(ray_cluster, tmp_path):
    folder = make_ucf101(tmp_path / "source")
    video = folder / "Archery/v_Archery_g01_c01.avi"
    for number, (change, words) in enumerate(
        (
            (lambda: video.write_bytes(make_video(30, suffix="avi")), "bytes when packing began and has"),
            (video.unlink, "was there when packing began, and is gone"),
            (lambda: folder.rename(tmp_path / "moved"), "cannot see the source folder .* mounts under this path"),
        )
    ):
        ready = prepare(folder, str(tmp_path / f"set-{number}")) if video.exists() else ready
        change()
        with pytest.raises(DataError, match=words):
            packing.pack(ready)


@pytest.mark.s3
@pytest.mark.ray
def test_a_task_that_cannot_reach_the_bucket_says_so(ray_cluster, s3, folder):
    ready = prepare(folder, s3.url("x"))
    with pytest.raises(DataError, match=r"a Ray task failed: .*no-such-bucket.*give the same command again to continue"):
        packing.pack(replace(ready, place="s3://no-such-bucket/x"))
