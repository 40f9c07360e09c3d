"""What waits for room on its cluster says so: what it asks for, what is free, who has the rest, what the autoscaler is at.

Comes in: the control store's tables of placement groups, actors and jobs, and the autoscaler's report in it (Ray 2.60, autoscaler v2).
Goes out: one line for people, now and then, for as long as it waits. It never fails, and neither does what waits: it starts when there is
room. A run's workers are placed by Ray Train, which tells how far it is; other jobs ask for a reservation first (`wait_for_room`).

What the control store does not have: which normal tasks hold what (they are told as one sum), and why AWS refuses a machine, of which Ray
2.60 reports that it was refused alone. That is in the autoscaler's log, which is read where the driver is on the head, as submitted jobs are.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.core.generated.gcs_pb2 import ActorTableData, JobTableData, PlacementGroupTableData
from ray.util.placement_group import placement_group, remove_placement_group

from vidfuse.on_ray.monitor import RUN

FIRST_SECONDS = 30.0
"""How long something waits before it is told."""
LOOK_SECONDS = 10.0
"""Between two looks at who has what."""
AGAIN_SECONDS = 600.0
"""After which the same is said again."""
ANSWER_SECONDS = 5.0
"""How long the control store may take to answer."""
SLOW_SECONDS = 120
"""After so long a machine that was asked for and has not come is worth a hint."""
ALMOST_NOTHING = 0.005
"""CPUs and GPUs that are not told."""
LOG_BYTES = 256 * 1024
"""How much of the end of the autoscaler's log is read."""

