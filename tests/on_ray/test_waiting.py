"""A run that waits for room says what it asks for, what is free, who has the rest and what the autoscaler is at; then it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from unittest.mock import Mock

import pytest
import ray
from ray.core.generated import autoscaler_pb2, gcs_pb2
from ray.train import RunConfig, ScalingConfig

from tests import support
from vidfuse.config import ConfigError, override
from vidfuse.on_ray import room, waiting
from vidfuse.on_ray.monitor import Monitor
from vidfuse.on_ray.tasks import run_tasks
from vidfuse.on_ray.trainer import Trainer
from vidfuse.on_ray.waiting import Asked, Holder, Waiting, holders, line, machines, placed, refusals, why
from vidfuse.presets import get

OWN, SECOND, THIRD = (bytes([0, 0, 0, number]) for number in (1, 2, 3))
CONTROLLER = b"c" * 16
GPUS = Asked(4, 2.0, 1.0)
NOW = 1_800_000_000.0

# --- who has what ---


def group(job: bytes, *bundles: dict[str, float], state="CREATED", actor: bytes = b""):
    made = gcs_pb2.PlacementGroupTableData(creator_job_id=job, creator_actor_id=actor)
    made.state = gcs_pb2.PlacementGroupTableData.PlacementGroupState.Value(state)
    for resources in bundles:
        made.bundles.add().unit_resources.update(resources)
    return made


def actor(job: bytes, resources: dict[str, float], *, name: str = "", state="ALIVE", inside: bytes = b"\xff" * 18):
    made = gcs_pb2.ActorTableData(job_id=job, repr_name=name, placement_group_id=inside)
    made.state = gcs_pb2.ActorTableData.ActorState.Value(state)
    made.required_resources.update(resources)
    return made


def job(identity: bytes, submission: str = ""):
    made = gcs_pb2.JobTableData(job_id=identity)
    made.driver_address.ip_address = "10.0.0.7"
    if submission:
        made.config.metadata["job_submission_id"] = submission
    return made


def test_who_holds_what_by_name():
    groups = [
        group(SECOND, {"CPU": 2, "GPU": 1}, {"CPU": 2, "GPU": 1}),
        group(SECOND, {"CPU": 64, "GPU": 8}, state="PENDING"),
        group(THIRD, {"CPU": 0.5}, state="REMOVED"),
        group(OWN, {"CPU": 1}),
    ]
    actors = [
        actor(SECOND, {}, name="run second"),
        actor(SECOND, {"CPU": 2, "GPU": 1}, inside=b"p" * 18),  # counted with its group
        actor(SECOND, {"CPU": 7}, state="DEAD"),
        actor(THIRD, {"CPU": 3.5}),
        actor(THIRD, {}, name="some other name"),
    ]
    found = holders(groups, actors, [job(OWN, "raysubmit_own"), job(SECOND, "raysubmit_2"), job(THIRD)], own=OWN)
    assert found == [
        Holder("run second (raysubmit_2)", 4, 2),
        Holder("job 00000003 on 10.0.0.7", 3.5, 0),
        Holder("others of this job", 1, 0),
    ]
    [submitted] = holders([group(THIRD, {"CPU": 1})], [], [job(THIRD, "raysubmit_3")], own=OWN)
    assert submitted.name == "job raysubmit_3"
    [unknown] = holders([group(THIRD, {"CPU": 1})], [], [], own=OWN)
    assert unknown.name == "job 00000003"


def test_the_line_has_what_is_asked_free_and_held():
    said = line(
        GPUS, {"CPU": 3.0}, {"CPU": 16.0, "GPU": 2.0}, 2, [Holder("run second (raysubmit_2)", 4, 2)], ["the autoscaler sleeps"]
    )
    assert said == (
        "asked for are 4 workers of 2 CPUs and 1 GPU; free are 3 CPUs and 0 GPUs of 16 CPUs and 2 GPUs on 2 nodes; "
        "held by run second (raysubmit_2): 4 CPUs and 2 GPUs, tasks: 9 CPUs; the autoscaler sleeps"
    )
    assert line(Asked(1, 0.5, 0), {"CPU": 1.0}, {"CPU": 1.0}, 1, []) == (
        "asked for are 1 worker of 0.5 CPUs; free are 1 CPU of 1 CPU on 1 node"
    )


def test_workers_that_are_placed_only_start():
    assert placed([group(OWN, {"CPU": 1}, actor=CONTROLLER)], CONTROLLER.hex())
    assert not placed([group(OWN, {"CPU": 1}, actor=CONTROLLER, state="PENDING")], CONTROLLER.hex())
    assert not placed([group(OWN, {"CPU": 1}, actor=b"x" * 16)], CONTROLLER.hex())


# --- the autoscaler ---


def failed(kind: str, reason: str, at: int = 1):
    return autoscaler_pb2.FailedInstanceRequest(ray_node_type_name=kind, reason=reason, count=1, start_ts=at, failed_ts=at)


@pytest.mark.parametrize(
    ("reason", "logged", "words"),
    [
        ("launch failed", {"gpu": "An error occurred (VcpuLimitExceeded) when calling RunInstances"}, ["VcpuLimitExceeded (AWS's quota"]),
        ("launch failed with MaxSpotInstanceCountExceeded", {}, ["MaxSpotInstanceCountExceeded (AWS's quota", "Service Quotas"]),
        ("", {"gpu": "InsufficientInstanceCapacity: sorry"}, ["InsufficientInstanceCapacity (the zone has none now"]),
        ("pods is forbidden: exceeded quota: compute", {}, ["exceeded quota (the namespace's ResourceQuota; `kubectl describe"]),
        ("launch failed with\n something new", {}, ["launch failed with something new (monitor.log of the head, or `kubectl get events`"]),
        ("", {"cpu": "of another type"}, ["could not start gpu: monitor.log of the head says why"]),
    ],
)  # fmt: skip
def test_a_quota_that_refuses_is_told(reason, logged, words):
    report = autoscaler_pb2.AutoscalingState(autoscaler_state_version=3)
    report.failed_instance_requests.extend([failed("gpu", "an older one: InstanceLimitExceeded", 1), failed("gpu", reason, 2)])
    [said] = machines(GPUS, report, logged)
    assert said.startswith("the autoscaler could not start gpu: ") and all(word in said for word in words), said
    assert "\n" not in said


def test_machines_that_come_are_told_and_a_slow_one_has_a_hint():
    report = autoscaler_pb2.AutoscalingState(autoscaler_state_version=3)
    report.pending_instance_requests.add(ray_node_type_name="gpu", count=2, request_ts=int(NOW) - 30)
    report.pending_instance_requests.add(ray_node_type_name="big", count=1, request_ts=int(NOW) - 600)
    for _ in range(2):
        report.pending_instances.add(ray_node_type_name="gpu")
    fresh, slow, starting = machines(GPUS, report, {}, now=NOW)
    assert fresh.endswith("asked for 2 x gpu 0 min ago") and starting == "2 x gpu is starting"
    assert "asked for 1 x big 10 min ago; `kubectl get events`" in slow


def test_what_can_never_be_is_told():
    report = autoscaler_pb2.AutoscalingState(autoscaler_state_version=3)
    gang = report.infeasible_gang_resource_requests.add().requests.add()
    gang.resources_bundle.update({"CPU": 2.0, "GPU": 1.0})
    [said] = machines(GPUS, report, {})
    assert "has no machines for it: raise max_workers" in said
    assert not list(machines(Asked(4, 1.0, 1.0), report, {})), "of another run"
    asked = autoscaler_pb2.AutoscalingState()
    counted = asked.infeasible_cluster_resource_constraints.add().resource_requests.add(count=4)
    counted.request.resources_bundle.update({"CPU": 2.0, "GPU": 1.0})
    assert "has no machines for it" in next(machines(GPUS, asked, {}))
    assert not list(machines(GPUS, autoscaler_pb2.AutoscalingState(), {}))


def test_rays_own_words_are_found_in_its_log(tmp_path):
    """Ray 2.60 leaves AWS's reason out of what it reports, and writes it here (autoscaler/v2/instance_manager/node_provider.py)."""
    assert refusals(tmp_path) == {}
    told = "2026-11-22 10:00:00,1\tINFO node_provider.py:491 -- Failed to launch {} nodes of type {}: {}\n"
    from ray.autoscaler.v2.instance_manager import node_provider

    with open(node_provider.__file__) as source:
        assert '"Failed to launch {} nodes of type {}: {}".format(count, node_type, e)' in source.read()
    older, newer = (
        told.format(1, "gpu_spot", "InsufficientInstanceCapacity"),
        told.format(2, "gpu_spot", "VcpuLimitExceeded: ask"),
    )
    (tmp_path / "monitor.log").write_text(older + "x" * waiting.LOG_BYTES + "\n" + newer + told.format(1, "cpu", "no"))
    assert refusals(tmp_path) == {"gpu_spot": "VcpuLimitExceeded: ask", "cpu": "no"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (room.Resources(1, 1, gpu=True), "1 worker, one GPU each"),
        (room.Resources(1, 4, gpu=True), "1 to 4 workers, one GPU each"),
        (room.Resources(2, 2, gpu=False), "2 workers, on CPUs, as no node of the cluster has a GPU that Ray knows of"),
    ],
)
def test_what_a_run_trains_on_is_said(given, words):
    assert str(given) == words


