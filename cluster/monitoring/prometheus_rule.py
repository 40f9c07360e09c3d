"""The alerts as an object of the Prometheus operator, for cluster/kuberay.

python cluster/monitoring/prometheus_rule.py    writes cluster/kuberay/base/prometheus-rule.yaml anew

Comes in: alerts.yml, of which there is one. Goes out: the same text below `spec`; a test compares them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

SOURCE = Path(__file__).with_name("alerts.yml")
MADE = Path(__file__).parents[1] / "kuberay/base/prometheus-rule.yaml"
HEAD = """\
# Made of cluster/monitoring/alerts.yml by `python cluster/monitoring/prometheus_rule.py`: change that one.
# For the Prometheus operator (kube-prometheus-stack as release `prometheus` in namespace `monitoring`).
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vidfuse
  labels:
    release: prometheus
spec:
"""


def manifest(alerts: str) -> str:
    """The object's YAML.

    Args:
        alerts: a file of rules as Prometheus reads it.
    """
    return HEAD + textwrap.indent(alerts[alerts.index("groups:") :], "  ")


if __name__ == "__main__":
    MADE.write_text(manifest(SOURCE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{MADE} is made of {SOURCE.name}")
