"""`python -m jobs.check`: each kind of fault is made in a packed set, found, and nothing else with it."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import signal
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs as pafs

from jobs import check, cli
from tests.support import decoding_dies, make_ssv2, make_video, run_job
from vidfuse.data import shards, tars
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError, SampleMeta, ShardRecord
from vidfuse.on_ray import checking, packing, tasks
from vidfuse.on_ray.storage import StorageError

pytestmark = pytest.mark.ray
FIRST, SECOND = "train-00000.tar", "train-00001.tar"
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, ray_cluster) -> Path:
    folder = make_ssv2(tmp_path_factory.mktemp("source"), {"train": 20, "validation": 4})
    url = tmp_path_factory.mktemp("set")
    packing.pack(packing.prepare(read_layout(folder), folder, str(url), 64_000))
    return url


@pytest.fixture
def packed(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "set")
    return tmp_path / "set"


def faults(packed: Path, depth: checking.Depth = "bytes") -> list[str]:
    return checking.check(str(packed), depth)


def manifest_of(packed: Path) -> shards.Manifest:
    return shards.read_manifest(pafs.LocalFileSystem(), str(packed))


def members(packed: Path, shard: str = FIRST) -> Members:
    with tarfile.open(packed / shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def put(packed: Path, content: Members, shard: str = FIRST, *, index: bool = True) -> None:
    """Replace a shard, and make the manifest and the index agree with it, so that only the fault itself is left."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (packed / shard).write_bytes(out.getvalue())
    try:
        samples = len(tars.index_rows(io.BytesIO(out.getvalue())))
    except DataError:
        samples = None
    agree(packed, shard, samples, index=index)


def agree(packed: Path, shard: str, samples: int | None, *, index: bool = True) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    train = manifest["splits"]["train"]
    entry = next(entry for entry in train["shards"] if entry["name"] == shard)
    tar = (packed / shard).read_bytes()
    entry |= {"bytes": len(tar), "sha256": hashlib.sha256(tar).hexdigest(), "samples": samples or entry["samples"]}
    train["bytes"] = sum(entry["bytes"] for entry in train["shards"])
    train["samples"] = sum(entry["samples"] for entry in train["shards"])
    if index and samples:
        train["index_sha256"] = write_index(packed, [entry["name"] for entry in train["shards"]])
    (packed / "manifest.json").write_text(json.dumps(manifest))


def write_index(packed: Path, names: list[str]) -> str:
    rows = [(name, tars.index_rows(io.BytesIO((packed / name).read_bytes()))) for name in names]
    records = [ShardRecord(name=n, plan="", bytes=0, sha256="", samples=r, quarantined=()) for n, r in rows]
    content = shards.encode_index(records)
    (packed / "train.index.parquet").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def change_manifest(packed: Path, change: Any) -> None:
    manifest = json.loads((packed / "manifest.json").read_text())
    change(manifest)
    (packed / "manifest.json").write_text(json.dumps(manifest))


def key_of(content: Members, number: int = 0) -> str:
    return content[2 * number][0].partition(".")[0]


def with_meta(content: Members, number: int, **changes: Any) -> Members:
    name, data = content[2 * number + 1]
    meta = shards.parse_record(SampleMeta, data, "").model_copy(update=changes)
    return [*content[: 2 * number + 1], (name, meta.model_dump_json().encode()), *content[2 * number + 2 :]]


def test_a_whole_set_has_no_faults(packed):
    assert faults(packed) == []
    put(packed, members(packed))
    assert faults(packed) == [], "the helper itself makes no faults"


def test_three_depths(packed):
    assert faults(packed, "files") == faults(packed, "frames") == []
    tar = (packed / FIRST).read_bytes()
    (packed / FIRST).write_bytes(tar[:-1])
    assert faults(packed, "files") == [f"{FIRST}: {len(tar) - 1} bytes, the manifest says {len(tar)}"]
    (packed / FIRST).write_bytes(tar[:-1] + b"x")
    assert faults(packed, "files") == []
    assert faults(packed)[0] == f"{FIRST}: altered, its sha256 is not the manifest's; remove it and pack the set again"
    (packed / FIRST).unlink()
    assert faults(packed, "files") == faults(packed) == [f"{FIRST}: missing"]


def test_a_sample_that_is_not_the_one_of_the_index(packed):
    """Shard and json agree with each other: the index has the hash of each sample, too."""
    content = members(packed)
    other = content[0][1][:-1] + bytes([content[0][1][-1] ^ 1])
    content[0] = (content[0][0], other)
    put(packed, with_meta(content, 0, sha256=hashlib.sha256(other).hexdigest()), index=False)
    assert faults(packed) == [f"{FIRST}/{key_of(content)}: index wrong in sha256"]


