"""A real Prometheus scrapes a real training, a scoring and a search: all metrics, all panels, alerts whose faults are made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import config_of, hurt_set
from tests.monitoring import Prometheus, alerts, needed, panels, prometheus
from tests.raylets import Training, nodes
from vidfuse.config import override
from vidfuse.on_ray.metrics import METRICS

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow]
GPU = re.compile(r"ray_node_gpus_utilization|ray_node_gram_used|ray_vidfuse_mfu_ratio")
OTHERS = re.compile(r"ray_vidfuse_(evaluation|search)|trial-")
GONE_SECONDS = 15
"""Until the series of processes that were killed are gone: two reports of a second, and the list of nodes is renewed every 5."""


@pytest.fixture(scope="module")
def cluster(s3):
    needed("prometheus")
    with nodes(2, {**s3.environment, "RAY_metrics_report_interval_ms": "1000"}, dashboard=True) as made:
        yield made


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    with prometheus(tmp_path_factory.mktemp("prometheus"), cluster.discovery) as made:
        yield made


@pytest.fixture(scope="module")
def config(s3, tmp_path_factory):
    url = s3.url("watched")
    hurt_set(url, tmp_path_factory.mktemp("source"))
    train = {"validate_every_epochs": 3, "micro_batch": 3, "log_every_steps": 1}
    return override(config_of(url, s3.url("runs"), "watched", 2, **train), ["data.unreadable_limit=0.2"])


def loosened(expression: str) -> str:
    """An alert's expression that any value passes: it has data where the alert's metrics have."""
    return re.sub(r"[<>]=? ?[\d.]+$|== 0$", ">= -1", expression)


def test_a_training_is_seen_and_so_are_its_faults(cluster, server, config, tmp_path):
    with Training(config, cluster.address, tmp_path) as training:
        training.wait_for_step(4, workers=2)
        rows = {
            m.name: s for m in METRICS.values() for s in m.series if m.teller in ("worker", "rank 0", "driver") and not m.gpu
        }
        assert server.lacking(rows) == {}
        ranks = {found["metric"]["rank"] for found in server.query("ray_vidfuse_step_seconds")}
        assert ranks == {"0", "1"} and server.value("max(ray_vidfuse_world_size)") == 2

        shown = {f"{place}: {expr}": expr for place, expr in panels() if not GPU.search(expr) and not OTHERS.search(expr)}
        assert server.lacking(shown) == {}
        assert server.lacking({name: loosened(expr) for name, expr in alerts().items() if name != "WorldSizeBelowWanted"}) == {}

        assert server.lacking({"CorruptSamples": alerts()["CorruptSamples"]}) == {}  # two of its videos are
        assert server.query(alerts()["WorldSizeBelowWanted"]) == []

        before = {found["metric"]["WorkerId"] for found in server.query("ray_vidfuse_samples_total")}
        targets = server.value("count(up)")
        cluster.kill(cluster.nodes[0])
        took = server.wait(
            "end of the series of killed workers",
            lambda: not before & {found["metric"]["WorkerId"] for found in server.query("ray_vidfuse_samples_total")},
        )
        assert took < GONE_SECONDS, f"they were gone after {took:.1f} s"
        more = server.wait("end of the target", lambda: server.value("count(up)") == targets - 1)
        print(f"series were gone after {took:.1f} s, the target after {took + more:.1f} s")
        assert server.lacking({"fewer": alerts()["WorldSizeBelowWanted"]}) == {}
        server.wait("a restart", lambda: (server.value("max(ray_vidfuse_restarts_total)") or 0) >= 1)
        server.wait("a worker again", lambda: server.value("max(ray_vidfuse_world_size)") == 1)
        assert server.value("max(ray_vidfuse_lost_seconds_total)") > 0
        cluster.add()  # Prometheus finds it by itself
        server.wait("a new target", lambda: server.value("count(up == 1)") == targets)
        training.stop()
        training.end()
    server.wait("end of the run's series", lambda: not server.query('{__name__=~"ray_vidfuse_.*"}'))


class Job:
    """A job on a cluster, and what it says."""

    def __init__(self, address: str, log: Path, *words: str) -> None:
        self._log, env = log, {**os.environ, "RAY_ADDRESS": address}  # where it runs it leaves its study
        with open(log, "wb") as file:
            self.process = subprocess.Popen([sys.executable, "-m", *words], cwd=log.parent, env=env, stdout=file, stderr=file)

    def shows(self, server: Prometheus, expressions: dict[str, str], seconds: float) -> None:
        """All of these give data while it runs, or shortly after."""
        assert server.lacking(expressions, seconds) == {}, self._log.read_text()[-6000:]

    def end(self) -> None:
        assert self.process.wait(120) == 0, self._log.read_text()[-6000:]


def of(teller: str) -> dict[str, str]:
    return {metric.full_name: metric.full_name for metric in METRICS.values() if metric.teller == teller}


def shown(words: str) -> dict[str, str]:
    return {f"{place}: {expr}": expr for place, expr in panels() if re.search(words, expr)}


def test_scores_are_seen(cluster, server, config, tmp_path):
    """Of the run of the test before."""
    scoring = Job(cluster.address, tmp_path / "log", "jobs.evaluate", "--run", f"{config.run.storage}/watched")
    scoring.shows(server, {**of("evaluation"), **shown("_evaluation_")}, 120)
    scoring.end()


def test_a_search_is_seen(cluster, server, config, tmp_path):
    (tmp_path / "space.yaml").write_text("train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}\n")
    base = override(config, ["run.name=found", "train.epochs=3", "train.validate_every_epochs=1", "cluster.workers=1"])
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    words = ["--config", str(tmp_path / "base.yaml"), "--space", str(tmp_path / "space.yaml"), "--trials", "2"]
    searching = Job(cluster.address, tmp_path / "log", "jobs.tune", *words)
    searching.shows(server, {**of("search"), **shown("_search_|trial-")}, 150)
    searching.end()
