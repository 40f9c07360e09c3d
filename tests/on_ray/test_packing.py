"""Packing on a real Ray cluster and a real S3 server: what is planned, what is left out, what is continued."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.proxy import proxy
from tests.support import REPO, decoding_dies, make_ssv2, make_ucf101, make_video, write_json
from vidfuse.config import LayoutConfig, TranscodeConfig
from vidfuse.data import shards
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError
from vidfuse.on_ray import packing, storage
from vidfuse.on_ray.checking import check
from vidfuse.on_ray.shard_writing import ShardJob, complete_shard, write_shard
from vidfuse.on_ray.storage import StorageError
from vidfuse.on_ray.tasks import Board, Progress, run_tasks

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
    source, found = read_layout(folder), metas(packed)
    assert any(len(video.placeholders) > 0 for video in source.splits["train"])
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
            assert (found[key][1].text, found[key][1].placeholders) == (by_key[key].text, by_key[key].placeholders)
    assert check(packed, "frames") == []


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
    lines = list(again.lines(packed))
    assert "nothing written" in lines[0]
    assert lines[-1] == f"version {again.manifest.version}"
    assert contents(packed) == before


@pytest.mark.ray
def test_copies_in_two_splits_are_told(ray_cluster, own_folder, tmp_path):
    """They have names of their own, and are no links: nothing shows them before their bytes are read."""
    clip = next(
        path for path in own_folder.rglob("*.webm") if path.stem in {v.key for v in read_layout(own_folder).splits["train"]}
    )
    other = next(v for v in read_layout(own_folder).splits["validation"])
    (own_folder / other.path).write_bytes(clip.read_bytes())
    done = pack(own_folder, str(tmp_path / "set"))
    assert done.copies == ((f"train/{clip.stem}", f"validation/{other.key}"),)
    assert any(
        line.startswith(f"1 videos are in two splits with the same bytes, under two names: train/{clip.stem} = ")
        for line in done.lines("")
    )
    assert pack(own_folder, str(tmp_path / "set")).copies == ()


@pytest.mark.s3
@pytest.mark.ray
def test_another_set_is_not_written_over(packed, folder):
    with pytest.raises(
        DataError, match=r"holds another packed set .*version [0-9a-f]{16}.* is never changed: give another URL"
    ):
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


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.ray
@pytest.mark.parametrize("form", [None, TranscodeConfig(short_side=64)])
def test_a_finished_set_that_lost_files_is_repaired_to_the_same_bytes(ray_cluster, folder, tmp_path, form):
    place, url = tmp_path / "set", str(tmp_path / "set")

    def again() -> packing.Packed:
        return packing.pack(packing.prepare(read_layout(folder), folder, url, SHARD, form))

    manifest, whole = again().manifest, contents(url)
    written = (place / "manifest.json").stat().st_mtime_ns
    (place / "train-00000.tar").unlink()
    (place / "train-00001.tar").write_bytes(whole["train-00001.tar"][:-512])
    (place / "test-00000.json").unlink()
    flip_byte(place / "train.index.parquet")
    (place / "validation.index.parquet").unlink()
    (place / "quarantine.json").unlink()
    lost = ("train-00000.tar", "train-00001.tar", "test-00000.json", "train.index.parquet", "validation.index.parquet")
    done = again()
    assert sorted(done.repaired) == sorted((*lost, "quarantine.json"))
    assert (done.written, done.already, done.manifest) == (3, False, manifest)
    assert next(done.lines(url)).startswith("repaired: ") and "train-00000.tar" in next(done.lines(url))
    assert contents(url) == whole
    assert (place / "manifest.json").stat().st_mtime_ns == written
    assert check(url) == [] and again().already
    flip_byte(place / "train-00002.tar")
    assert check(url)[0].endswith("remove it and pack the set again")
    (place / "train-00002.tar").unlink()
    assert again().repaired == ("train-00002.tar",)
    assert contents(url) == whole


@pytest.mark.s3
@pytest.mark.ray
def test_a_finished_set_in_a_bucket_is_repaired(s3, ray_cluster, folder):
    url = s3.url("lost")
    pack(folder, url)
    whole = contents(url)
    fs, root = storage.open_storage(url)
    for name in ("train-00000.tar", "validation.index.parquet"):
        storage.delete(fs, storage.join(root, name))
    assert pack(folder, url).repaired == ("train-00000.tar", "validation.index.parquet")
    assert contents(url) == whole


@pytest.mark.ray
def test_what_would_not_come_out_as_it_was_is_not_written(ray_cluster, own_folder, tmp_path):
    place, url = tmp_path / "set", str(tmp_path / "set")
    pack(own_folder, url)
    record = shards.parse_record(shards.ShardRecord, (place / "train-00000.json").read_bytes(), "")
    flip_byte(own_folder / f"20bn-something-something-v2/{record.samples[0].key}.webm")
    (place / "train-00000.tar").unlink()
    before = contents(url)
    with pytest.raises(DataError, match=r"train-00000.tar would not be the one that the manifest names .*was not written: its"):
        pack(own_folder, url)
    assert contents(url) == before
    (place / "train-00000.json").write_text("{}")
    with pytest.raises(DataError, match=r"train-00000.json: not a ShardRecord: .*; remove the file, and give the same command"):
        prepare(own_folder, url)


@pytest.mark.ray
def test_an_index_that_another_pyarrow_wrote_is_not_replaced(ray_cluster, own_folder, tmp_path):
    place, url = tmp_path / "set", str(tmp_path / "set")
    pack(own_folder, url)
    text = (place / "manifest.json").read_text()
    digest = shards.parse_record(shards.Manifest, text.encode(), "").splits["train"].index_sha256
    (place / "manifest.json").write_text(text.replace(digest, "0" * 64))
    before = contents(url)
    with pytest.raises(DataError, match=r"train.index.parquet would not be the one .* another version of pyarrow"):
        pack(own_folder, url)
    assert contents(url) == before


@pytest.mark.ray
def test_shards_that_a_continued_run_keeps_are_verified(ray_cluster, folder, tmp_path):
    place, url = tmp_path / "set", str(tmp_path / "set")
    pack(folder, url)
    whole = contents(url)
    (place / "manifest.json").unlink()
    flip_byte(place / "train-00001.tar")
    done = pack(folder, url)
    assert (done.written, done.kept) == (1, sum(name.endswith(".tar") for name in whole) - 1)
    assert contents(url) == whole


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
    assert "3 videos left out, see u/quarantine.json" in done.lines("u")
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
            (lambda: folder.rename(tmp_path / "moved"), "cannot see the source folder .* mounts under this path"),
        )
    ):
        if video.exists():
            ready = prepare(folder, str(tmp_path / f"set-{number}"))
        change()
        with pytest.raises(DataError, match=words):
            packing.pack(ready)


@pytest.mark.ray
def test_files_that_cannot_be_read_are_left_out_and_tried_again(ray_cluster, own_folder, tmp_path):
    """A file that becomes a folder and one that goes, after the planning; the others are packed."""
    videos, url = own_folder / "20bn-something-something-v2", str(tmp_path / "set")
    ready = prepare(own_folder, url)
    for key in ("1001", "1002"):
        (videos / f"{key}.webm").rename(videos / f"{key}.elsewhere")
    (videos / "1001.webm").mkdir()
    done = packing.pack(ready)
    assert (done.manifest.quarantined, done.manifest.splits["train"].samples) == (2, 22)
    reasons = {video["key"]: video["reason"] for video in json.loads((tmp_path / "set/quarantine.json").read_text())["videos"]}
    assert reasons == {
        "1001": "the file cannot be read: Is a directory",
        "1002": "the file cannot be read: No such file or directory",
    }
    assert check(url) == []
    (videos / "1001.webm").rmdir()
    for key in ("1001", "1002"):
        (videos / f"{key}.elsewhere").rename(videos / f"{key}.webm")
    (tmp_path / "set/manifest.json").unlink()
    assert pack(own_folder, url).manifest.quarantined == 0, "what could not be read is tried again when packing continues"


@pytest.mark.parametrize(("number", "left_out"), [(errno.EACCES, True), (errno.EIO, True), (errno.ESTALE, False)])
def test_which_errors_concern_one_file(folder, tmp_path, monkeypatch, number, left_out):
    ready = prepare(folder, str(tmp_path / "set"))
    bad, real = ready.plan.shards[0].videos[0].video, Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == Path(bad.path).name:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    if not left_out:
        with pytest.raises(OSError, match=os.strerror(number)):
            write_shard(job_of(ready), ready.plan.shards[0])
        return
    record = write_shard(job_of(ready), ready.plan.shards[0])
    assert [(video.key, video.reason) for video in record.quarantined] == [
        (bad.key, f"the file cannot be read: {os.strerror(number)}")
    ]


def test_a_source_that_is_not_mounted(folder, tmp_path):
    """Its empty folder may be there; its videos are not left out."""
    ready = prepare(folder, str(tmp_path / "set"))
    (tmp_path / "mount").mkdir()
    job = replace(job_of(ready), folder=str(tmp_path / "mount"))
    with pytest.raises(DataError, match=r"cannot see the source folder .* mounts under this path"):
        write_shard(job, ready.plan.shards[0])


@pytest.mark.s3
@pytest.mark.ray
def test_a_task_that_cannot_reach_the_bucket_says_so(ray_cluster, s3, folder):
    ready = prepare(folder, s3.url("x"))
    with pytest.raises(DataError, match=r"a Ray task failed: .*no-such-bucket.*give the same command again to continue"):
        packing.pack(replace(ready, place="s3://no-such-bucket/x"))


# --- transcoding ---


def metas(url: str) -> dict[str, tuple[str, shards.SampleMeta, bytes]]:
    """Suffix, meta data and bytes of each video of a set, by key."""
    found = {}
    for name, content in contents(url).items():
        if name.endswith(".tar"):
            with tarfile.open(fileobj=io.BytesIO(content)) as tar:
                files = {member.name: tar.extractfile(member).read() for member in tar}
            for file in files:
                key, _, suffix = file.partition(".")
                if suffix != "json":
                    meta = shards.parse_record(shards.SampleMeta, files[f"{key}.json"], "")
                    found[key] = (suffix, meta, files[file])
    return found


@pytest.mark.ray
def test_a_transcoded_set_says_how_it_was_made(ray_cluster, own_folder, tmp_path):
    """Videos in the form already are copied; broken ones are left out by key."""
    form = TranscodeConfig(short_side=64, gop=6)
    videos = own_folder / "20bn-something-something-v2"
    in_form = make_video(9, width=128, height=64, options={"g": "6"})
    (videos / "1001.webm").unlink()
    (videos / "1001.mp4").write_bytes(in_form)
    (videos / "1002.webm").write_bytes((videos / "1002.webm").read_bytes()[:900])
    url = str(tmp_path / "set")
    packing.pack(packing.prepare(read_layout(own_folder), own_folder, url, SHARD, form))
    fs, root = storage.open_storage(url)
    manifest = shards.read_manifest(fs, root)
    assert manifest.recipe.transcode == form
    assert (manifest.quarantined, manifest.splits["train"].samples) == (1, 23)
    found = metas(url)
    assert found["1001"][1].source_sha256 is None and found["1001"][2] == in_form
    sources = {path.stem: path for path in videos.iterdir()}
    for key, (suffix, meta, content) in found.items():
        assert (suffix, meta.height, meta.sha256) == ("mp4", 64, hashlib.sha256(content).hexdigest())
        if key != "1001":
            assert meta.source_sha256 == hashlib.sha256(sources[key].read_bytes()).hexdigest()
    assert check(url, "frames") == []
    other = manifest.recipe.model_copy(update={"transcode": TranscodeConfig(short_side=64, gop=5)})
    (tmp_path / "set/manifest.json").write_bytes(shards.dump_record(manifest.model_copy(update={"recipe": other})))
    assert len([fault for fault in check(url, "frames") if "not in the form that the manifest says" in fault]) > 20
    (tmp_path / "set/manifest.json").write_bytes(shards.dump_record(manifest))
    with pytest.raises(DataError, match="of another source or other options"):
        prepare(own_folder, url)


# --- left out, and no room ---


@pytest.mark.ray
def test_listed_videos_that_are_not_there_are_in_the_quarantine(ray_cluster, own_folder, tmp_path):
    entries = json.loads((own_folder / "labels/train.json").read_text())
    write_json(own_folder / "labels/train.json", [*entries, {**entries[0], "id": "7"}])
    source = read_layout(own_folder, options=LayoutConfig(allow_missing=0.1))
    done = packing.pack(packing.prepare(source, own_folder, str(tmp_path / "set"), SHARD))
    assert done.manifest.quarantined == 1
    (left_out,) = json.loads((tmp_path / "set/quarantine.json").read_text())["videos"]
    assert left_out == {"split": "train", "key": "7", "path": "7", "reason": "not in the source folder"}
    assert check(str(tmp_path / "set")) == []


def job_of(ready: packing.Packing) -> ShardJob:
    return ShardJob(ready.place, str(ready.folder), ready.plan.digest, ready.plan.recipe.transcode)


def test_a_disk_that_is_too_small_is_told_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(DataError, match=r"GB are to be written, 0.0 GB are free; free some, or give another URL"):
        prepare(folder, str(tmp_path / "set"))


@pytest.mark.ray
def test_a_disk_that_fills_up_in_the_middle(ray_cluster, folder, tmp_path, monkeypatch):
    """What is written stays; with room again the same command goes on."""
    ready = prepare(folder, str(tmp_path / "set"))
    write_shard(job_of(ready), ready.plan.shards[0])
    real = os.fsync

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"set: no room left; free some or raise the quota, .*it continues, what is written stays"
    ):
        write_shard(job_of(ready), ready.plan.shards[1])
    monkeypatch.setattr(os, "fsync", real)
    assert sorted(file.name for file in (tmp_path / "set").iterdir()) == [
        shards.record_name(ready.plan.shards[0].name), ready.plan.shards[0].name,
    ]  # fmt: skip
    done = pack(folder, str(tmp_path / "set"))
    assert (done.kept, done.written) == (1, len(ready.plan.shards) - 1)


def test_a_scratch_folder_that_is_full(folder, tmp_path, monkeypatch):
    ready = prepare(folder, str(tmp_path / "set"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vidfuse.data.tars.write_shard", full)
    with pytest.raises(StorageError, match=r"the scratch folder .* of .*: no room left; free some \(or set TMPDIR\)"):
        write_shard(job_of(ready), ready.plan.shards[0])


def test_what_a_kill_leaves_is_removed_by_the_next_run(folder, tmp_path, monkeypatch):
    """A scratch folder whose process is dead; that of a process that lives stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    hold = "from vidfuse.on_ray.shard_writing import _scratch\nwith _scratch() as s: print(s, flush=True); input()"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(REPO)}
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    alive, killed = (subprocess.Popen([sys.executable, "-c", hold], **options) for _ in range(2))
    kept, left = (Path(program.stdout.readline().strip()) for program in (alive, killed))
    killed.kill()
    killed.communicate()
    assert kept.is_dir() and left.is_dir()
    ready = prepare(folder, str(tmp_path / "set"))
    complete_shard(job_of(ready), ready.plan.shards[0], None, None)
    assert list((tmp_path / "tmp").iterdir()) == [kept]
    alive.communicate("")
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.ray
def test_partial_files_of_the_set_are_removed(ray_cluster, folder, tmp_path):
    place = tmp_path / "set"
    place.mkdir()
    for name in ("train-00000.tar", "train.index.parquet", "other"):
        (place / f".{name}.{'0' * 32}").write_bytes(b"cut off")
    pack(folder, str(place))
    assert [file.name for file in place.glob(".*")] == [f".other.{'0' * 32}"]