ADVICE = {
    r"VcpuLimitExceeded|MaxSpotInstanceCountExceeded|InstanceLimitExceeded": "AWS's quota; more in Service Quotas, or lower max_workers",
    r"InsufficientInstanceCapacity": "the zone has none now; another zone or another type with the same GPUs",
    r"UnauthorizedOperation": "the head's role lacks a right; compare with cluster/aws/policies/launch.json",
    r"exceeded quota": "the namespace's ResourceQuota; `kubectl describe resourcequota`",
}
"""Words of clouds that refuse machines, and what to do."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What is asked for at least."""

    workers: int
    cpus: float
    """Of one worker."""
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """Of one worker, as Ray has it."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}

    def __str__(self) -> str:
        return f"{self.workers} worker{'s' * (self.workers > 1)} of {_amount(self.cpus, self.gpus)}"


@dataclass(frozen=True)
class Holder:
    """Who has how much of a cluster."""

    name: str
    cpus: float
    gpus: float

    def __str__(self) -> str:
        return f"{self.name}: {_amount(self.cpus, self.gpus)}"


class Waiting:
    """Tells of one run, or one job, that it waits.

    Args:
        asked: by it.
        tell: is given each line.
    """

    def __init__(self, asked: Asked, tell: Callable[[str], None]) -> None:
        self._asked, self._tell = asked, tell
        self._said, self._said_at, self._looked = "", 0.0, 0.0

    def look(self, placing: tuple[str | None, float] | None) -> None:
        """Look whether there is something to tell. It never raises and takes some seconds at most.

        Args:
            placing: controller of a run's workers (an actor's id, hexadecimal; a job without one: `None`) and for how many seconds it has
                tried to place them; `None`: they have their room.
        """
        now = time.monotonic()
        if placing is None:
            if self._said:
                self._tell("there is room now")
            self._said = ""
            return
        controller, seconds = placing
        if seconds < FIRST_SECONDS or now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        try:
            found = why(self._asked, controller)
        except Exception as error:  # what Ray's own tables raise, of which there is no list
            log.debug("who holds the cluster is not known: %s", error)
            return
        if found is not None and (found != self._said or now - self._said_at > AGAIN_SECONDS):
            self._said, self._said_at = found, now
            self._tell(f"waits for room, {seconds:.0f} s by now: {found}; it starts by itself when there is room")


def wait_for_room(asked: Asked, who: str = "this job") -> None:
    """Wait until the cluster has room, and say so if that takes long; Ray is initialised.

    A reservation is asked for, for which an autoscaler brings machines, and given back at once to what comes then.

    Args:
        asked: by what comes then.
        who: waits, in words.
    """
    waiting = Waiting(asked, lambda line: log.warning("%s %s", who, line))
    began = time.monotonic()
    group = placement_group([asked.bundle] * asked.workers)
    try:
        while not group.wait(timeout_seconds=1):
            waiting.look((None, time.monotonic() - began))
        waiting.look(None)
    finally:
        remove_placement_group(group)


def why(asked: Asked, controller: str | None) -> str | None:
    """Why workers are not placed; `None`: they are, and their processes start. Ray is initialised."""
    accessor = state._connect_and_get_accessor()
    groups = [PlacementGroupTableData.FromString(row) for row in accessor.get_placement_group_table()]
    if controller is not None and placed(groups, controller):
        return None
    actors = [ActorTableData.FromString(row) for row in accessor.get_actor_table(None, None)]
    jobs = accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    holding = holders(groups, actors, [JobTableData.FromString(row) for row in jobs], own=_own_job())
    nodes = sum(node["Alive"] for node in ray.nodes())
    return line(
        asked, ray.available_resources(), ray.cluster_resources(), nodes, holding, list(machines(asked, report(), refusals()))
    )


def placed(groups: Sequence[Any], controller: str) -> bool:
    """Whether the workers of a controller have their room."""
    own = bytes.fromhex(controller)
    return any(group.creator_actor_id == own and group.state == PlacementGroupTableData.CREATED for group in groups)


def holders(groups: Sequence[Any], actors: Sequence[Any], jobs: Sequence[Any], *, own: bytes) -> list[Holder]:
    """Who has CPUs and GPUs reserved, most GPUs first: placement groups, and actors outside of them, by job.

    Args:
        groups, actors, jobs: the control store's tables.
        own: id of the job that asks.
    """
    held: dict[bytes, list[float]] = {}

    def add(job: bytes, resources: Mapping[str, float]) -> None:
        sums = held.setdefault(job, [0.0, 0.0])
        sums[0] += resources.get("CPU", 0.0)
        sums[1] += resources.get("GPU", 0.0)

    for group in groups:
        if group.state == PlacementGroupTableData.CREATED:
            for bundle in group.bundles:
                add(group.creator_job_id, bundle.unit_resources)
    alive = [actor for actor in actors if actor.state == ActorTableData.ALIVE]
    for actor in alive:
        if not actor.placement_group_id or ray.PlacementGroupID(actor.placement_group_id).is_nil():
            add(actor.job_id, actor.required_resources)
    names = {job.job_id: _name(job, [actor.repr_name for actor in alive if actor.job_id == job.job_id]) for job in jobs}
    found = [
        Holder("others of this job" if job == own else names.get(job, f"job {job.hex()}"), cpus, gpus)
        for job, (cpus, gpus) in held.items()
        if max(cpus, gpus) > ALMOST_NOTHING
    ]
    return sorted(found, key=lambda holder: (-holder.gpus, -holder.cpus, holder.name))


def line(
    asked: Asked,
    free: Mapping[str, float],
    total: Mapping[str, float],
    nodes: int,
    holding: Sequence[Holder],
    machines: Sequence[str] = (),
) -> str:
    """The state of a queue, in words.

    Args:
        asked: by the run.
        free, total: resources of the cluster.
        nodes: of the cluster.
        holding: who has what.
        machines: what the autoscaler is at.
    """
    tasks = Holder(
        "tasks",
        total.get("CPU", 0.0) - free.get("CPU", 0.0) - sum(holder.cpus for holder in holding),
        total.get("GPU", 0.0) - free.get("GPU", 0.0) - sum(holder.gpus for holder in holding),
    )
    told = [str(holder) for holder in (*holding, tasks) if max(holder.cpus, holder.gpus) > ALMOST_NOTHING]
    parts = [
        f"asked for are {asked}",
        f"free are {_amount(free.get('CPU', 0.0), free.get('GPU', 0.0), gpu=bool(asked.gpus))} of "
        f"{_amount(total.get('CPU', 0.0), total.get('GPU', 0.0), gpu=bool(asked.gpus))} on {nodes} node{'s' * (nodes != 1)}",
        *([f"held by {', '.join(told)}"] if told else []),
        *machines,
    ]
    return "; ".join(parts)


def report() -> Any:
    """What the cluster's autoscaler said last; empty where there is none. Ray is initialised."""
    client = ray._raylet.GcsClient(ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=ANSWER_SECONDS)).autoscaling_state