# --- when it is said ---


@pytest.fixture
def told(monkeypatch):
    """A run that waits, the lines it told, and a clock."""

    class Clock:
        now = 1000.0
        reason: str | None = "held by second"

    lines: list[str] = []
    monkeypatch.setattr(waiting, "time", Mock(monotonic=lambda: Clock.now))
    monkeypatch.setattr(waiting, "why", lambda asked, controller: Clock.reason)
    return Waiting(GPUS, lines.append), lines, Clock


def test_it_is_said_after_a_while_when_it_changes_and_at_the_end(told):
    run, lines, clock = told
    run.look(None)
    run.look(("ab", waiting.FIRST_SECONDS - 1))
    assert not lines
    run.look(("ab", 31.0))
    assert lines == ["waits for room, 31 s by now: held by second; it starts by itself when there is room"]
    for _ in range(20):
        clock.now += waiting.LOOK_SECONDS
        run.look(("ab", 60.0))
    assert len(lines) == 1, "the same is not said again and again"
    clock.reason = "held by third"
    run.look(("ab", 61.0))
    assert len(lines) == 1, "who has what is not asked at each look"
    clock.now += waiting.LOOK_SECONDS
    run.look(("ab", 70.0))
    assert len(lines) == 2 and "held by third" in lines[1]
    clock.now += waiting.AGAIN_SECONDS + 1
    run.look(("ab", 700.0))
    assert len(lines) == 3
    run.look(None)
    run.look(None)
    assert lines[3:] == ["there is room now"]