@pytest.mark.s3
@pytest.mark.parametrize("status", ["403", "507"])
def test_a_bucket_that_is_full(s3, folder, monkeypatch, status):
    ready = prepare(folder, s3.url("full"))
    with proxy(s3.endpoint) as faulty:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faulty.endpoint)
        faulty.faults.share, faulty.faults.kinds, faulty.faults.only = 1.0, (status,), ("PUT", ".tar")
        with pytest.raises(
            StorageError, match=r"full-.*: no room left; free some or raise the quota, and give the same command"
        ):
            write_shard(job_of(ready), ready.plan.shards[0])
        faulty.faults.share = 0.0
        assert contents(ready.place) == {}


def test_a_video_that_crashes_the_decoder_is_left_out_alone(folder, tmp_path):
    ready = prepare(folder, str(tmp_path / "set"))
    plan = ready.plan.shards[0]
    bad = plan.videos[1].video
    content = (folder / bad.path).read_bytes()
    with decoding_dies(content, signal.SIGSEGV):
        record = write_shard(job_of(ready), plan)
    assert [(video.key, video.reason) for video in record.quarantined] == [(bad.key, "the decoder crashed (signal 11)")]
    assert [row.key for row in record.samples] == [planned.video.key for planned in plan.videos if planned.video != bad]
    with (
        decoding_dies(content, signal.SIGKILL),
        pytest.raises(OSError, match=r"killed \(crashed \(signal 9\)\): no memory is left there"),
    ):
        write_shard(job_of(ready), plan)


