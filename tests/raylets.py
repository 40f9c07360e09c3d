"""A Ray cluster of several raylets on this machine, whose nodes and workers a test can kill, and runs of jobs on it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import cli
from tests import support
from vidfuse.config import Config
from vidfuse.on_ray.auditing import audit_run
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.standby import PREPARED
from vidfuse.on_ray.storage import join, read_bytes
from vidfuse.train.audit import Audit

PREEMPTION = 2  # autoscaler.proto, DrainNodeReason
STORE_BYTES = 150 * 1024**2
WORKER_TITLE = re.compile(r"ray::.*TrainWorker")
IDLE_TITLE = re.compile(r"ray::IDLE")


class Nodes:
    """A head without CPUs (the driver, the controller and the monitor are there) and nodes of one CPU: one worker each."""

    def __init__(self, scratch: Path, *, dashboard: bool = False) -> None:
        from ray.cluster_utils import Cluster

        self._scratch = scratch
        self._cluster = Cluster(shutdown_at_exit=False)
        self._cluster.add_node(
            num_cpus=0,
            include_dashboard=dashboard,
            temp_dir=str(scratch),
            object_store_memory=STORE_BYTES,
            dashboard_port=_free_port() if dashboard else None,
        )
        self.address: str = self._cluster.address

    def add(self, **environment: str) -> Any:
        """One more node of one CPU, whose processes find `environment` in theirs."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return self._cluster.add_node(num_cpus=1, temp_dir=str(self._scratch), object_store_memory=STORE_BYTES)

    @property
    def discovery(self) -> Path:
        """Where the dashboard lists the nodes for Prometheus."""
        return self._scratch / "prom_metrics_service_discovery.json"

    @property
    def nodes(self) -> list[Any]:
        """Those of one CPU that are alive."""
        return sorted(self._cluster.worker_nodes, key=lambda node: node.node_id)

    def raylets_say(self, words: str) -> list[str]:
        """Lines of the raylets' logs with these words."""
        logs = self._scratch.glob("session_2*/logs/raylet*")
        return [line for log in logs for line in log.read_text(errors="replace").splitlines() if words in line]

    def alive(self) -> int:
        """Nodes that the cluster takes to be alive, the head among them."""
        return len(self._cluster.global_state._live_node_ids())

    def workers(self, node: Any) -> list[psutil.Process]:
        """The Train workers on a node."""
        return self.processes(node, WORKER_TITLE)

    def processes(self, node: Any, title: re.Pattern[str]) -> list[psutil.Process]:
        """The processes on a node that Ray has given such a title."""
        found = []
        for process in _raylet(node).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title.search(" ".join(process.cmdline())):
                    found.append(process)
        return found

    def standing_by(self, node: Any) -> list[int]:
        """The processes on a node, by number, that are prepared to be Train workers."""
        return [process.pid for process in self.processes(node, IDLE_TITLE) if process.environ().get(PREPARED)]

    def kill_worker(self, node: Any) -> None:
        """`kill -9` of the Train workers on a node."""
        workers = self.workers(node)
        assert workers, "no Train worker is there"
        for process in workers:
            process.kill()

    def drain(self, node: Any, seconds: float) -> None:
        """Tell the cluster that a node is taken away in some seconds, as a cloud does with a spot machine."""
        from ray._raylet import GcsClient

        deadline = int((time.time() + seconds) * 1000)
        accepted, why = GcsClient(self.address).drain_node(node.node_id, PREEMPTION, "taken away", deadline)
        assert accepted, why

    def kill(self, node: Any) -> None:
        """`kill -9` of a raylet with all that it started, as when a machine is gone."""
        raylet = _raylet(node)
        for process in [raylet, *raylet.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.worker_nodes.remove(node)
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@contextlib.contextmanager
def nodes(count: int, environment: Mapping[str, str], *, dashboard: bool = False) -> Iterator[Nodes]:
    """A cluster of `count` nodes and a head; its processes find `environment` in theirs. Other clusters are left alone."""
    from ray.experimental import internal_kv

    client = internal_kv.internal_kv_get_gcs_client()
    scratch = Path(tempfile.mkdtemp(prefix="vfn-", dir="/tmp"))  # a short path: Ray's sockets live below it
    before = dict(os.environ)
    os.environ.update({**cli.RAY_SETTINGS, **environment, "PYTHONPATH": str(support.REPO)})
    os.environ.pop("RAY_ADDRESS", None)
    try:
        made = Nodes(scratch, dashboard=dashboard)
        for _ in range(count):
            made.add()
        yield made
    finally:
        support.end_cluster(scratch)
        if client is not None:  # each node has taken its place, and Ray ends a process that asks a cluster which is gone
            internal_kv._initialize_internal_kv(client)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(scratch, ignore_errors=True)


class Training:
    """`python -m jobs.train` on a cluster, in a process of its own; `before`: words before its command."""

    def __init__(self, config: Config, address: str, folder: Path, *before: str) -> None:
        self.config, self._log = config, folder / f"{config.run.name}.log"
        file = folder / f"{config.run.name}.yaml"
        file.write_text(config.to_yaml())
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-m", "jobs.train", "--config", str(file)],
                cwd=support.REPO,
                env={**os.environ, "RAY_ADDRESS": address},
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)

    @property
    def log(self) -> str:
        """What it said."""
        return self._log.read_text()

    def journal(self) -> list[dict[str, Any]]:
        """What the run wrote down so far."""
        return RunFolder.of(self.config.run).journal()

    def wait_for(self, what: str, wanted: Any, seconds: float = 300) -> Any:
        """Wait until `wanted(journal)` is true; its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = wanted(self.journal())
            if value:
                return value
            assert self.process.poll() is None, f"ended with {self.process.returncode} before {what}: {self.log[-4000:]}"
            time.sleep(0.25)
        raise AssertionError(f"no {what} in {seconds} s: {self.log[-4000:]} {self.journal()[-4:]}")

    def wait_for_step(self, step: int, *, tries: int = 1, workers: int | None = None, seconds: float = 300) -> None:
        """Wait until a try (the so-manieth, or one of so many workers) has noted a step that is at least `step`."""

        def there(entries: list[dict[str, Any]]) -> bool:
            sizes = {entry["try"]: entry["workers"] for entry in entries if entry["kind"] == "start"}
            return any(
                entry["kind"] != "start"
                and entry["step"] >= step
                and entry["try"] >= tries
                and workers in (None, sizes[entry["try"]])
                for entry in entries
            )

        self.wait_for(f"step {step} of try {tries} with {workers or 'any'} workers", there, seconds)

    def wait_for_checkpoint(self, what: str = "a checkpoint", seconds: float = 600) -> None:
        """Wait until the run has stored another checkpoint, whole."""
        folder = RunFolder.of(self.config.run)
        before = folder.checkpoints().get("last")
        self.wait_for(what, lambda _: folder.checkpoints().get("last") != before, seconds)

    def stop(self) -> None:
        """SIGTERM to the driver."""
        self.process.send_signal(signal.SIGTERM)

    def end(self, seconds: float = 300) -> dict[str, Any]:
        """Wait for its end; result.json."""
        assert self.process.wait(seconds) == 0, self.log[-6000:]
        return RunFolder.of(self.config.run).json("result.json") or {}

    def audit(self) -> Audit:
        """The run's audit."""
        return audit_run(RunFolder.of(self.config.run))

    def losses(self) -> list[float]:
        """The loss of each step."""
        folder = RunFolder.of(self.config.run)
        lines = [json.loads(line) for line in read_bytes(folder.filesystem, join(folder.root, "metrics.jsonl")).splitlines()]
        lines = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["loss"] for line in lines]
