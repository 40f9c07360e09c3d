"""`python -m jobs.pack` as a person runs it, killed in the middle, and given bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs import cli, pack
from tests.support import REPO, make_ucf101, many_videos, run_job
from vidfuse.config import ConfigError, TranscodeConfig
from vidfuse.data.layouts import read_layout
from vidfuse.data.shards import DataError
from vidfuse.on_ray import packing, storage
from vidfuse.on_ray.storage import StorageError

SHARD = 64_000


def contents(url: str) -> dict[str, bytes]:
    fs, root = storage.open_storage(url)
    return {name: storage.read_bytes(fs, storage.join(root, name)) for name in storage.list_files(fs, root)}


def names(url: str) -> list[str]:
    return list(storage.list_files(*storage.open_storage(url)))


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.parametrize(
    ("count", "form"), [(220, None), pytest.param(60, TranscodeConfig(short_side=64, fps=6), marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_and_given_again(s3, ray_cluster, tmp_path, count, form):
    """SIGKILL while shards are written; the same command then gives the bytes of a run that was never disturbed."""
    folder = many_videos(tmp_path / "source", count)
    unbroken, broken = s3.url("unbroken"), s3.url("broken")
    packing.pack(packing.prepare(read_layout(folder), folder, unbroken, SHARD, form))
    arguments = ["--transcode", "--short-side", "64", "--fps", "6"] if form else []
    whole = contents(unbroken)
    shards = sum(name.endswith(".tar") for name in whole)
    assert shards > count // 5
    # On a cluster of two CPUs that is there already: start-up is short, and a killed driver leaves its cluster in order.
    command = [sys.executable, "-m", "jobs.pack", str(folder), broken, "--shard-bytes", str(SHARD), *arguments]
    program = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, "RAY_ADDRESS": ray_cluster}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while sum(name.endswith(".json") for name in names(broken)) < 2:
        assert program.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    time.sleep(1)  # what was under way ends or dies
    left = names(broken)
    assert "manifest.json" not in left
    assert sum(name.endswith(".tar") for name in left) < shards
    again = run_job("pack", str(folder), broken, "--shard-bytes", str(SHARD), *arguments, RAY_ADDRESS=ray_cluster)
    assert again.returncode == 0, again.stderr
    kept = sum(name.endswith(".json") for name in left)
    assert f"continued: {kept} shards were there, {shards - kept} written" in again.stdout
    assert contents(broken) == whole


@pytest.mark.ray
def test_the_command_by_itself(tmp_path, monkeypatch, capsys):
    """Without a cluster: it starts its own; then, with nothing left to do, it starts none."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = make_ucf101(tmp_path / "source")
    (folder / "Archery/v_Archery_g01_c01.avi").write_bytes(b"nothing")
    (folder / "Archery/v_Archery_g09_c01.avi").write_bytes(b"in no list")
    url = str(tmp_path / "set")
    first = run_job("pack", str(folder), url)
    assert first.returncode == 0, first.stderr
    assert "read as ucf101: 4 train, 2 validation videos of " in first.stdout
    assert "train: 3 videos in 1 shards" in first.stdout
    assert "validation: 2 videos in 1 shards" in first.stdout
    assert f"1 videos left out, see {url}/quarantine.json" in first.stdout
    assert "1 videos of the folder are in no list" in first.stdout
    assert "6/6 videos (100 %)" in first.stdout
    before = {file: file.stat().st_mtime_ns for file in Path(url).iterdir()}
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("nothing is left to do"))
    assert pack.main([str(folder), url]) == 0
    assert "nothing written" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in Path(url).iterdir()} == before


@pytest.fixture
def source(tmp_path, monkeypatch) -> str:
    """A small data set; and no Ray may start."""
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("bad input has to be met before Ray starts"))
    return str(make_ucf101(tmp_path / "source"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{source}/nowhere", "set"], "there is no such folder"),
        (["", "set"], "SOURCE is empty; give the folder"),
        (["s3://bucket/videos", "set"], "SOURCE has to be a folder; mount the bucket .* or copy the videos"),
        (["s3:/bucket/videos", "set"], "SOURCE has to be a folder"),
        (["{source}/Yoga", "set"], "no annotations; a folder is needed that holds"),
        (["{source}", "set", "--layout", "ssv2"], "no labels/labels.json"),
        (["{source}", "set", "--split-number", "7"], "--split-number 7: .*less than or equal to 3"),
        (["{source}", "set", "--split-number", "2"], "trainlist02.txt: there is no such list"),
        (["{source}", "set", "--shard-bytes", "many"], "such as 256000000, 256MB or 1GiB"),
        (["{source}", "set", "--allow-missing", "2"], "--allow-missing 2: .* less than 1. Share of a list"),
        (["{source}", "set", "--short-side", "240"], "--short-side is for --transcode"),
        (["{source}", "set", "--transcode", "--gop", "0"], "--gop 0: .*greater than or equal to 1"),
        (
            ["{source}", "set", "--layout", "imagenet"],
            "--layout imagenet: .*'ssv2', 'ucf101', 'hmdb51', 'kinetics', 'list' or 'tree'",
        ),
        (["{source}", "set", "--shard-bytes", "1KB"], "at least 64000"),
    ],
)
def test_bad_sources(source, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=words):
        pack.main([argument.format(source=source) for argument in arguments])
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("url", "words"),
    [("s3://", "there is no bucket"), ("http://x/y", "http:// is not known"), ("/proc/nowhere", "cannot be written")],
)
def test_bad_places(source, url, words):
    with pytest.raises(StorageError, match=words):
        pack.main([source, url])


@pytest.mark.s3
def test_a_bucket_that_does_not_exist(source, s3):
    result = run_job("pack", source, "s3://no-such-bucket/x")
    assert result.returncode == 2
    assert "error: s3://no-such-bucket/x at" in result.stderr
    assert "the bucket 'no-such-bucket' does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert s3.key not in result.stderr + result.stdout


@pytest.mark.s3
def test_wrong_credentials(source, s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(StorageError, match="the credentials are refused") as error:
        pack.main([source, s3.url()])
    assert "not-the-secret" not in str(error.value)


def test_unknown_options_end_with_2(source):
    for arguments in ([], [source], [source, "set", "--no-such-option"], [source, "set", "--layout"]):
        with pytest.raises(SystemExit) as end:
            pack.main(arguments)
        assert end.value.code == 2