@pytest.mark.ray
def test_a_worker_that_dies_each_time_names_its_shard(ray_cluster, tmp_path):
    def work(name: str) -> None:
        with (tmp_path / "tries").open("a") as file:
            file.write(f"{name}\n")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match=r"^a.tar: the process .* died, after 3 retries, too .* give the same command again"):
        list(run_tasks(work, [("a",)], names=["a.tar"]))
    assert (tmp_path / "tries").read_text() == "a\n" * 4


# --- how far it is ---


def test_progress_in_words():
    progress = Progress(1000, 10, bytes=100, videos=1, bytes_before=100, quarantined=2)
    assert progress.line().endswith(", 2 left out, eta unknown")
    progress.started -= 10
    more = progress.with_more(4, 100)
    assert more.line() == "5/10 videos (20 %), 0.0 MB/s, 2 left out, eta 1 min 20 s"
    assert (progress.videos, progress.bytes) == (1, 100)
    progress.bytes_total = 10**6
    assert progress.with_more(4, 100).line().endswith("eta 27 h 46 min")


@pytest.mark.ray
def test_units_that_are_under_way_are_counted(ray_cluster):
    import time

    import ray

    board = Board.remote()
    assert ray.get(board.total.remote()) == (0, 0)

    def work(name: str) -> str:
        for number in range(1, 11):
            board.note.remote(name, number, 10 * number)
            time.sleep(0.1)
        return name

    seen = []
    ended = list(
        run_tasks(work, [("a",), ("b",)], on_wait=lambda: seen.append(ray.get(board.total.remote())), wait_seconds=0.1)
    )
    assert sorted(ended) == [(0, "a"), (1, "b")]
    assert seen == sorted(seen) and any(0 < videos < 20 and size == 10 * videos for videos, size in seen)
    ray.get([board.forget.remote("a"), board.forget.remote("b")])
    assert ray.get(board.total.remote()) == (0, 0)