def autoscaled() -> bool:
    """Whether an autoscaler may bring nodes. Ray is initialised."""
    return bool(report().autoscaler_state_version)


def refusals(folder: Path | None = None) -> dict[str, str]:
    """Why machines were refused last, by their type, from the autoscaler's log if it is on this machine.

    Args:
        folder: of the logs; default: of this session.
    """
    folder = folder or Path(ray._private.worker._global_node.get_logs_dir_path())
    try:
        with open(folder / "monitor.log", "rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - LOG_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return {}
    return {kind: reason.strip() for kind, reason in re.findall(r"Failed to launch \d+ nodes? of type (\S+): (.+)", text)}


def machines(asked: Asked, said: AutoscalingState, refused: Mapping[str, str], *, now: float | None = None) -> Iterator[str]:
    """What an autoscaler is at, in words: machines that failed, that come, and what it can never bring.

    Args:
        asked: by the run.
        said: its report.
        refused: reasons by type of machine, where the report has none.
        now: seconds since 1970.
    """
    now = time.time() if now is None else now
    failed = {f.ray_node_type_name: f for f in sorted(said.failed_instance_requests, key=lambda f: f.failed_ts)}
    for kind, failure in failed.items():
        reason = f"{failure.reason} {refused.get(kind, '')}"
        yield f"the autoscaler could not start {kind}: {_advised(reason)}"
    for pending in said.pending_instance_requests:
        minutes = (now - pending.request_ts) / 60
        slow = "; `kubectl get events` or monitor.log of the head say why" if now - pending.request_ts > SLOW_SECONDS else ""
        yield f"the autoscaler asked for {pending.count} x {pending.ray_node_type_name} {max(minutes, 0):.0f} min ago{slow}"
    kinds = [pending.ray_node_type_name for pending in said.pending_instances]
    yield from (f"{kinds.count(kind)} x {kind} is starting" for kind in dict.fromkeys(kinds))
    if any(_same(bundle, asked.bundle) for bundle in _never(said)):
        yield "the autoscaler has no machines for it: raise max_workers (maxReplicas), or lower cluster.workers or cluster.cpus_per_worker"


def _never(said: AutoscalingState) -> Iterator[Mapping[str, float]]:
    """Bundles that an autoscaler says it can never bring."""
    for gang in said.infeasible_gang_resource_requests:
        yield from (request.resources_bundle for request in gang.requests)
    for constraint in said.infeasible_cluster_resource_constraints:
        yield from (counted.request.resources_bundle for counted in constraint.resource_requests)


def _same(bundle: Mapping[str, float], wanted: Mapping[str, float]) -> bool:
    return set(bundle) == set(wanted) and all(abs(bundle[name] - amount) < 1e-6 for name, amount in wanted.items())


def _advised(reason: str) -> str:
    for words, advice in ADVICE.items():
        match = re.search(words, reason)
        if match:
            return f"{match[0]} ({advice})"
    said = " ".join(reason.split())
    return (
        f"{said[:200]} (monitor.log of the head, or `kubectl get events`, says why)"
        if said
        else "monitor.log of the head says why"
    )


def _name(job: Any, actors: Sequence[str]) -> str:
    runs = sorted({name for name in actors if name.startswith(RUN)})
    submitted = job.config.metadata.get("job_submission_id", "")
    known = submitted or f"job {job.job_id.hex()} on {job.driver_address.ip_address}"
    return f"{' and '.join(runs)} ({known})" if runs else f"job {submitted}" if submitted else known


def _own_job() -> bytes:
    return bytes.fromhex(ray.get_runtime_context().get_job_id())


def _amount(cpus: float, gpus: float, *, gpu: bool = False) -> str:
    def plural(count: float, unit: str) -> str:
        return f"{round(count, 2):g} {unit}{'' if count == 1 else 's'}"

    shown = gpu or gpus > ALMOST_NOTHING
    return " and ".join([plural(max(cpus, 0.0), "CPU"), *([plural(max(gpus, 0.0), "GPU")] if shown else [])])
