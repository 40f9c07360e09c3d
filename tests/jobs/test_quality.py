"""`python -m jobs.quality`: each flaw is planted in a set of real videos, found, and nothing else with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jobs import cli
from jobs import quality as job
from tests.support import REPO, decoding_dies, make_ssv2, make_video, many_videos, run_job, shared_data, write_json
from vidfuse.config import ConfigError, QualityConfig
from vidfuse.data import decode, pictures, shards, tars
from vidfuse.data.layouts import read_layout
from vidfuse.data.quality import load_table
from vidfuse.data.shards import DataError
from vidfuse.data.survey import Survey
from vidfuse.on_ray import packing, quality, storage, tasks
from vidfuse.on_ray.storage import StorageError

pytestmark = pytest.mark.ray
SHARD = 64_000
CORRUPT = "1003"


def encoded(frames: list[np.ndarray], suffix: str = "mp4") -> bytes:
    height, width = frames[0].shape[:2]
    return pictures.encode(frames, height=height, width=width, fps=12, codec="h264" if suffix == "mp4" else "vp9")


def smaller(video: bytes) -> bytes:
    """Another codec, container and size of the same pictures."""
    frames = [frame[::2, ::2] for _, frame in decode.decode_frames(video, range(decode.probe(video).frames))]
    return encoded([np.kron(frame, np.ones((3, 3, 1), np.uint8)) for frame in frames], "webm")


def plant(folder: Path) -> Path:
    """A data set with one flaw of each kind; keys tell which."""
    make_ssv2(folder, {"train": 14, "validation": 6}, frames=12)
    videos = folder / "20bn-something-something-v2"
    still = np.random.default_rng(5).integers(60, 196, (96, 128, 3), dtype=np.uint8)
    flawed = {
        "train": {
            "black": encoded([np.full((96, 128, 3), 2, np.uint8)] * 12),
            "static": encoded([np.kron(still[::8, ::8], np.ones((8, 8, 1), np.uint8))] * 12),
            "tiny": make_video(12, height=48, seed=900),
        },
        "validation": {
            "exact": (videos / "1001.webm").read_bytes(),
            "recoded": smaller((videos / "1004.mp4").read_bytes()),
        },
    }
    for split, named in flawed.items():
        entries = json.loads((folder / f"labels/{split}.json").read_text())
        for key, content in named.items():
            (videos / f"{key}.{'webm' if content[:4] == bytes.fromhex('1a45dfa3') else 'mp4'}").write_bytes(content)
            entries.append(
                {
                    **entries[0],
                    "id": key,
                    "label": entries[0]["label"].replace("a cup", "a zebra" if split == "validation" else "a cup"),
                    "placeholders": ["a zebra" if split == "validation" else "a cup"],
                }
            )
        write_json(folder / f"labels/{split}.json", poor(entries) if split == "train" else entries)
    return folder


def poor(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    """All of the class `Lifting something` but one become another class."""
    lifting = [entry for entry in entries if entry["template"].startswith("Lifting")]
    for entry in lifting[1:]:
        entry |= {"template": "Pushing [something] left", "label": "pushing a cup left"}
    return entries


def corrupt(packed: Path, key: str) -> None:
    """Zeros in the place of a video's bytes, and a manifest that agrees: as a broken video that was packed elsewhere."""
    manifest = json.loads((packed / "manifest.json").read_text())
    index = shards.read_index(*storage.open_storage(str(packed)), "train")
    row = index.key.tolist().index(key)
    name = index.shards[index.shard[row]]
    tar = bytearray((packed / name).read_bytes())
    tar[index.offset[row] + 64 : index.offset[row] + index.size[row]] = bytes(index.size[row] - 64)
    (packed / name).write_bytes(tar)
    entry = next(entry for entry in manifest["splits"]["train"]["shards"] if entry["name"] == name)
    entry["sha256"] = hashlib.sha256(tar).hexdigest()
    write_json(packed / "manifest.json", manifest)


def pack(folder: Path, url: str) -> None:
    packing.pack(packing.prepare(read_layout(folder), folder, url, SHARD))


def report(url: str, out: str, config: QualityConfig | None = None, frames: int = 8) -> Survey:
    return quality.report(quality.prepare(url, out, frames), config or QualityConfig(), facts={"command": "of a test"})


