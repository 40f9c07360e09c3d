"""What makes a run go on quickly after a node is gone.

Comes in: Ray Train's own ways. Goes out: the same with less waiting. Measured in tests/bench/README.md; what a cluster's own
processes must find in their environment is `jobs.cli.RAY_SETTINGS`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

LOOK_SECONDS = 1.0
"""Between two looks at the cluster's nodes."""

log = logging.getLogger(__name__)


class QuickTorchBackend(_TorchBackend):
    """Ray's backend without the farewell.

    Before it ends a group of workers, Ray asks each to leave the process group, and waits 30 seconds for one that is gone or
    hangs in a collective. All of them are killed right after that in any case.
    """

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Nothing: the processes end."""


class QuickTorchConfig(TorchConfig):
    """`TorchConfig` with `QuickTorchBackend`."""

    @property
    def backend_cls(self) -> type[QuickTorchBackend]:
        """See `TorchConfig`."""
        return QuickTorchBackend


@contextlib.contextmanager
def look_at_nodes(*, elastic: bool) -> Iterator[None]:
    """While the context is open, keep Ray's account of the cluster's nodes fresh, by which an elastic run decides its size.

    Ray 2.60 renews it every 20 seconds: until then a dead node counts, and the old size is tried again.
    """
    done = threading.Event()
    thread = threading.Thread(target=_look, args=(done,), name="vidfuse-nodes", daemon=True)
    if elastic:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if elastic:
            thread.join(timeout=10)


def _look(done: threading.Event) -> None:
    while not done.wait(LOOK_SECONDS):
        try:
            coordinator = get_or_create_autoscaling_coordinator()
            ray.get(coordinator.get_reserved_resources.remote("vidfuse", recompute=True), timeout=5)
        except Exception as error:  # a look that fails costs seconds of recovery, never the run
            log.debug("the cluster's nodes could not be looked at: %s", error)
