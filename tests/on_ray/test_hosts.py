"""A training over three hosts with an address and a network each: one is cut off, the run shrinks, goes on, and grows when it is back.

Hosts are network namespaces of this machine, joined by a bridge, as `ip` makes them: the test needs root. Each has its own raylet.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import cli
from tests import support
from tests.raylets import Training
from vidfuse.config import from_mapping

pytestmark = [pytest.mark.ray, pytest.mark.slow]
NETWORK, PORT, HOSTS, TRAIN = "10.213.77.{}", 26_479, 3, 48


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


class Hosts:
    """Three hosts; the first has the head, the driver and a worker."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.tag = f"vf{os.getpid() % 100_000}"
        self.raylets: dict[int, subprocess.Popen[bytes]] = {}
        (scratch / "token").write_text(os.urandom(24).hex())
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
            **cli.RAY_SETTINGS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(scratch / "token"),
            "GLOO_SOCKET_IFNAME": "eth0",
            "PYTHONPATH": str(support.REPO),
        }
        ip("link", "add", self.tag, "type", "bridge")
        ip("link", "set", self.tag, "up")
        for number in range(1, HOSTS + 1):
            self._wire(number)

    def _wire(self, number: int) -> None:
        name, cable = self.name(number), f"{self.tag}-{number}"
        ip("netns", "add", name)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("link", "set", cable, "master", self.tag, "up")
        ip("-n", name, "address", "add", f"{NETWORK.format(number)}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", name, "link", "set", link, "up")

    def name(self, number: int) -> str:
        return f"{self.tag}h{number}"

    def on(self, number: int) -> list[str]:
        """Words that have a command run on a host."""
        return ["ip", "netns", "exec", self.name(number)]

    @property
    def address(self) -> str:
        return f"{NETWORK.format(1)}:{PORT}"

    def start(self, number: int) -> None:
        """The raylet of a host (on the first, the head), as its system starts it."""
        where = ["--head", f"--port={PORT}", f"--temp-dir={self._scratch}"] if number == 1 else [f"--address={self.address}"]
        words = [
            "start",
            "--block",
            f"--node-ip-address={NETWORK.format(number)}",
            "--num-cpus=1",
            "--object-store-memory=150000000",
        ]
        if number == 1:
            words += ["--dashboard-host=127.0.0.1", "--ray-client-server-port=26480", "--dashboard-port=26481"]
        command = [*self.on(number), sys.executable, "-m", "ray.scripts.scripts", *words, "--disable-usage-stats", *where]
        with open(self._scratch / f"host-{number}.log", "ab") as log:
            self.raylets[number] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while not self._joined(number):
            assert self.raylets[number].poll() is None and time.monotonic() < deadline, self.said(number)
            time.sleep(0.5)

    def _joined(self, number: int) -> bool:
        return "Ray runtime started" in self.said(number)

    def said(self, number: int) -> str:
        log = self._scratch / f"host-{number}.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""

    def cut(self, number: int) -> None:
        """Pull the network cable."""
        ip("link", "set", f"{self.tag}-{number}", "down")

    def mend(self, number: int) -> None:
        """Put it in again; the raylet ends when it hears that it was given up, and its system starts another."""
        ip("link", "set", f"{self.tag}-{number}", "up")
        self.raylets[number].wait(120)
        (self._scratch / f"host-{number}.log").unlink()
        self.start(number)

    def close(self) -> None:
        support.end_cluster(self._scratch)
        for raylet in self.raylets.values():
            raylet.kill()
            raylet.wait(30)
        for number in range(1, HOSTS + 1):
            pids = ip("netns", "pids", self.name(number), check=False).stdout.split()
            for pid in pids:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(int(pid)).kill()
            ip("netns", "del", self.name(number), check=False)
        ip("link", "del", self.tag, check=False)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None or ip("netns", "list", check=False).returncode:
        pytest.skip("network namespaces need root and iproute2")
    scratch = Path(tempfile.mkdtemp(prefix="vfn-", dir="/tmp"))
    made = None
    try:
        made = Hosts(scratch)
        yield made
    finally:
        if made is not None:
            made.close()
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_host_is_cut_off_and_comes_back(hosts, tmp_path, monkeypatch):
    source = support.make_ssv2(tmp_path / "source", {"train": TRAIN, "validation": 6})
    with monkeypatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        config = from_mapping(
            {
                "data": {"url": str(tmp_path / "set"), "classes": 3, "frames": 4, "size": 32, "block_bytes": 60_000, "cpus_per_task": 0.2},
                "model": {"semantic": {"name": "tiny_image"}, "motion": {"name": "tiny_motion", "frozen": False}},
                "train": {
                    "epochs": 500, "global_batch": 12, "micro_batch": 2, "precision": "fp32", "zero_stage": 2,
                    "checkpoint_every_steps": 3, "validate_every_epochs": 100,
                },
                "cluster": {"workers": (1, HOSTS), "cpus_per_worker": 0.6, "resize_seconds": 2, "max_failures": 10},
                "run": {"storage": str(tmp_path / "runs"), "name": "hosts"},
            }
        )  # fmt: skip
        packed = support.run_job("pack", str(source), str(tmp_path / "set"))
        assert packed.returncode == 0, packed.stderr
        for number in range(1, HOSTS + 1):
            hosts.start(number)
        for name, value in hosts.environment.items():
            patch.setenv(name, value)
        with Training(config, hosts.address, tmp_path, *hosts.on(1)) as training:
            training.wait_for_step(4, workers=3)
            hosts.cut(3)
            training.wait_for_step(5, tries=2, workers=2)
            training.wait_for_checkpoint()
            hosts.mend(3)
            training.wait_for_step(6, tries=3, workers=3)
            training.stop()
            result = training.end()
    found = training.audit()
    print("\n".join(found.lines()))
    assert result["state"] == "stopped" and found.exact
    assert [span.workers for span in found.spans] == [3, 2, 3]
    assert all(epoch.once == TRAIN for epoch in found.epochs if epoch.closed)
