"""Prometheus for tests: the project's expressions, and a server on loopback that scrapes a cluster of the test's own."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import REPO

MONITORING = REPO / "cluster/monitoring"
DASHBOARDS = sorted((MONITORING / "grafana").glob("*.json"))


def needed(binary: str) -> str:
    """The path of a program, or the test is skipped."""
    found = shutil.which(binary)
    if found is None:
        pytest.skip(f"{binary} is not on PATH (Debian's package prometheus has prometheus and promtool)")
    return found


def alerts() -> dict[str, str]:
    """The expression of each alert."""
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def panels() -> list[tuple[str, str]]:
    """Each expression of each panel, with where it is; variables stand for all."""
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found.append((f"{path.stem}: {panel['title']}", re.sub(r"\$\w+", ".*", target["expr"])))
    return found


class Prometheus:
    """A server that answers."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query."""
        words = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{words}", timeout=10) as answer:
            result: list[dict[str, Any]] = json.loads(answer.read())["data"]["result"]
            return result

    def value(self, expression: str) -> float | None:
        """The value of an instant query of one series."""
        found = self.query(expression)
        return float(found[0]["value"][1]) if found else None

    def wait(self, what: str, wanted: Callable[[], Any], seconds: float = 90) -> float:
        """Wait until `wanted()` is true; how long it took."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            if wanted():
                return time.monotonic() - began
            time.sleep(0.5)
        raise AssertionError(f"no {what} in {seconds:g} s")

    def lacking(self, expressions: dict[str, str], seconds: float = 60) -> dict[str, str]:
        """Those that have not given data in this time."""
        left, deadline = dict(expressions), time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            left = {name: expression for name, expression in left.items() if not self.query(expression)}
            time.sleep(0.5)
        return left


@contextlib.contextmanager
def prometheus(folder: Path, discovery: Path, *, seconds: int = 1) -> Iterator[Prometheus]:
    """A server with the project's configuration, but for where the list of nodes is and how often it looks."""
    program = needed("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    [job] = config["scrape_configs"]
    [found] = job["file_sd_configs"]
    assert found["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    found["files"] = [str(discovery)]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    words = [program, f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    with open(folder / "prometheus.log", "wb") as log:
        server = subprocess.Popen([*words, f"--storage.tsdb.path={folder / 'data'}"], stdout=log, stderr=log)
    try:
        made = Prometheus(f"http://{address}")

        def ready() -> bool:
            assert server.poll() is None, (folder / "prometheus.log").read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError):
                return bool(urllib.request.urlopen(f"{made.url}/-/ready", timeout=5).status == 200)
            return False

        made.wait("Prometheus", ready, 30)
        yield made
    finally:
        server.terminate()
        server.wait(20)