@pytest.fixture(scope="module")
def planted(tmp_path_factory, ray_cluster) -> Path:
    """A packed set with its report beside it (`report`)."""
    root = tmp_path_factory.mktemp("planted")
    pack(plant(root / "source"), str(root / "set"))
    corrupt(root / "set", CORRUPT)
    report(str(root / "set"), str(root / "report"))
    return root


def test_each_flaw_is_found_and_nothing_else(planted):
    found = Survey.model_validate_json((planted / "report/quality.json").read_bytes())
    assert {(flag.kind, flag.key) for flag in found.flags} == {
        ("unreadable", CORRUPT),
        ("black", "black"),
        ("static", "static"),
        ("tiny", "tiny"),
    }
    assert {(leak.video.key, leak.duplicate.key, leak.same_bytes) for leak in found.leaks} == {
        ("exact", "1001", True),
        ("recoded", "1004", False),
    }
    assert all(leak.video.split == "validation" and leak.duplicate.split == "train" for leak in found.leaks)
    assert found.repeats == ()
    assert found.poor_classes == ("Lifting something",)
    assert found.objects is not None and found.objects.unseen == (("zebra", 2),)
    assert {broken.threshold for broken in found.broken} == {
        "max_poor_classes",
        "max_unreadable_share",
        "max_cross_split_duplicates",
        "max_black_share",
        "max_static_share",
        "max_tiny_share",
    }


def test_what_the_set_is_made_of(planted):
    found = Survey.model_validate_json((planted / "report/quality.json").read_bytes())
    train, validation = found.splits["train"], found.splits["validation"]
    assert (train.samples, train.unreadable, validation.samples) == (17, 1, 8)
    assert train.kinds["codec"] == {"vp9": 10, "h264": 6}
    assert train.kinds["size"]["128 x 48"] == 1
    assert train.measures["fps"].least == train.measures["fps"].most == 12
    assert sum(train.measures["duration"].counts) == 16
    assert sum(train.balance.videos) == 17 and min(train.balance.videos) == 1
    assert train.balance.effective_classes < 3
    assert validation.balance.missing == ()


def test_the_page_shows_flawed_videos_and_asks_for_nothing(planted):
    page = (planted / "report/quality.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2 * 2 + 3, "two of each leak, one of each flaw that decodes"
    for words in ("max_black_share", "Leaks", "zebra", "Lifting something", "exact", "recoded"):
        assert words in page
    assert "http://" not in page and "https://" not in page


def test_exit_codes_follow_the_thresholds(planted, monkeypatch, capsys):
    """Nothing is measured again: the tables of the report are there."""
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("nothing is left to measure"))
    before = {file: file.stat().st_mtime_ns for file in (planted / "report/shards").iterdir()}
    arguments = [str(planted / "set"), "--out", str(planted / "report")]
    assert job.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("quality.") for line in lines) == 6
    assert "quality.max_cross_split_duplicates: 2 is more than 0 (videos have a duplicate in another split)" in lines
    allowed = ["max_poor_classes=1", "max_unreadable_share=0.1", "max_cross_split_duplicates=2", "max_black_share=null"]
    allowed += ["max_static_share=1", "max_tiny_share=0.05"]
    assert job.main([*arguments, "--set", *(f"quality.{setting}" for setting in allowed)]) == 0
    assert not any(line.startswith("quality.") for line in capsys.readouterr().out.splitlines())
    file = planted / "thresholds.yaml"
    file.write_text("quality: {max_tiny_share: 0.05}\n")
    assert job.main([*arguments, "--config", str(file), "--set", *(f"quality.{setting}" for setting in allowed[:-1])]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in (planted / "report/shards").iterdir()}