def test_a_truncated_shard(packed):
    tar = (packed / FIRST).read_bytes()
    (packed / FIRST).write_bytes(tar[: len(tar) // 2])
    found = faults(packed)
    assert found[0] == f"{FIRST}: truncated, {len(tar) // 2} of {len(tar)} bytes are there"
    assert any("the tar is cut off at byte" in fault for fault in found)


def test_an_altered_shard_names_the_video(packed):
    content, tar = members(packed), bytearray((packed / FIRST).read_bytes())
    start = bytes(tar).index(content[2][1])
    tar[start + len(content[2][1]) // 2] ^= 255
    (packed / FIRST).write_bytes(tar)
    key = key_of(content, 1)
    assert faults(packed) == [
        f"{FIRST}: altered, its sha256 is not the manifest's; remove it and pack the set again",
        f"{FIRST}/{key}: the video's bytes are altered, their sha256 is not that of its json",
    ]


def test_an_altered_header(packed):
    content, tar = members(packed), (packed / FIRST).read_bytes()
    start = tar.index(content[2][0].encode())
    (packed / FIRST).write_bytes(tar[:start] + b"X" + tar[start + 1 :])
    found = faults(packed)
    assert found[0] == f"{FIRST}: altered, its sha256 is not the manifest's; remove it and pack the set again"
    assert f"{FIRST}: damaged tar header at byte {start}: bad checksum" in found


def test_a_video_without_its_json_and_the_other_way_round(packed):
    content = members(packed)
    key = key_of(content, 1)
    put(packed, content[:3] + content[4:])
    suffix = content[2][0].partition(".")[2]
    assert f"{FIRST}/{key}: missing member, {suffix} without json" in faults(packed)
    put(packed, content[:2] + content[3:])
    assert f"{FIRST}/{key}: missing member, json without a video" in faults(packed)
    put(packed, content[:-1])
    assert any(
        fault.startswith(f"{FIRST}/{key_of(content, len(content) // 2 - 1)}: missing member") for fault in faults(packed)
    )


def test_a_duplicate_key(packed):
    content = members(packed)
    put(packed, [*content, *content[:2]])
    found = faults(packed)
    assert f"{FIRST}/{key_of(content)}: duplicate key" in found


def test_a_duplicate_key_in_another_shard(packed):
    content = members(packed)
    put(packed, [*members(packed, SECOND), *content[:2]], SECOND)
    assert faults(packed) == [f"{SECOND}/{key_of(content)}: duplicate key, also in {FIRST}"]


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_list(packed, label):
    content = members(packed)
    put(packed, with_meta(content, 2, label=label))
    assert faults(packed) == [f"{FIRST}/{key_of(content, 2)}: label {label} outside the list of 3 classes (0 to 2)"]


def test_an_undecodable_video(packed):
    content = members(packed)
    broken = b"no video"
    content[0] = (content[0][0], broken)
    put(packed, with_meta(content, 0, sha256=hashlib.sha256(broken).hexdigest()))
    assert faults(packed) == [], "no video is decoded"
    found = faults(packed, "frames")
    assert len(found) == 1
    assert found[0].startswith(f"{FIRST}/{key_of(content)}: undecodable video: ")


def test_another_video_than_its_json_says(packed):
    content = members(packed)
    other = make_video(5)
    content[0] = (content[0][0], other)
    put(packed, with_meta(content, 0, sha256=hashlib.sha256(other).hexdigest(), frames=6))
    wrong = f"{FIRST}/{key_of(content)}: frames, width, height are 5 x 128 x 96, its json says 6 x 128 x 96"
    assert faults(packed, "frames") == [wrong]


def test_a_json_that_is_none_or_of_another_key(packed):
    content = members(packed)
    name, key = content[1][0], key_of(content)
    put(packed, [content[0], (name, b"{"), *content[2:]])
    assert any(fault.startswith(f"{FIRST}/{key}: not a SampleMeta") for fault in faults(packed))
    put(packed, with_meta(content, 0, key="other"))
    assert f"{FIRST}/{key}: its json has the key other" in faults(packed)


def test_members_that_are_not_allowed(packed):
    content = members(packed)
    put(packed, [*content, ("x.pkl", b"cos\nsystem\n.")])
    assert any("suffix 'pkl' is not allowed" in fault for fault in faults(packed))


def test_sample_counts(packed):
    def more(manifest: dict[str, Any]) -> None:
        manifest["splits"]["train"]["shards"][0]["samples"] += 1
        manifest["splits"]["validation"]["samples"] += 1

    samples = len(members(packed)) // 2
    change_manifest(packed, more)
    found = faults(packed)
    assert "manifest.json: split train says 20 samples, its shards have 21" in found
    assert "manifest.json: split validation says 5 samples, its shards have 4" in found
    assert f"{FIRST}: {samples} whole samples, the manifest says {samples + 1}" in found


def test_a_wrong_index(packed):
    content = members(packed)
    put(packed, content[2:] + content[:2], index=False)
    found = faults(packed)
    assert len(found) == len(content) // 2
    assert f"{FIRST}/{key_of(content)}: index wrong in offset" in found
    put(packed, content[2:], index=False)
    assert faults(packed) == ["train.index.parquet: 20 samples, the manifest says 19; pack the set again"]
    put(
        packed,
        [("z-new.mp4", content[0][1]), ("z-new.json", with_meta(content, 0, key="z-new")[1][1]), *content[2:]],
        index=False,
    )
    found = faults(packed)
    assert f"{FIRST}/{key_of(content)}: in the index, not whole in the shard" in found
    assert f"{FIRST}/z-new: not in the index" in found


def test_an_altered_or_missing_index(packed):
    index = packed / "train.index.parquet"
    index.write_bytes(index.read_bytes() + b"x")
    assert faults(packed) == [
        "train.index.parquet: not the one the manifest names (sha256 differs); pack the set again",
    ]
    index.unlink()
    assert faults(packed)[0].startswith("train.index.parquet: missing")


def test_shards_and_quarantine_that_the_manifest_does_not_know(packed):
    shutil.copy(packed / FIRST, packed / "train-00099.tar")
    (packed / "quarantine.json").unlink()
    assert faults(packed) == ["train-00099.tar: a shard that the manifest does not list", "quarantine.json: missing"]
    video = {"split": "train", "key": "a", "path": "a", "reason": "r"}
    (packed / "quarantine.json").write_text(json.dumps({"videos": [video]}))
    assert "quarantine.json: 1 videos, the manifest says 0" in faults(packed)


def test_progress_is_told_inside_a_shard(packed, monkeypatch):
    noted: list[tuple[str, int, int]] = []
    board = SimpleNamespace(note=SimpleNamespace(remote=lambda *note: noted.append(note)))
    monkeypatch.setattr(tasks, "NOTE_SECONDS", 0.0)
    shard = next(shard for shard in manifest_of(packed).splits["train"].shards if shard.name == FIRST)
    checking._check_shard(str(packed), shard, None, checking.Rules(3, True, None), board)
    sizes = [len(content) for name, content in members(packed) if not name.endswith("json")]
    assert noted == [(FIRST, number, sum(sizes[:number])) for number in range(1, len(sizes) + 1)]
    monkeypatch.setattr(checking, "run_tasks", partial(tasks.run_tasks, wait_seconds=0.001))
    told: list[str] = []
    assert checking.check(str(packed), on_progress=lambda progress: told.append(progress.line())) == []
    assert len(told) > len(list(packed.glob("*.tar"))), "more often than a shard ends"
    assert "24/24 videos (100 %)" in told[-1]


def test_a_video_that_crashes_the_decoder_is_named_and_the_rest_is_checked(packed):
    """A fault of the video; a kill is none, it is told."""
    shard = next(shard for shard in manifest_of(packed).splits["train"].shards if shard.name == FIRST)
    board = SimpleNamespace(note=SimpleNamespace(remote=lambda *_: None))
    name, content = members(packed)[2]
    arguments = (str(packed), shard, None, checking.Rules(3, True, None), board)
    with decoding_dies(content, signal.SIGSEGV):
        report = checking._check_shard(*arguments)
    key = name.partition(".")[0]
    assert report.faults == [f"{FIRST}/{key}: undecodable video: the decoder crashed (signal 11)"]
    assert len(report.keys) == shard.samples > 2
    with decoding_dies(content, signal.SIGKILL), pytest.raises(OSError, match="no memory is left there"):
        checking._check_shard(*arguments)


# --- the command ---


def test_exit_codes(packed, monkeypatch, capsys):
    monkeypatch.setattr(cli, "start_ray", lambda **_: None)
    assert check.main([str(packed)]) == 0
    lines = capsys.readouterr().out.splitlines()
    version = manifest_of(packed).version
    assert (lines[0], lines[-1]) == (f"something-something-v2, version {version}", "whole: 24 samples, 0 left out")
    assert "check  24/24 videos (100 %)" in lines[-2]
    assert check.main([str(packed), "--deep"]) == 0
    (packed / FIRST).unlink()
    (packed / SECOND).unlink()
    capsys.readouterr()
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("names and sizes need no Ray"))
    assert check.main([str(packed), "--quick"]) == 1
    assert capsys.readouterr().out.splitlines()[1:] == [f"{FIRST}: missing", f"{SECOND}: missing", "2 faults in 24 samples"]
    with pytest.raises(SystemExit):
        check.main([str(packed), "--quick", "--deep"])


def test_bad_input(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("bad input has to be met before Ray starts"))
    with pytest.raises(StorageError, match="there is no such folder"):
        check.main([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match=r"no manifest.json in .*python -m jobs.pack SOURCE URL"):
        check.main([str(tmp_path)])


def test_the_command_by_itself(packed, ray_cluster):
    (packed / FIRST).unlink()
    result = run_job("check", str(packed), RAY_ADDRESS=ray_cluster)
    assert result.returncode == 1 and f"{FIRST}: missing" in result.stdout.splitlines(), result.stderr
    result = run_job("check", str(packed.parent))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
