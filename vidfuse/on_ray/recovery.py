"""What makes a run go on quickly after a node is gone, and say at once why it cannot begin.

Comes in: Ray Train's own ways. Goes out: the same with less waiting. Measured in tests/bench/README.md; what a cluster's own
processes must find in their environment is `jobs.cli.RAY_SETTINGS`.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.data._internal.stats import get_or_create_stats_actor
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ScalingDecision

from vidfuse.on_ray import devices

LOOK_SECONDS = 0.2
"""Between two looks at nodes of which one does not answer."""
ANSWER_SECONDS = 2.0
"""How long a node, or Ray's account of them, is given to answer."""

log = logging.getLogger(__name__)


class QuickTorchBackend(_TorchBackend):
    """Ray's backend, with a look at GPUs before it begins, and without the farewell.

    Before it ends a group of workers, Ray asks each to leave the process group, and waits 30 seconds for one that is gone or
    hangs in a collective. All of them are killed right after that in any case.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers; on machines whose GPUs they cannot use, NCCL would fail in its own words.

        Raises:
            RunError: see `devices.hold`.
        """
        if worker_group.get_resources_per_worker().get("GPU", 0):
            devices.hold(worker_group.execute(devices.look), backend_config.precision)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end."""


@dataclass
class QuickTorchConfig(TorchConfig):
    """`TorchConfig` with `QuickTorchBackend`."""

    precision: str = "fp32"
    """What the run computes in."""

    @property
    def backend_cls(self) -> type[QuickTorchBackend]:
        """See `TorchConfig`."""
        return QuickTorchBackend


def keep_statistics_here() -> None:
    """Have Ray Data's actor for statistics on the driver's node.

    The first worker that streams would start it on its own node, with its own environment: a node that may die.
    """
    get_or_create_stats_actor()


class QuickScalingPolicy(ElasticScalingPolicy):
    """Ray's policy, with a fresh account of the cluster, and with CPUs for those who read.

    A worker that is lost with its node is missed seconds before the node is. Ray would ask for the old number of workers, wait in
    vain (`RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S`), and then go by an account that is renewed every 20 seconds. And it would give workers
    all CPUs that are left: where none is left to read their batches, they wait for ever.

    Args:
        scaling_config: of the run.
        reading_cpus: CPUs of a reading task, of which there has to be room for one.
    """

    def __init__(self, scaling_config: ScalingConfig, reading_cpus: float = 0.0) -> None:
        super().__init__(scaling_config)
        self._reading_cpus = reading_cpus

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        count = int(super()._count_possible_workers(reserved_resources))
        cpus = sum(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        return fed(count, cpus, self.scaling_config._resources_per_worker_not_none.get("CPU", 0.0), self._reading_cpus)

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """None as long as a node that counts as alive does not answer."""
        if not answering([(n["NodeManagerAddress"], n["NodeManagerPort"]) for n in ray.nodes() if n["Alive"]]):
            time.sleep(LOOK_SECONDS)
            return NoopDecision()
        return super().make_decision_for_non_running_worker_group()

    def _get_reserved_resources(self) -> Any:
        try:
            renewed = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            ray.get(renewed, timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError as error:  # it costs seconds of recovery, never the run
            log.debug("the account of the cluster's nodes was not renewed: %s", error)
        return super()._get_reserved_resources()


def fed(workers: int, cpus: float, per_worker: float, reading: float) -> int:
    """As many of some workers as leave CPUs for a reading task; one at least, if there is any."""
    if not per_worker:
        return workers
    return min(workers, max(int((cpus - reading) / per_worker + 1e-9), 1))


def answering(addresses: Sequence[tuple[str, int]]) -> bool:
    """Whether something listens at each address; the first that does not ends it, so it takes no longer than one that is silent."""
    return all(_answers(address) for address in addresses)


def _answers(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False