def test_workers_whose_processes_start_are_not_said_to_wait(told):
    run, lines, clock = told
    clock.reason = None
    run.look(("ab", 300.0))
    run.look(None)
    assert not lines


def test_a_look_that_fails_costs_nothing(told, monkeypatch):
    run, lines, _ = told
    monkeypatch.setattr(waiting, "why", lambda *_: 1 / 0)
    run.look(("ab", 300.0))
    assert not lines


# --- on a cluster ---


@pytest.mark.ray
@pytest.mark.parametrize("brings", [False, True])
def test_what_cannot_fit_is_refused_unless_an_autoscaler_may_bring_it(ray_cluster, monkeypatch, brings):
    assert not waiting.autoscaled()
    big = override(get("demo"), ["cluster.workers=9", "train.global_batch=144"])
    report = autoscaler_pb2.AutoscalingState(autoscaler_state_version=int(brings))
    monkeypatch.setattr(waiting, "report", lambda: report)
    if brings:
        assert room.resources(big).least == 9
    else:
        with pytest.raises(ConfigError, match=r"9 workers .* room for 4"):
            room.resources(big)


HOLDER = """
import sys, time, ray
from vidfuse.on_ray.monitor import Monitor
ray.init(address=sys.argv[1], log_to_driver=False)
group = ray.util.placement_group([{"CPU": 2}])
monitor = Monitor.remote("second")
ray.get([group.ready(), monitor.latest.remote()])
print("held", flush=True)
time.sleep(300)
"""


@pytest.fixture
def second(ray_cluster):
    """Another job, a run called `second`, that has both CPUs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(support.REPO), os.environ.get("PYTHONPATH", "")])}
    words = [sys.executable, "-c", HOLDER, ray_cluster]
    holder = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    yield holder
    holder.kill()
    holder.wait(20)


@pytest.mark.ray
def test_tasks_that_wait_for_a_full_cluster_say_so_and_then_run(full_for_a_while):
    assert sorted(run_tasks(lambda unit: unit + 1, [(1,), (2,)])) == [(0, 2), (1, 3)]
    first, *_, last = full_for_a_while()
    assert first.startswith("this job waits for room, ") and last == "this job there is room now"
    assert (
        "asked for are 1 worker of 1 CPU; free are 0 CPUs of 2 CPUs on 1 node; held by others of this job: 2 CPUs; it starts by"
        in first
    )
    left = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    assert not left, "the reservation is given back"


@pytest.mark.ray
@pytest.mark.parametrize("workers", [1, (1, 2)])
def test_a_run_that_waits_names_who_has_the_cluster_and_then_starts(second, tmp_path, workers):
    def loop() -> None:
        pass

    monitor = Monitor.remote("first")
    scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}, elastic_resize_monitor_interval_s=60)
    trainer = Trainer(
        loop, monitor=monitor, scaling_config=scaling, run_config=RunConfig(name="first", storage_path=str(tmp_path))
    )
    thread = threading.Thread(target=trainer.fit, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while (placing := ray.get(monitor.placing.remote())) is None or placing[1] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    said = why(Asked(1, 1.0, 0.0), placing[0])
    assert said is not None
    assert said.startswith("asked for are 1 worker of 1 CPU; free are 0 CPUs of 2 CPUs on 1 node; held by run second (job "), (
        said
    )
    assert said.split("held by ")[1].count("2 CPUs") == 1 and "autoscaler" not in said
    second.kill()
    thread.join(90)
    assert not thread.is_alive() and ray.get(monitor.placing.remote()) is None
