"""A training leaves no placement group and no helper behind, also without a dashboard, also if its controller is killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time

import pytest
import ray
from ray._private.state import actors
from ray.train import RunConfig, ScalingConfig
from ray.util import placement_group_table

from vidfuse.on_ray.cleaner import is_alive
from vidfuse.on_ray.recovery import answering, fed
from vidfuse.on_ray.trainer import Trainer

pytestmark = pytest.mark.ray


def groups() -> set[str]:
    return {group for group, row in placement_group_table().items() if row["state"] != "REMOVED"}


def of_class(name: str) -> dict[str, int]:
    """Living actors of a class and their processes."""
    return {actor: row["Pid"] for actor, row in actors().items() if row["ActorClassName"] == name and row["State"] == "ALIVE"}


def wait(condition, seconds: float = 90) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.fixture
def trainer(ray_cluster, tmp_path):
    def make(seconds: float) -> Trainer:
        # Made here, so that Ray sends it by value.
        def loop() -> None:
            time.sleep(seconds)

        scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0.5})
        return Trainer(loop, scaling_config=scaling, run_config=RunConfig(name="it", storage_path=str(tmp_path)))

    return make


def test_a_killed_controller_leaves_no_placement_group(trainer):
    before, others, seen = groups(), of_class("TrainController"), []

    def fit() -> None:
        with pytest.raises(ray.exceptions.RayActorError):
            trainer(300).fit()
        seen.append("ended")

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    wait(lambda: groups() - before and of_class("Cleaner"))  # perhaps before its workers have started
    ((controller, pid),) = of_class("TrainController").items() - others.items()
    assert is_alive(controller)
    os.kill(pid, signal.SIGKILL)
    wait(lambda: groups() == before and not of_class("Cleaner"))
    assert not is_alive(controller)
    thread.join(90)
    assert seen == ["ended"]


def test_a_training_that_has_ended_is_over(trainer):
    """Ray's own cleaner has it wait for 12 s."""
    wait(lambda: not of_class("Cleaner"))
    before = groups()
    trainer(0).fit()
    assert wait(lambda: groups() == before and not of_class("Cleaner"), 5) < 5


def test_a_node_that_does_not_answer_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        there = listening.getsockname()[:2]
        assert answering([]) and answering([there, there])
    assert not answering([there])


@pytest.mark.parametrize(
    ("workers", "cpus", "per_worker", "reading", "left"),
    [
        (2, 2.0, 0.5, 0.5, 2),
        (2, 1.0, 0.5, 0.5, 1),
        (4, 4.0, 1.0, 1.0, 3),
        (1, 0.5, 0.5, 0.5, 1),
        (0, 0.0, 0.5, 0.5, 0),
        (8, 64.0, 4.0, 1.0, 8),
    ],
)
def test_workers_leave_a_cpu_to_those_who_read(workers, cpus, per_worker, reading, left):
    """Two workers of half a CPU on the only CPU that is left would wait for ever for what nobody reads."""
    assert fed(workers, cpus, per_worker, reading) == left
