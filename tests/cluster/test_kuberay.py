"""The manifests for Kubernetes: they fit the schemas, hold together, and keep to what cluster/README.md promises."""

from __future__ import annotations

import gzip
import json
import re
import runpy
import shlex
import shutil
import subprocess
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs import cli
from tests.kustomize import build, named, pod_templates
from tests.monitoring import needed
from tests.support import REPO, shared_data

FOLDER = REPO / "cluster/kuberay"
KINDS = ["base", "overlays/spot", "overlays/dev", "overlays/job"]
README = (REPO / "cluster/README.md").read_text(encoding="utf-8")
RAY = re.search(r"^ray==(.+)$", (REPO / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
KUBERNETES = "1.31"
"""The oldest version of Kubernetes that README.md names."""
CORE = {"v1", "networking.k8s.io/v1", "policy/v1"}


@pytest.fixture(scope="module", params=KINDS)
def manifests(request) -> list[dict[str, Any]]:
    return build(FOLDER / request.param)


def clusters(manifests):
    """The specs of RayClusters, those inside RayJobs among them."""
    for manifest in manifests:
        if manifest["kind"] == "RayCluster":
            yield manifest["spec"]
        if manifest["kind"] == "RayJob":
            yield manifest["spec"]["rayClusterSpec"]


def pods(manifests):
    return [(f"{m['kind']}/{at}", pod) for m in manifests for at, pod in pod_templates(m)]


def containers(manifests):
    return [(f"{at}/{c['name']}", c) for at, pod in pods(manifests) for c in pod["spec"]["containers"]]


# --- schemas ---


@pytest.mark.parametrize("kind", KINDS)
def test_kustomize_says_the_same(kind):
    """What the other tests look at is what a user applies."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine")
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / kind)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert named([m for m in yaml.safe_load_all(done.stdout) if m]) == named(build(FOLDER / kind))


def strict(schema: Any) -> Any:
    """A CRD's schema for jsonschema: fields that Kubernetes would drop without a word are refused."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and "type" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


@pytest.fixture(scope="module")
def resources() -> dict[str, Any]:
    """The schemas of KubeRay's resources, by kind."""
    found = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for name in ("rayclusters", "rayjobs"):
        path = shared_data(f"schemas/ray.io_{name}.yaml.gz")
        definition = yaml.load(gzip.decompress(path.read_bytes()), Loader=loader)
        (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[definition["spec"]["names"]["kind"]] = schema
    return found


def test_rays_resources_fit_kuberays_schemas(manifests, resources):
    ours = [m for m in manifests if m["apiVersion"] == "ray.io/v1"]
    assert ours
    for manifest in ours:
        jsonschema.validate(manifest, resources[manifest["kind"]])


def test_the_schemas_refuse_a_field_that_is_not_there(resources):
    (cluster,) = [m for m in build(FOLDER / "base") if m["kind"] == "RayCluster"]
    cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["tolerationz"] = []
    with pytest.raises(jsonschema.ValidationError, match="tolerationz"):
        jsonschema.validate(cluster, resources["RayCluster"])


def test_kubernetes_own_resources_fit_its_schemas(manifests):
    ours = [m for m in manifests if m["apiVersion"] in CORE]
    assert {m["kind"] for m in ours} == {"Namespace", "ServiceAccount", "ConfigMap", "NetworkPolicy", "PodDisruptionBudget"}
    for manifest in ours:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    for _, pod in pods(manifests):
        meta = {"metadata": {"name": "pod", **pod.get("metadata", {})}}
        kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **meta, "spec": pod["spec"]}, KUBERNETES, strict=True)


# --- safety ---


def test_pods_keep_to_the_restricted_standard(manifests):
    """https://kubernetes.io/docs/concepts/security/pod-security-standards, as the namespace enforces it."""
    labels = named(manifests)["Namespace", "vidfuse"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for at, pod in pods(manifests):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0, at
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, at
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"]), at
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", [])), at
    locked = [(at, c["securityContext"]) for at, c in containers(manifests)]
    locked += [("autoscaler", spec["autoscalerOptions"]["securityContext"]) for spec in clusters(manifests)]
    for at, security in locked:
        assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}, at


def test_what_is_asked_for_is_the_limit(manifests):
    sizes = [(at, c["resources"]) for at, c in containers(manifests)]
    sizes += [("autoscaler", spec["autoscalerOptions"]["resources"]) for spec in clusters(manifests)]
    assert len(sizes) >= 3
    for at, size in sizes:
        assert size["requests"] == size["limits"] and {"cpu", "memory", "ephemeral-storage"} <= set(size["limits"]), at


def test_no_value_is_secret(manifests):
    assert not [m for m in manifests if m["kind"] == "Secret"], "a Secret in a file is none"
    for at, container in containers(manifests):
        for variable in container.get("env", []):
            assert "value" not in variable and set(variable["valueFrom"]) == {"secretKeyRef"}, (at, variable["name"])
    settings = named(manifests)["ConfigMap", "vidfuse-settings"]["data"]
    assert not [name for name in settings if re.search("TOKEN|SECRET|PASSWORD|ACCESS_KEY", name.upper())]


def test_only_its_own_pods_the_operator_and_prometheus_reach_ray(manifests):
    policy = named(manifests)["NetworkPolicy", "vidfuse-ray"]["spec"]
    assert policy["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}  # KubeRay labels every Ray pod so
    assert policy["policyTypes"] == ["Ingress"] and all(rule["from"] for rule in policy["ingress"])
    assert [rule for rule in policy["ingress"] if "ports" not in rule] == [{"from": [{"podSelector": policy["podSelector"]}]}]
    assert not any("type" in m.get("spec", {}) for m in manifests if m["kind"] == "Service")


def test_the_token_is_asked_for(manifests):
    for spec in clusters(manifests):
        assert spec["authOptions"] == {"mode": "token", "secretName": "vidfuse-auth"}
    assert "kubectl -n vidfuse create secret generic vidfuse-auth --from-literal=auth_token=" in README


# --- references ---


def test_what_is_named_is_there(manifests):
    """Service accounts and config maps are declared; secrets are not, the README has the command for each."""
    accounts = {m["metadata"]["name"] for m in manifests if m["kind"] == "ServiceAccount"}
    maps = {m["metadata"]["name"] for m in manifests if m["kind"] == "ConfigMap"}
    secrets = {spec["authOptions"]["secretName"] for spec in clusters(manifests)}
    for at, pod in pods(manifests):
        assert pod["spec"]["serviceAccountName"] in accounts, at
    for at, container in containers(manifests):
        for source in container.get("envFrom", []):
            assert source["configMapRef"]["name"] in maps, at
        secrets |= {v["valueFrom"]["secretKeyRef"]["name"] for v in container.get("env", [])}
    assert secrets == {"vidfuse-auth", "vidfuse-storage", "vidfuse-mlflow"}
    for name in secrets:
        assert f"kubectl -n vidfuse create secret generic {name} " in README, name
    assert all(m["metadata"].get("namespace", "vidfuse") == "vidfuse" for m in manifests)


def test_ray_is_the_same_everywhere(manifests):
    assert all(spec["rayVersion"] == RAY for spec in clusters(manifests))
    images = {c["image"] for _, c in containers(manifests)}
    assert len(images) == 1, "head, workers and the submitting pod are of one image"
    assert images <= {f"ghcr.io/example/vidfuse:0.1.0-ray{RAY}", "vidfuse:dev"} and all(image in README for image in images)


def test_ports_are_those_of_the_docs(manifests):
    for spec in clusters(manifests):
        (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
        ports = {p["name"]: p["containerPort"] for p in head["ports"]}
        monitor = named(manifests)["PodMonitor", "vidfuse-ray"]["spec"]
        assert {e["port"] for e in monitor["podMetricsEndpoints"]} <= set(ports)
        for rule in named(manifests)["NetworkPolicy", "vidfuse-ray"]["spec"]["ingress"]:
            assert {p["port"] for p in rule.get("ports", [])} <= set(ports.values())
        for name, port in ports.items():
            assert re.search(rf"\| {port} \| `{name}` \|", README), f"the README's table of ports lacks {name} {port}"
        for group in spec["workerGroupSpecs"]:
            (worker,) = group["template"]["spec"]["containers"]
            assert {p["name"]: p["containerPort"] for p in worker["ports"]} == {"metrics": ports["metrics"]}


def test_settings_are_those_of_the_jobs(manifests):
    settings = named(manifests)["ConfigMap", "vidfuse-settings"]["data"]
    assert {name: settings.get(name) for name in cli.RAY_SETTINGS} == cli.RAY_SETTINGS


# --- what Prometheus is to hear of ---

DURATION = {
    "type": "string",
    "pattern": "^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
}
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
RULE = {
    "alert": {"type": "string"},
    "expr": {"type": ["string", "integer"]},
    "for": DURATION,
    "labels": WORDS,
    "annotations": WORDS,
}
GROUP = {
    "name": {"type": "string", "minLength": 1},
    "interval": DURATION,
    "rules": {
        "type": "array",
        "items": {"type": "object", "properties": RULE, "required": ["alert", "expr"], "additionalProperties": False},
    },
}
GROUPS = {"type": "object", "properties": GROUP, "required": ["name", "rules"], "additionalProperties": False}
ALERTS = {
    "type": "object",
    "properties": {"groups": {"type": "array", "minItems": 1, "items": GROUPS}},
    "required": ["groups"],
    "additionalProperties": False,
}
"""`spec` of the operator's PrometheusRule, as far as alerts have it (its CRD, August 2026)."""


def test_the_alerts_are_those_of_prometheus(manifests):
    """There is one source of them; `python cluster/monitoring/prometheus_rule.py` makes the other file."""
    source = (REPO / "cluster/monitoring/alerts.yml").read_text(encoding="utf-8")
    made = (FOLDER / "base/prometheus-rule.yaml").read_text(encoding="utf-8")
    script = runpy.run_path(str(REPO / "cluster/monitoring/prometheus_rule.py"))
    assert made == script["manifest"](source), "run `python cluster/monitoring/prometheus_rule.py`"
    rule = named(manifests)["PrometheusRule", "vidfuse"]
    assert rule["spec"] == yaml.safe_load(source) and rule["apiVersion"] == "monitoring.coreos.com/v1"
    jsonschema.validate(rule["spec"], ALERTS)
    names = [alert["alert"] for group in rule["spec"]["groups"] for alert in group["rules"]]
    assert len(names) == len(set(names)) >= 8


def test_prometheus_is_found_by_the_same_label_for_both(manifests):
    """kube-prometheus-stack takes rules and monitors with its release's label."""
    monitor, rule = (
        named(manifests)[key]["metadata"]["labels"] for key in (("PodMonitor", "vidfuse-ray"), ("PrometheusRule", "vidfuse"))
    )
    assert monitor["release"] == rule["release"] == "prometheus"
    assert "release `prometheus`" in README


def test_promtool_takes_the_objects_rules(tmp_path):
    spec = named(build(FOLDER / "base"))["PrometheusRule", "vidfuse"]["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    done = subprocess.run(
        [needed("promtool"), "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "rules found" in done.stdout, done.stdout + done.stderr


def test_alerts_name_the_jobs_of_the_pod_monitor(manifests):
    """The operator calls a PodMonitor's job NAMESPACE/NAME."""
    monitor = named(manifests)["PodMonitor", "vidfuse-ray"]["metadata"]
    rules = named(manifests)["PrometheusRule", "vidfuse"]["spec"]["groups"][0]["rules"]
    (job,) = [re.search(r'up{job=~"([^"]+)"}', rule["expr"])[1] for rule in rules if "up{" in rule["expr"]]
    assert re.fullmatch(job, f"{monitor['namespace']}/{monitor['name']}")


# --- a machine that is taken away ---


def test_a_pod_that_goes_leaves_time_for_a_checkpoint(manifests):
    """preStop drains, SIGTERM has `ray start` wait, and both fit into the grace period."""
    wait = float(named(manifests)["ConfigMap", "vidfuse-settings"]["data"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    image = (REPO / "cluster/Dockerfile").read_text()
    for spec in clusters(manifests):
        for group in spec["workerGroupSpecs"]:
            pod = group["template"]["spec"]
            command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert command[:3] == ["python", "/opt/vidfuse/drain.py", "now"] and command[3] == "--seconds"
            assert f"COPY cluster/drain.py {command[1]}" in image
            assert 60 <= wait <= int(command[4]) < pod["terminationGracePeriodSeconds"] <= 120, "EC2 gives 120 s"
            assert pod["terminationGracePeriodSeconds"] - wait >= 20, "preStop's own time, and Ray's after the wait"


def test_the_head_stays_where_it_is(manifests):
    budget = named(manifests)["PodDisruptionBudget", "vidfuse-head"]["spec"]
    assert budget == {"minAvailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "head"}}}
    for spec in clusters(manifests):
        head = spec["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0", "no task or worker is on the head"
        assert "affinity" not in head["template"]["spec"], "the head is not on a spot machine"
        assert head["template"]["metadata"]["annotations"] == {
            "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
            "karpenter.sh/do-not-disrupt": "true",
        }


@pytest.mark.parametrize("kind", ["overlays/spot", "overlays/job"])
def test_spot_overlays_ask_for_spot_machines(kind):
    (spec,) = clusters(build(FOLDER / kind))
    (group,) = spec["workerGroupSpecs"]
    pod = group["template"]["spec"]
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert len(terms) == 4 and all(len(term["matchExpressions"]) == 1 for term in terms), "any of the clouds' labels will do"
    assert {t["key"] for t in pod["tolerations"]} > {"nvidia.com/gpu", "cloud.google.com/gke-spot"}


def test_what_is_not_spot_does_not():
    for kind in ("base", "overlays/dev"):
        for spec in clusters(build(FOLDER / kind)):
            assert all("affinity" not in group["template"]["spec"] for group in spec["workerGroupSpecs"])


# --- the job ---


def test_the_job_has_the_cluster_inside():
    manifests = build(FOLDER / "overlays/job")
    assert not [m for m in manifests if m["kind"] == "RayCluster"]
    (job,) = [m for m in manifests if m["kind"] == "RayJob"]
    (cluster,) = [m for m in build(FOLDER / "overlays/spot") if m["kind"] == "RayCluster"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["shutdownAfterJobFinishes"] and job["spec"]["activeDeadlineSeconds"], "nothing is left to pay for"


def test_the_jobs_command_is_elastic_within_the_clusters_bounds():
    """A run takes GPUs for its own that are there when it starts, so the fewest workers are the fewest pods."""
    (job,) = [m for m in build(FOLDER / "overlays/job") if m["kind"] == "RayJob"]
    python, module, name, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert (python, module, name) == ("python", "-m", "jobs.train")
    config = cli.config_of(cli.parser("", config=True).parse_args(arguments))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    least, most = config.cluster.workers
    assert 0 < least <= group["minReplicas"] * gpus == group["replicas"] * gpus
    assert most <= group["maxReplicas"] * gpus
    assert all(config.train.global_batch % (size * config.train.micro_batch) == 0 for size in range(least, most + 1))


def test_the_network_lets_the_submitting_pod_in():
    manifests = build(FOLDER / "overlays/job")
    (job,) = [m for m in manifests if m["kind"] == "RayJob"]
    labels = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    rules = json.dumps(named(manifests)["NetworkPolicy", "vidfuse-ray"]["spec"]["ingress"])
    assert json.dumps({"podSelector": {"matchLabels": labels}}) in rules
