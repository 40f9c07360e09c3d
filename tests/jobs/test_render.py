"""`python -m jobs.render` as a person runs it."""

from __future__ import annotations

import json

from tests.support import run_job


def test_a_set_is_rendered_once_and_continued(tmp_path):
    folder = tmp_path / "videos"
    first = run_job("render", str(folder), "--train", "3", "--validation", "1")
    assert first.returncode == 0, first.stderr
    videos = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".mp4", ".webm")}
    assert len(videos) == 4
    assert len(json.loads((folder / "train.json").read_text())) == 3
    (folder / min(videos)).unlink()
    again = run_job("render", str(folder), "--train", "4", "--validation", "1")
    assert again.returncode == 0, again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix in (".mp4", ".webm")}
    assert len(after) == 5 and sum(after.get(name) == when for name, when in videos.items()) == 3


def test_another_seed_in_the_same_folder_is_refused(tmp_path):
    assert run_job("render", str(tmp_path), "--train", "1", "--validation", "0").returncode == 0
    other = run_job("render", str(tmp_path), "--train", "1", "--validation", "0", "--seed", "1")
    assert other.returncode == 2 and "choose another folder" in other.stderr
    assert run_job("render", str(tmp_path / "none"), "--train", "-1").returncode == 2
