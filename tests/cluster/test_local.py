"""The cluster of one machine: up in one command, on loopback alone, with a token; a training survives a node; nothing is left."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests import support

SCRIPT = support.REPO / "cluster/local/cluster.py"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Local:
    """A cluster in a folder of its own, and commands on it as a user types them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("port", "dashboard-port", "client-port", "s3-port", "prometheus-port", "grafana-port")
        self.ports = dict(zip(names, free_ports(len(names)), strict=True))

    def __call__(self, what: str, *options: str) -> subprocess.CompletedProcess[str]:
        ports = [f"--{name}={port}" for name, port in self.ports.items()] if what == "up" else []
        command = [sys.executable, str(SCRIPT), what, "--folder", str(self.folder), *ports, *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=support.REPO)

    @property
    def environment(self) -> dict[str, str]:
        """What `source env.sh` gives."""
        command = ["bash", "-c", f"source {self.folder}/env.sh && env -0"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        words = subprocess.run(command, env=clean, capture_output=True, text=True, check=True).stdout.split("\0")
        found = dict(word.split("=", 1) for word in words if word)
        return found | {"PATH": f"{Path(sys.executable).parent}:{found['PATH']}"}

    def call(self, *words: str) -> str:
        done = subprocess.run(
            words, env=self.environment, cwd=support.REPO, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
        return done.stdout + done.stderr

    def processes(self) -> list[psutil.Process]:
        parts = json.loads((self.folder / "state.json").read_text())
        tops = [psutil.Process(part["pid"]) for part in parts.values() if psutil.pid_exists(part["pid"])]
        return [*tops, *(child for top in tops for child in top.children(recursive=True))]


@pytest.fixture
def local(tmp_path):
    made = Local(tmp_path / "cluster")
    try:
        yield made
    finally:
        made("down")


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses at which they listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def answer(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


@pytest.mark.ray
@pytest.mark.s3
def test_up_is_healthy_private_and_leaves_nothing(local):
    up = local("up", "--nodes=1", "--cpus=1")
    assert up.returncode == 0, up.stderr
    assert (
        re.search(r"node-1 +up", up.stdout) and f"source {os.path.relpath(local.folder / 'env.sh', support.REPO)}" in up.stdout
    )
    processes = local.processes()
    time.sleep(3)  # the agents of the nodes open their ports after the nodes are there
    assert listening(local.processes()) <= {"127.0.0.1", "::ffff:127.0.0.1"}
    dashboard = f"http://127.0.0.1:{local.ports['dashboard-port']}"
    assert [answer(f"{dashboard}{path}") for path in ("/api/version", "/api/jobs/", "/api/v0/nodes")] == [401] * 3
    for name in ("token", "env.sh", "store/credentials"):
        assert (local.folder / name).stat().st_mode & 0o077 == 0, name
    assert "No such" not in local.call("ray", "job", "list")
    again = local("up")
    assert again.returncode == 2 and "it is up already" in again.stderr
    taken = Local(local.folder.with_name("other"))
    taken.ports["dashboard-port"] = local.ports["dashboard-port"]
    refused = taken("up")
    assert refused.returncode == 2 and "of the dashboard (jobs are submitted to it) is taken" in refused.stderr
    psutil.Process(json.loads((local.folder / "state.json").read_text())["node-1"]["pid"]).kill()
    lost = local("status")
    assert lost.returncode == 2 and re.search(r"node-1 +lost", lost.stdout) and "node-1 ended" in lost.stderr
    down = local("down")
    assert down.returncode == 0 and gone(processes), down.stderr
    assert local("status").returncode == 2 and local("down").stdout.startswith("nothing was up")


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.slow
def test_a_submitted_training_survives_a_node_and_is_there_after_a_restart(local, tmp_path):
    """As the README has it: up, pack, submit, kill a node, look, down, up, look again."""
    assert local("up", "--nodes=2", "--cpus=1").returncode == 0
    source = support.make_ssv2(tmp_path / "source", {"train": 48, "validation": 6})
    local.call("python", "-m", "jobs.pack", str(source), "s3://vidfuse/set")
    settings = [
        "data.url=s3://vidfuse/set",
        "run.storage=s3://vidfuse/runs",
        "data.classes=3",
        "data.size=32",
        "train.epochs=40",
    ]
    settings += ["train.global_batch=8", "train.micro_batch=4", "train.checkpoint_every_steps=5", "cluster.workers=[1,2]"]
    job = ["python", "-m", "jobs.train", "--restarts", "1", "--preset", "demo", "--set", *settings]
    local.call("ray", "job", "submit", "--submission-id", "one", "--no-wait", "--working-dir", ".", "--", *job)
    wait_for(local, lambda run: run["step"] >= 12)
    node = psutil.Process(json.loads((local.folder / "state.json").read_text())["node-2"]["pid"])
    for process in (*node.children(recursive=True), node):
        process.kill()
    end = wait_for(local, lambda run: run["state"] == "finished")
    assert (end["epoch"], end["step"]) == (40, 240)
    audit = local.call("python", "-m", "jobs.audit", "--run", "s3://vidfuse/runs/demo")
    assert audit.count("exactly once") == 40 and "1 interruption" in audit, audit
    assert not list(told_secrets(local, tmp_path / "stored"))
    assert local("down").returncode == 0
    assert local("up", "--nodes=1", "--cpus=1").returncode == 0
    assert json.loads(local.call("python", "-m", "jobs.status", "s3://vidfuse/runs", "--json"))["state"] == "finished"


def told_secrets(local: Local, folder: Path) -> Iterator[str]:
    """Places that hold the token, or the key of the store: of logs, command lines, what jobs tell of themselves, and all that is stored."""
    keys = configparser.ConfigParser()
    keys.read(local.folder / "store/credentials")
    secrets = [(local.folder / "token").read_text().strip(), keys["default"]["aws_secret_access_key"]]
    assert all(len(secret) >= 16 for secret in secrets)
    download = "import sys; from vidfuse.on_ray.storage import open_storage; from pyarrow import fs; f, r = open_storage('s3://vidfuse'); "
    local.call("python", "-c", f"{download} fs.copy_files(r, sys.argv[1], source_filesystem=f)", str(folder))
    texts = {"job list": local.call("ray", "job", "list"), "job logs": local.call("ray", "job", "logs", "one")}
    for process in local.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            texts[f"command line of {process.pid}"] = " ".join(process.cmdline())
    [scratch] = {line.split("=", 1)[1] for text in texts.values() for line in text.split() if line.startswith("--temp-dir=")}
    files = [path for root in (folder, local.folder / "logs", Path(scratch)) for path in root.rglob("*") if path.is_file()]
    assert any("config.yaml" in path.name for path in files) and any("raylet" in path.name for path in files)
    texts |= {str(path): path.read_bytes().decode("latin-1") for path in files}
    yield from (place for place, text in texts.items() if any(secret in text for secret in secrets))


def wait_for(local: Local, what, seconds: float = 300) -> dict:
    """Wait until the only run is as wanted; how it stands."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        lines = local.call("python", "-m", "jobs.status", "s3://vidfuse/runs", "--json").splitlines()
        if lines and what(json.loads(lines[0])):
            return json.loads(lines[0])
        time.sleep(2)
    raise AssertionError(local.call("ray", "job", "logs", "one")[-4000:])
