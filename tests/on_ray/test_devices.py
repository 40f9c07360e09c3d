"""A worker whose GPU cannot be used says at its start which machine it is on, what torch sees there, and what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import ray
import torch
from ray.train.v2.api.exceptions import ControllerError

from tests import support
from vidfuse.config import RunConfig
from vidfuse.on_ray import devices, fit, recovery, worker
from vidfuse.on_ray.devices import Sight, fault_of, hold, look
from vidfuse.on_ray.recovery import QuickTorchBackend, QuickTorchConfig
from vidfuse.train.errors import RunError

GOOD = Sight("node-1 (10.0.0.1)", "2.12.1", "13.0", "NVIDIA A10G", bf16=True)
OLD = Sight("node-2 (10.0.0.2)", "2.12.1", "13.0", "Tesla T4", bf16=False)
BLIND = Sight("node-3 (10.0.0.3)", "2.12.1", "13.0", None, fault="Found no NVIDIA driver on your system.")
CPU = Sight("node-4 (10.0.0.4)", "2.12.1+cpu", None, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_gpu_that_can_be_used_is_fine(precision):
    assert fault_of(GOOD, precision) is None
    hold([GOOD, GOOD], precision)


@pytest.mark.parametrize(
    ("sight", "precision", "words"),
    [
        (
            CPU,
            "fp32",
            ["node-4 (10.0.0.4)", "torch 2.12.1+cpu there is a build for CPUs", "constraints.txt", "cluster/Dockerfile"],
        ),
        (
            BLIND,
            "fp32",
            ["node-3 (10.0.0.3)", "for CUDA 13.0 sees none", "no NVIDIA driver", "nvidia-smi", "580 or newer", "device plugin"],
        ),
        (OLD, "bf16", ["node-2 (10.0.0.2)", "train.precision is bf16", "Tesla T4", "train.precision=fp16 or fp32"]),
    ],
)
def test_what_is_wrong_is_told_in_a_line(sight, precision, words):
    with pytest.raises(RunError) as told:
        hold([GOOD, sight, sight], precision)
    said = str(told.value)
    assert all(word in said for word in words), said
    assert "\n" not in said and said.count(sight.host) == 1 and GOOD.host not in said


def test_old_gpus_train_in_other_precisions():
    hold([OLD], "fp32")
    hold([OLD], "fp16")


def test_what_torch_says_is_seen(monkeypatch):
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.9")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert look().build is None
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def without_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", without_driver)
    seen = look()
    assert (seen.build, seen.gpu, seen.fault) == ("13.0", None, "Found no NVIDIA driver on your system")
    assert "10.0.0.9" in seen.host and seen.torch == torch.__version__


@pytest.mark.gpu
def test_a_gpu_is_seen():
    seen = look()
    assert seen.gpu == torch.cuda.get_device_name(0) and fault_of(seen, "fp32") is None


class Group:
    """Workers as a backend has them."""

    def __init__(self, gpus: float, sights: list[Sight]):
        self._gpus, self._sights, self.asked = gpus, sights, []

    def get_resources_per_worker(self):
        return {"CPU": 1, "GPU": self._gpus} if self._gpus else {"CPU": 1}

    def execute(self, function):
        self.asked.append(function)
        return self._sights


@pytest.fixture
def joined(monkeypatch):
    """Groups that were joined."""
    found: list[Group] = []
    monkeypatch.setattr(recovery._TorchBackend, "on_start", lambda self, group, config: found.append(group))
    return found


def test_workers_are_looked_at_before_they_join(joined):
    group = Group(1, [GOOD, BLIND])
    with pytest.raises(RunError, match=r"node-3 .* sees none there"):
        QuickTorchBackend().on_start(group, QuickTorchConfig())
    assert group.asked == [devices.look] and not joined
    with pytest.raises(RunError, match=r"train\.precision is bf16"):
        QuickTorchBackend().on_start(Group(1, [OLD]), QuickTorchConfig(precision="bf16"))
    QuickTorchBackend().on_start(Group(1, [GOOD]), QuickTorchConfig(precision="bf16"))
    assert len(joined) == 1


def test_workers_without_gpus_are_not(joined):
    group = Group(0, [CPU])
    QuickTorchBackend().on_start(group, QuickTorchConfig(precision="bf16"))
    assert joined == [group] and not group.asked


def test_the_driver_tells_it_as_it_is():
    """Ray wraps what its controller raises in a heading of its own."""

    class Quiet:
        class fault:  # noqa: N801
            @staticmethod
            def remote():
                return None

    told = ControllerError(RunError("node-3: no GPU"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit.ray, "get", lambda *_, **__: None)
        assert fit._reason(Quiet, told) == "node-3: no GPU"
        assert "Training failed due to controller error" in fit._reason(Quiet, ControllerError(ValueError("x")))


SCRIPT = """
import sys, ray
from ray.train import RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from vidfuse.on_ray import fit
from vidfuse.on_ray.monitor import Monitor
from vidfuse.on_ray.recovery import QuickTorchConfig
from vidfuse.on_ray.trainer import Trainer

ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1])
monitor = Monitor.remote("one")
scaling = ScalingConfig(num_workers=1, use_gpu=True, resources_per_worker={"CPU": 1, "GPU": 1})
trainer = Trainer(lambda: None, torch_config=QuickTorchConfig(), scaling_config=scaling,
                  run_config=RunConfig(name="one", storage_path=sys.argv[1] + "/runs"))
try:
    trainer.fit()
except TrainingFailedError as error:
    print(fit._reason(monitor, error))
"""


@pytest.mark.ray
@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU, on which Ray is told that there is one")
def test_a_cluster_that_only_says_that_it_has_gpus():
    """At the first start of the workers, and not tried again."""
    scratch = tempfile.mkdtemp(prefix="vfd-", dir="/tmp")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(support.REPO), environment.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, scratch], env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        said = done.stdout.strip().splitlines()[-1]
        assert re.match(
            r"\S+ \([\d.]+\): Ray gives the worker a GPU, but torch \S+ (there is a build for CPUs|for CUDA \S+ sees none)",
            said,
        )
    finally:
        support.end_cluster(Path(scratch))
        shutil.rmtree(scratch, ignore_errors=True)


def test_a_trial_looks_at_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(worker.ray, "get_gpu_ids", lambda: [0])
    monkeypatch.setattr(devices, "look", lambda: CPU)
    with pytest.raises(RunError, match="a build for CPUs"):
        worker.LoneWorker(RunConfig(storage=str(tmp_path)), lambda _: None, threading.Event(), precision="bf16")
