"""The cluster launcher's file for AWS: Ray's own checks, EC2's own parameters, and what cluster/README.md promises."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
import yaml
from botocore.loaders import Loader
from botocore.model import ServiceModel
from botocore.validate import ParamValidator
from ray.autoscaler._private.aws.config import _configure_from_network_interfaces
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs import cli
from tests.support import REPO

FOLDER = REPO / "cluster/aws"
README = (REPO / "cluster/README.md").read_text(encoding="utf-8")
BUCKET = "arn:aws:s3:::vidfuse-example-bucket"


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def ec2() -> ServiceModel:
    """EC2 as botocore knows it."""
    return ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")


def settings() -> dict[str, str]:
    lines = (FOLDER / "node.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def policy(name: str) -> list[dict[str, Any]]:
    document = json.loads((FOLDER / f"policies/{name}.json").read_text())
    assert document["Version"] == "2012-10-17" and set(document) == {"Version", "Statement"}
    return document["Statement"]


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {a for s in statements for a in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}


# --- Ray and EC2 take it ---


def test_ray_takes_it(config):
    """As `ray up` does: defaults are filled in, then Ray's schema and its own rules."""
    whole = prepare_config(config)
    validate_config(whole)
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands"):
        assert whole[name] == config[name], f"Ray's defaults are not mixed in: {name}"
    assert whole["head_setup_commands"] == config["setup_commands"], "Ray's default would install another boto3"