def test_a_damaged_shard_hides_videos_that_are_named_and_is_not_remembered(planted, tmp_path):
    shutil.copytree(planted / "set", tmp_path / "set")
    shutil.copytree(planted / "report", tmp_path / "report")
    tar = tmp_path / "set/train-00000.tar"
    whole = tar.read_bytes()
    keys = [row.key for row in tars.index_rows(tar.open("rb"))]
    tar.write_bytes(whole[: len(whole) // 2])
    assert [*(tmp_path / "report/shards").glob(f"{hashlib.sha256(whole).hexdigest()}*")], "it was measured while it was whole"
    found = report(str(tmp_path / "set"), str(tmp_path / "report"))
    lost = [flag for flag in found.flags if flag.kind == "unreadable" and flag.shard == "train-00000.tar"]
    assert found.altered == ("train-00000.tar",)
    assert {flag.key for flag in lost} < set(keys) | {CORRUPT} and keys[-1] in {flag.key for flag in lost}
    assert any("the tar is cut off at byte" in flag.reason for flag in lost)
    tar.unlink()
    assert report(str(tmp_path / "set"), str(tmp_path / "report")).altered == ("train-00000.tar",)
    assert "train-00000.tar: missing, or its bytes are not the manifest's" in (tmp_path / "report/quality.html").read_text()
    tar.write_bytes(whole)
    assert report(str(tmp_path / "set"), str(tmp_path / "report")).altered == ()


def test_a_stored_table_that_is_damaged_is_named(planted, tmp_path):
    shutil.copytree(planted / "report", tmp_path / "report")
    table = next((tmp_path / "report/shards").iterdir())
    table.write_bytes(b"PAR1")
    with pytest.raises(
        DataError, match=rf"{table.name}: not a table of jobs.quality: .*; remove it, and give the same command"
    ):
        report(str(planted / "set"), str(tmp_path / "report"))


def test_a_damaged_set_is_told_and_ends_with_1(ray_cluster, tmp_path, monkeypatch, capsys):
    """Also where all thresholds are kept; reports of two sets of one name have places of their own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "start_ray", lambda **_: None)
    lax = [f"quality.{name}=null" for name in QualityConfig.model_fields if name.startswith("max_")]
    for folder, count in (("a", 12), ("b", 14)):
        pack(make_ssv2(tmp_path / f"source-{folder}", {"train": count, "validation": 2}), f"{folder}/packed")
        assert job.main([f"{folder}/packed", "--set", *lax]) == 0
    assert len(list((tmp_path / "runs/quality").glob("packed-*/quality.html"))) == 2
    tar = tmp_path / "a/packed/train-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-1] + b"x")
    (tmp_path / "a/packed/train-00001.tar").unlink()
    capsys.readouterr()
    assert job.main(["a/packed", "--out", "new", "--set", *lax]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "train-00000.tar: altered, its sha256 is not the manifest's; run python -m jobs.check" in lines
    assert "train-00001.tar: missing; run python -m jobs.check" in lines


def test_progress_is_told_inside_a_shard(planted, tmp_path, monkeypatch):
    noted: list[tuple[str, int, int]] = []
    board = SimpleNamespace(note=SimpleNamespace(remote=lambda *note: noted.append(note)))
    monkeypatch.setattr(tasks, "NOTE_SECONDS", 0.0)
    place = quality.prepare(str(planted / "set"), str(tmp_path / "report"), 2)
    shard = place.manifest.splits["train"].shards[0]
    quality._measure_shard(place.set_url, shard, (), 2, board)
    assert [note[:2] for note in noted] == [(shard.name, number) for number in range(1, shard.samples + 1)]
    monkeypatch.setattr(quality, "run_tasks", partial(tasks.run_tasks, wait_seconds=0.001))
    told: list[str] = []
    quality.report(place, QualityConfig(), facts={}, on_progress=lambda progress: told.append(progress.line()))
    assert len(told) > len(list((planted / "set").glob("*.tar"))), "more often than a shard ends"
    assert "25/25 videos (100 %)" in told[-1]


def test_a_video_that_crashes_the_decoder_is_flagged_and_the_rest_is_measured(planted):
    place = quality.prepare(str(planted / "set"), str(planted / "crash"), 2)
    shard = place.manifest.splits["validation"].shards[0]
    with tarfile.open(planted / "set" / shard.name) as tar:
        bad = tar.next()
        content = tar.extractfile(bad).read()
    board = SimpleNamespace(note=SimpleNamespace(remote=lambda *_: None))
    with decoding_dies(content, signal.SIGSEGV):
        measured = quality._measure_shard(place.set_url, shard, (), 2, board)
    rows = load_table(measured.table)
    errors = dict(zip(rows["key"].to_pylist(), rows["error"].to_pylist(), strict=True))
    assert {key for key, error in errors.items() if "crashed (signal 11)" in error} == {bad.name.partition(".")[0]}
    assert len(errors) == shard.samples > 1
    with decoding_dies(content, signal.SIGKILL), pytest.raises(OSError, match="no memory is left there"):
        quality._measure_shard(place.set_url, shard, (), 2, board)


@pytest.mark.s3
def test_killed_in_the_middle_and_given_again(s3, ray_cluster, tmp_path):
    """SIGKILL while shards are measured; the same command keeps what is there and ends with an undisturbed run's figures."""
    url, out, unbroken = s3.url("set"), s3.url("report"), s3.url("unbroken")
    pack(many_videos(tmp_path / "source", 150), url)
    report(url, unbroken)
    command = [sys.executable, "-m", "jobs.quality", url, "--out", out]
    program = subprocess.Popen(
        command, cwd=REPO, env={**os.environ, "RAY_ADDRESS": ray_cluster}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    fs, root = storage.open_storage(out)
    deadline = time.monotonic() + 120
    while len(storage.list_files(fs, f"{root}/shards")) < 2:
        assert program.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    kept = {info.base_name: info.mtime for info in infos(fs, root)}
    assert not storage.exists(fs, f"{root}/quality.json")
    again = run_job("quality", url, "--out", out, RAY_ADDRESS=ray_cluster)
    assert again.returncode == 1, again.stderr
    assert "max_duplicate_share" in again.stdout
    after = {info.base_name: info.mtime for info in infos(fs, root)}
    assert len(after) > len(kept) and {name: after[name] for name in kept} == kept
    other, place = storage.open_storage(unbroken)
    assert storage.read_bytes(fs, f"{root}/quality.json") == storage.read_bytes(other, f"{place}/quality.json")


def infos(fs, root):
    from pyarrow.fs import FileSelector

    return fs.get_file_info(FileSelector(f"{root}/shards", allow_not_found=True))


@pytest.mark.parametrize(
    ("arguments", "fault", "words"),
    [
        (["{tmp}/nowhere"], StorageError, "there is no such folder"),
        (["{tmp}"], DataError, "not a finished packed set"),
        (["{set}", "--frames", "1"], DataError, "2 to 64 frames of a video"),
        (["{set}", "--set", "quality.max_statics=1"], ConfigError, "no such key .did you mean max_static_share"),
        (["{set}", "--set", "quality.max_static_share=2"], ConfigError, "quality.max_static_share"),
        (["{set}", "--out", "{set}/manifest.json"], StorageError, "a folder is needed"),
    ],
)
def test_bad_input_is_met_before_ray_starts(planted, tmp_path, monkeypatch, arguments, fault, words):
    monkeypatch.setattr(cli, "start_ray", lambda **_: pytest.fail("bad input has to be met before Ray starts"))
    places = {"tmp": str(tmp_path), "set": str(planted / "set")}
    with pytest.raises(fault, match=words):
        job.main([argument.format(**places) for argument in arguments])


def test_real_and_awkward_videos(ray_cluster, tmp_path):
    """Pieces of one still shot leak; the same shot turned does not; rotation, codecs, a white and a broken file are told."""
    source = tmp_path / "source"
    awkward, clips = shared_data("awkward"), shared_data("realclips")
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for name, files in {"Awkward": sorted(awkward.iterdir()), "Yoga": sorted((clips / "Yoga").iterdir())}.items():
        (source / name).mkdir(parents=True)
        for number, file in enumerate(files):
            shutil.copy(file, source / name / file.name)
            lists["train" if number % 3 else "test"].append(f"{name}/{file.name}")
    (source / "classInd.txt").write_text("1 Awkward\n2 Yoga\n")
    for split, names in lists.items():
        (source / f"{split}list01.txt").write_text("\n".join(names) + "\n")
    pack(source, str(tmp_path / "set"))
    found = report(str(tmp_path / "set"), str(tmp_path / "report"))
    assert [video.key for video in found.quarantined] == ["corrupted"]
    kinds = {
        name: {value for facts in found.splits.values() for value in facts.kinds[name]} for name in ("codec", "pixel_format")
    }
    assert kinds["codec"] >= {"av1", "h264", "hevc", "mpeg4"} and "yuv420p10le" in kinds["pixel_format"]
    assert sum(facts.rotated for facts in found.splits.values()) == 3
    assert {(flag.kind, flag.key) for flag in found.flags if flag.kind != "outlier"} == {
        ("flat", "unordered"),
        ("tiny", "unordered"),
    }
    assert found.leaks and all(
        leak.video.key.startswith("v_Yoga") and leak.duplicate.key.startswith("v_Yoga") for leak in found.leaks
    )
