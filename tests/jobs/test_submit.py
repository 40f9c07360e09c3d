"""`ray job submit` to a cluster with token authentication: follow it, stop it in the middle, submit again, read the result."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jobs import cli
from tests import support

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]
RAY = str(Path(sys.executable).parent / "ray")


def call(*command: str, env: dict[str, str], timeout: float = 300) -> str:
    done = subprocess.run(command, env=env, cwd=support.REPO, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]} {done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def cluster(s3):
    """`ray start --head` with a home, a session folder and a port of its own; its environment."""
    scratch = Path(tempfile.mkdtemp(prefix="vfs-", dir="/tmp"))
    token = scratch / "token"
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **s3.environment,
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        **cli.RAY_SETTINGS,
    }
    token.write_text(os.urandom(24).hex())
    token.chmod(0o600)
    ports = {
        "port": "26379",
        "dashboard-port": "28265",
        "dashboard-agent-listen-port": "28366",
        "ray-client-server-port": "28367",
    }
    words = [f"--{name}={value}" for name, value in ports.items()]
    call(RAY, "start", "--head", "--num-cpus=2", f"--temp-dir={scratch}", "--object-store-memory=300000000", *words, env=env)
    env |= {"RAY_ADDRESS": "http://127.0.0.1:28265"}
    try:
        yield env
    finally:
        support.end_cluster(scratch)
        shutil.rmtree(scratch, ignore_errors=True)


def submit(env: dict[str, str], name: str, *settings: str) -> None:
    """Submit a training; returns at once."""
    job = ["python", "-m", "jobs.train", "--preset", "demo", "--set", *settings]
    place = ["--submission-id", name, "--no-wait", "--working-dir", "."]
    call(RAY, "job", "submit", *place, "--", *job, env=env)


def status(env: dict[str, str], name: str) -> str:
    return call(RAY, "job", "status", name, env=env)


def wait(env: dict[str, str], name: str, *words: str, seconds: float = 240) -> str:
    """Wait until the job's log has all the words, or it ended; its log."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        log = call(RAY, "job", "logs", name, env=env)
        if all(word in log for word in words):
            return log
        if "failed" in status(env, name).lower():
            raise AssertionError(log[-4000:])
        time.sleep(2)
    raise AssertionError(f"{words} did not come in {seconds} s: {log[-4000:]}")


def test_submit_stop_and_continue(cluster, s3, tmp_path):
    source = support.make_ssv2(tmp_path / "source", {"train": 48, "validation": 6})
    data, runs = s3.url("submit"), s3.url("submitted")
    done = support.run_job("pack", str(source), data, **{k: v for k, v in cluster.items() if k.startswith("AWS")})
    assert done.returncode == 0, done.stderr
    settings = [
        f"data.url={data}",
        f"run.storage={runs}",
        "data.classes=3",
        "data.size=32",
        "train.global_batch=8",
        "train.micro_batch=4",
        "train.epochs=200",
        "train.validate_every_epochs=5",
        "train.checkpoint_every_steps=5",
    ]
    from vidfuse.on_ray.runs import RunFolder

    submit(cluster, "first", *settings)
    wait(cluster, "first", "epoch 5/200")  # validated, of which there is always a line
    call(RAY, "job", "stop", "first", env=cluster)
    folder = RunFolder.at(f"{runs}/demo")
    assert folder.json("result.json")["state"] == "stopped"  # in order, not merely ended
    stopped = folder.state(folder.checkpoints()["last"])
    assert 0 < stopped.step < 1200
    shorter = [word.replace("train.epochs=200", f"train.epochs={stopped.epoch + 2}") for word in settings]
    submit(cluster, "second", *shorter)
    wait(cluster, "second", "finished after")
    result = folder.json("result.json")
    assert result["state"] == "finished" and result["epochs"] == stopped.epoch + 2
    assert result["steps"] == 6 * result["epochs"]
    log = call(RAY, "job", "logs", "second", env=cluster)
    assert s3.secret not in log and s3.secret not in json.dumps(folder.json("run.json"))
