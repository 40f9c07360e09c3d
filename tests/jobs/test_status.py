"""Runs as their storage tells of them: how they stand, and that one goes on by its name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jobs import cli, resume, status
from tests import support
from vidfuse.config import ConfigError, from_mapping, override
from vidfuse.data.shards import DataError
from vidfuse.on_ray import standing
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.standing import Heartbeat, runs_below
from vidfuse.presets import get


def run_at(folder, name: str, **files) -> None:
    config = override(get("demo"), [f"run.name={name.rsplit('/', 1)[-1]}", "train.epochs=7"])
    (folder / name).mkdir(parents=True)
    (folder / name / "config.yaml").write_text(config.to_yaml())
    (folder / name / "run.json").write_text("{}")
    for file, content in files.items():
        (folder / name / f"{file}.json").write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path):
    ended = {"epochs": 7, "steps": 70, "best_top1": 0.75}
    kept = {"last": "step-2", "best": "step-1", "scores": {"step-1": 0.5, "step-2": 0.25, "step-3": None}}
    run_at(tmp_path, "whole", result={"state": "finished", **ended}, heartbeat={"time": 900.0, "step": 69, "epoch": 6})
    run_at(tmp_path, "plateau", result={"state": "stopped_early", **ended})
    run_at(tmp_path, "asked", result={"state": "stopped", **ended, "epochs": 2, "steps": 25})
    run_at(
        tmp_path, "again", result={"state": "stopped", **ended, "steps": 25}, heartbeat={"time": 990.0, "step": 31, "epoch": 3}
    )
    run_at(tmp_path, "gone", heartbeat={"time": 100.0, "step": 31, "epoch": 3}, checkpoints=kept)
    run_at(tmp_path, "fresh")
    run_at(tmp_path, "search/trials/trial-1", heartbeat={"time": 999.0, "step": 4, "epoch": 1})
    (tmp_path / "features" / "x").mkdir(parents=True)
    return tmp_path


def test_how_each_run_stands(runs):
    found = {run.name: run for run in runs_below(str(runs), now=1000.0)}
    assert {name: run.state for name, run in found.items()} == {
        "again": "running",
        "asked": "stopped",
        "fresh": "begun",
        "gone": "silent",
        "plateau": "stopped early",
        "search/trials/trial-1": "running",
        "whole": "finished",
    }
    gone = found["gone"]
    assert (gone.epoch, gone.epochs, gone.step, gone.best_top1, gone.heard) == (3, 7, 31, 0.5, 100.0)
    assert (found["whole"].epoch, found["whole"].step, found["whole"].best_top1) == (7, 70, 0.75)
    assert (found["again"].epoch, found["again"].step) == (3, 31)
    assert (found["fresh"].step, found["fresh"].best_top1, found["fresh"].heard) == (0, None, None)
    assert [run.name for run in runs_below(str(runs / "gone"), now=1000.0)] == ["gone"]


def test_what_the_command_prints(runs, capsys):
    assert status.main([str(runs)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and any("gone" in line and "epoch 3/7  step 31  best top-1 0.5000" in line for line in lines)
    assert status.main([str(runs), "--json"]) == 0
    assert {json.loads(line)["name"] for line in capsys.readouterr().out.splitlines()} >= {"whole", "search/trials/trial-1"}
    assert status.main([str(runs / "features")]) == 0
    assert "no run is in" in capsys.readouterr().out


@pytest.mark.s3
def test_runs_on_object_storage(s3, capsys):
    url = s3.url("standing")
    config = from_mapping({"run": {"storage": url, "name": "far"}})
    folder = RunFolder.of(config.run)
    folder.keep("config.yaml", json.loads(json.dumps(config.model_dump(mode="json"))))
    folder.keep("run.json", {})
    heartbeat = Heartbeat(config.run)
    heartbeat({"epoch": 1, "step": 12})
    heartbeat({"epoch": 1, "step": 13})  # too soon
    deadline = time.monotonic() + 20
    while folder.json(standing.HEARTBEAT) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    heartbeat.close()
    [run] = runs_below(url)
    assert (run.name, run.state, run.step) == ("far", "running", 12)


def test_a_heartbeat_that_cannot_be_written_is_missed_and_no_more(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(standing, "BEAT_SECONDS", 0.0)
    heartbeat = Heartbeat(from_mapping({"run": {"storage": str(tmp_path / "file")}}).run)
    for step in range(3):
        heartbeat({"epoch": 0, "step": step})
        heartbeat({"features": "an event of another kind"})
    heartbeat.close()


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        resume.main([str(tmp_path)])
    with pytest.raises(ConfigError, match="the folder of a run is needed"):
        resume.main(["NAME"])


SCRIPT = """
import os, pathlib, signal, sys, time
from jobs import cli
count = pathlib.Path(sys.argv[-1])
if "--restarts" in sys.argv:
    sys.exit(cli.restarted(2))
tries = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(tries))
if sys.argv[-2] == "waits":
    time.sleep(60)
if tries <= int(sys.argv[-2]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(5)
"""


@pytest.mark.parametrize(("kills", "code", "tries"), [("0", 5, 1), ("2", 5, 3), ("9", 128 + 9, 3)])
def test_a_driver_that_is_killed_is_started_again(tmp_path, kills, code, tries):
    (tmp_path / "job.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{support.REPO}"}
    command = [sys.executable, "-m", "job", "--restarts", "2", kills, str(tmp_path / "count")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, int((tmp_path / "count").read_text())) == (code, tries), done.stderr
    assert done.stdout.count("was killed (SIGKILL) and is started again") == tries - 1


def test_a_driver_that_is_asked_to_stop_is_not_started_again(tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{support.REPO}"}
    command = [sys.executable, "-m", "job", "--restarts", "2", "waits", str(tmp_path / "count")]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "count").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM and (tmp_path / "count").read_text() == "1"


def test_the_option_is_not_handed_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--preset", "demo", "--restarts=3", "--set", "seed=1"])
    started = []

    class Process:
        def __init__(self, command):
            started.append(command[3:])

        def wait(self):
            return 0

    monkeypatch.setattr(cli.subprocess, "Popen", Process)
    assert cli.restarted(3) == 0 and started == [["--preset", "demo", "--set", "seed=1"]]
