"""Dashboards and alerts ask for metrics that there are, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import yaml

from tests.monitoring import DASHBOARDS, MONITORING, alerts, needed, panels
from vidfuse.on_ray.metrics import METRICS, PREFIX, markdown

KNOWN = {
    "ray_actors", "ray_cluster_active_nodes", "ray_node_cpu_utilization", "ray_node_disk_free", "ray_node_gpus_utilization",
    "ray_node_gram_used", "ray_node_mem_total", "ray_node_mem_used", "ray_node_network_receive_speed", "ray_node_network_send_speed",
    "ray_object_store_available_memory", "ray_object_store_used_memory", "ray_tasks",
}  # fmt: skip
"""Of Ray 2.60's own; tests/on_ray/test_prometheus.py finds those of nodes without GPUs."""
SERIES = {series for metric in METRICS.values() for series in metric.series}
RAYS_NODES = "/tmp/ray/prom_metrics_service_discovery.json"
NAME = re.compile(r"\bray_\w+")


def rules() -> list[dict]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.parametrize("where", [*alerts(), *dict(panels())])
def test_expressions_name_metrics_that_there_are(where):
    expressions = [alerts()[where]] if where in alerts() else [expr for place, expr in panels() if place == where]
    for expression in expressions:
        names = set(NAME.findall(expression))
        assert names <= SERIES | KNOWN, expression
        assert names or "up{" in expression or "ALERTS" in expression


def test_every_metric_is_on_a_dashboard():
    shown = {name for _, expression in panels() for name in NAME.findall(expression)}
    assert {metric.full_name for metric in METRICS.values() if not shown.intersection(metric.series)} == set()


def test_grafana_can_load_the_dashboards():
    assert {path.stem for path in DASHBOARDS} == {"training", "ingest", "cluster", "search"}
    [source] = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    for path in DASHBOARDS:
        dashboard = json.loads(path.read_text())
        assert dashboard["uid"] == f"vidfuse-{path.stem}" and len({panel["id"] for panel in dashboard["panels"]}) == len(
            dashboard["panels"]
        )
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        for panel in dashboard["panels"]:
            assert panel["datasource"]["uid"] == source["uid"]
            for target in panel["targets"]:
                assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
        for variable in dashboard["templating"]["list"]:
            assert set(NAME.findall(variable["query"]["query"])) <= SERIES


def test_alerts_say_what_to_do():
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]


def test_each_alert_has_a_test():
    cases = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {test["alertname"] for case in cases for test in case.get("alert_rule_test", ()) if test["exp_alerts"]}
    assert fired == set(alerts())


def test_names_follow_prometheus():
    for metric in METRICS.values():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        units = {"seconds": "_seconds", "Unix time": "_timestamp_seconds", "bytes": "_bytes", "0 to 1": "_ratio"}
        assert metric.name.removesuffix("_total").endswith(units.get(metric.unit, "")), metric


def test_the_table_names_each_metric_once():
    lines = markdown()
    assert len(lines) == len(METRICS) + 2
    assert [line.split("`")[1] for line in lines[2:]] == [f"{PREFIX}{name}" for name in METRICS]


@pytest.mark.parametrize(
    "words", [["test", "rules", "alerts_test.yml"], ["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]]
)
def test_promtool_agrees(tmp_path, words):
    """Of a copy with a list of nodes of its own: Ray's may be there, be that of another cluster, or be left over from one that is gone."""
    folder, nodes = shutil.copytree(MONITORING, tmp_path / "monitoring"), tmp_path / "nodes.json"
    nodes.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": ["127.0.0.1:8080"]}]))
    config = (folder / "prometheus.yml").read_text()
    assert config.count(RAYS_NODES) == 1
    (folder / "prometheus.yml").write_text(config.replace(RAYS_NODES, str(nodes)))
    done = subprocess.run([needed("promtool"), *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