def test_ray_refuses_an_unknown_key(config):
    config["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(config))


def machines(config):
    made = {name: kind["node_config"] for name, kind in config["available_node_types"].items()}
    made["gpu_spot with EFA"] = {**made["gpu_spot"], **yaml.safe_load((FOLDER / "efa.yaml").read_text())}
    return made


def test_ec2_takes_the_machines(config, ec2):
    """Every field is a parameter of RunInstances, of the right type; Ray adds the counts."""
    shape = ec2.operation_model("RunInstances").input_shape
    for name, machine in machines(config).items():
        given = {**machine, "MinCount": 1, "MaxCount": 1}
        report = ParamValidator().validate(given, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
        unknown = set(given) - set(shape.members)
        assert not unknown, f"{name}: RunInstances has no {unknown}"
        types = shape.members["InstanceType"].enum
        assert machine["InstanceType"] in types, f"{name}: EC2 has no {machine['InstanceType']}"


def test_efa_goes_with_rays_launcher(config):
    """Ray moves subnets and groups of interfaces to the machine, and refuses them at both."""
    changed = copy.deepcopy(config)
    changed["available_node_types"]["gpu_spot"]["node_config"] = machines(config)["gpu_spot with EFA"]
    made = _configure_from_network_interfaces(changed)["available_node_types"]["gpu_spot"]["node_config"]
    assert made["SubnetIds"] and made["SecurityGroupIds"]


# --- what it costs ---


def test_the_head_is_on_demand_and_the_rest_on_spot(config):
    for name, kind in config["available_node_types"].items():
        market = kind["node_config"].get("InstanceMarketOptions", {})
        assert (market.get("MarketType") == "spot") == (name != config["head_node_type"]), name
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}, "no task or worker is on the head"


def test_machines_have_bounds_and_go_when_idle(config):
    kinds = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert all(kind["min_workers"] <= kind["max_workers"] for kind in kinds.values())
    assert config["max_workers"] == sum(kind["max_workers"] for kind in kinds.values())
    assert 0 < config["idle_timeout_minutes"] <= 15
    assert config["provider"]["cache_stopped_nodes"] is False, "stopped machines' disks cost"
    assert kinds["gpu_spot"]["min_workers"] >= 1, "a run takes GPUs for its own that are there when it starts"
    for kind in config["available_node_types"].values():
        (disk,) = kind["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["DeleteOnTermination"] and disk["Ebs"]["Encrypted"]


# --- safety ---


def test_the_token_is_there_and_asked_for(config):
    assert settings()["RAY_AUTH_MODE"] == "token"
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [line for line in config[name] if "ray start" in line]
        assert ". ~/vidfuse/cluster/aws/node.env" in start.split("ray start")[0], name


def test_the_dashboard_is_reached_through_ssh_only(config):
    (start,) = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start
    assert "security_group" not in config["provider"], "Ray's own group opens SSH and nothing else to the outside"


def test_no_credential_is_in_a_file():
    found = re.compile(
        r"AKIA[0-9A-Z]{16}|-----BEGIN|(secret_access_key|access_key_id|auth_token)\"?\s*[=:]\s*\"?[\w/+]{8}", re.IGNORECASE
    )
    for path in (REPO / "cluster").rglob("*"):
        if path.is_file() and path.suffix in {".yaml", ".json", ".env", ".md", ".py", ""}:
            hit = found.search(path.read_text(encoding="utf-8"))
            assert not hit, f"{path}: {hit[0]}"


def test_machines_have_roles_and_the_second_metadata_service(config):
    for name, kind in config["available_node_types"].items():
        machine = kind["node_config"]
        assert machine["IamInstanceProfile"]["Name"] == ("vidfuse-head" if name == "head" else "vidfuse-worker")
        assert machine["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}


def test_storage_rights_are_the_least():
    """Reading the bucket, writing below runs/; no right to change the bucket, no wildcard action."""
    statements = policy("storage")
    assert not [a for a in actions(statements) if "*" in a]
    writes = {s["Resource"] for s in statements if any(a.startswith(("s3:Put", "s3:Delete", "s3:Abort")) for a in actions([s]))}
    assert writes == {f"{BUCKET}/runs/*"}
    assert {s["Resource"] for s in statements} == {BUCKET, f"{BUCKET}/*", f"{BUCKET}/runs/*"}
    assert actions(statements) == {
        "s3:ListBucket",
        "s3:GetBucketLocation",
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
        "s3:ListMultipartUploadParts",
    }


def test_the_heads_rights_are_those_of_its_own_machines(config, ec2):
    statements = {s["Sid"]: s for s in policy("launch")}
    rights = actions(list(statements.values()))
    assert not [a for a in rights if "*" in a]
    assert {a.split(":")[1] for a in rights if a.startswith("ec2:")} <= set(ec2.operation_names), "EC2 has these operations"
    started = {kind["node_config"]["InstanceType"] for name, kind in config["available_node_types"].items() if name != "head"}
    condition = statements["StartKnownTypes"]["Condition"]["StringEquals"]
    assert set(condition["ec2:InstanceType"]) == started
    assert condition["aws:RequestTag/ray-cluster-name"] == config["cluster_name"]
    assert statements["RunItsOwn"]["Condition"]["StringEquals"] == {"ec2:ResourceTag/ray-cluster-name": config["cluster_name"]}
    assert statements["GiveTheWorkersRole"]["Resource"].endswith(":role/vidfuse-worker")
    assert [s for s in statements.values() if s["Resource"] == "*"] == [statements["Look"]], "only looking is everywhere"
    image = config["available_node_types"]["head"]["node_config"]["ImageId"].removeprefix("resolve:ssm:")
    assert image.startswith(statements["FindTheImage"]["Resource"].split(":parameter")[1].rstrip("*"))


def test_the_bucket_takes_encrypted_connections_only():
    (statement,) = policy("bucket")
    assert statement["Effect"] == "Deny" and statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert statement["Resource"] == [BUCKET, f"{BUCKET}/*"]


# --- what runs there ---


def test_machines_have_the_pinned_versions(config):
    """The project as it lies in the checkout, with constraints.txt; Ray comes from nowhere else."""
    installs = [line for line in config["setup_commands"] if "pip install" in line and "pip>=" not in line]
    assert len(installs) == 1 and "--constraint ~/vidfuse/constraints.txt" in installs[0]
    assert config["file_mounts"]["/home/ubuntu/vidfuse"] == "."
    assert not [line for line in [*config["setup_commands"], *config["head_setup_commands"]] if "ray" in line.split()]


def test_settings_are_those_of_the_jobs(config):
    made = settings()
    assert {name: made.get(name) for name in cli.RAY_SETTINGS} == cli.RAY_SETTINGS
    assert made["AWS_REGION"] == config["provider"]["region"]
    assert config["provider"]["availability_zone"].startswith(config["provider"]["region"])


def test_spot_notices_reach_ray(config):
    (watch,) = [line for line in config["worker_start_ray_commands"] if "drain.py" in line]
    assert watch.endswith("/home/ubuntu/vidfuse/cluster/drain.py watch") and (REPO / "cluster/drain.py").is_file()
    assert "RAY_AUTH_MODE=token" in watch


def test_ports_are_those_of_the_docs(config):
    lines = " ".join([*config["head_start_ray_commands"], *config["worker_start_ray_commands"]])
    for name, port in re.findall(r"--(port|dashboard-port|metrics-export-port)=(\d+)", lines):
        assert re.search(rf"\| {port} \| `", README), f"the README's table of ports lacks {port} ({name})"
