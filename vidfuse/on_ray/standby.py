"""A prepared process beside each worker of an elastic run: it takes over when the workers are started again.

Comes in: a config; the call of a worker. Goes out: on the worker's node an idle process which has imported what training needs.

When a worker is lost, Ray ends all of them and starts new ones; half of the time to the next step is Python importing torch,
DeepSpeed and the model (measured in tests/bench/README.md). A raylet gives an actor an idle process of the same job and runtime
environment, if it has one, and starts such on request (`PrestartWorkers`, for which Ray 2.60 has no Python function).
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from typing import Any

import grpc
import psutil
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub

from vidfuse.config import Config

PREPARED = "VIDFUSE_PREPARED"
"""Names the modules that a process has imported before it is given anything to do."""
LATE = (
    "botocore.session",
    "deepspeed.checkpoint.ds_to_universal",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch.utils.tensorboard",
)
"""Modules that are imported by their users' first use, 6 seconds of a new worker."""
LOOK_SECONDS = 20.0
"""From the start of a worker to its first look for the process that stands by, and between two looks."""
KEPT_SECONDS = 30 * 24 * 3600
"""How long a process may wait; those of a job that has ended are ended by Ray."""
IDLE_TITLE, WORKER_TITLE = "ray::IDLE", "ray::RayTrainWorker"
"""What Ray calls an idle process, and a worker of Ray Train."""

log = logging.getLogger(__name__)


def environment(config: Config, *, elastic: bool) -> dict[str, Any]:
    """The runtime environment of the workers of a run, in which their processes are prepared.

    A job that has a set-up hook of its own keeps it, and an inelastic run has no processes that wait: both get an empty one.
    """
    theirs = ray.get_runtime_context().runtime_env.get("env_vars", {})
    if not elastic or not config.cluster.standby or WORKER_PROCESS_SETUP_HOOK_ENV_VAR in theirs:
        return {}
    model = config.model
    modules = [f"vidfuse.models.backbones.{part.name}" for part in (model.semantic, model.motion) if part is not None]
    wanted = ["vidfuse.on_ray.fit", *LATE, *modules, f"vidfuse.models.fusion.{model.fusion.name}"]
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: f"{__name__}.prepare", PREPARED: ",".join(wanted)}}


def of_tasks() -> dict[str, Any]:
    """The runtime environment of what a worker has other processes do: they would inherit its own, and need none of that."""
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "", PREPARED: ""}} if PREPARED in os.environ else {}


def prepare() -> None:
    """Import what the process will need. Ray calls it in each new process of the environment."""
    for name in os.environ[PREPARED].split(","):
        importlib.import_module(name)


def stand_by() -> None:
    """Have this worker's node keep a prepared process for it, from soon on. It never fails: without one, recovery takes longer."""
    if PREPARED in os.environ:
        threading.Thread(target=_keep, name="vidfuse-standby", daemon=True).start()


def _keep() -> None:
    while True:  # another actor of the same environment may take the process that waits
        time.sleep(LOOK_SECONDS)
        try:
            _ask()
        except (grpc.RpcError, psutil.Error, ray.exceptions.RayError, StopIteration) as error:
            log.debug("no process stands by: %s", error)


def _ask() -> None:
    """Have the raylet start as many processes as are lacking; the oldest worker on a node does it for all of them."""
    alike = [process for process in psutil.Process().parent().children() if _is_like_this(process)]
    workers = [process.pid for process in alike if WORKER_TITLE in process.cmdline()[0]]
    idle = sum(IDLE_TITLE in process.cmdline() for process in alike)
    if idle >= len(workers) or min(workers) != os.getpid():
        return
    context = ray.get_runtime_context()
    request = PrestartWorkersRequest(
        job_id=ray.JobID.from_hex(context.get_job_id()).binary(),
        keep_alive_duration_secs=KEPT_SECONDS,
        num_workers=len(workers) - idle,
    )
    request.runtime_env_info.serialized_runtime_env = context.get_runtime_env_string()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    with init_grpc_channel(f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}") as channel:
        NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=10)


def _is_like_this(process: psutil.Process) -> bool:
    """Whether a process has the environment of this one."""
    try:
        return process.environ().get(PREPARED) == os.environ[PREPARED]
    except psutil.Error:
        return False
