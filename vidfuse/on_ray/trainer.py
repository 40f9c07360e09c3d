"""Ray's TorchTrainer, ended at once and leaving nothing behind.

Comes in: what TorchTrainer takes. Goes out: the same training; its placement group is removed though its controller was killed.

Ray 2.60 has a detached actor see to that, which asks the state API of the dashboard whether the controller lives. Without a
dashboard each question takes 20 seconds and has no answer: the actor is never told to go before 12 of them are over, at the end of
each training, and the group of a killed controller stays. With several clusters on one machine it asks the one started last
(ray#54305). Here it asks the control store of its own cluster.
"""

from __future__ import annotations

import queue
from typing import Any

import ray
from ray._private.state import actors
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

CHECK_SECONDS = 0.5
"""Between two looks at the controller."""


class Cleaner(PlacementGroupCleaner):
    """Ray's, but that it asks the cluster that it belongs to, and looks from the beginning on: it needs no call for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.start_monitoring()

    def _monitor_loop(self) -> None:
        group = None
        while not self._stop_event.is_set():
            group = self._given() or group
            if not is_alive(self._controller_actor_id):
                self._cleanup_placement_group(self._given() or group)
                ray.kill(ray.get_runtime_context().current_actor)  # `exit_actor`, as in Ray's, ends this thread only
                return

    def _given(self) -> Any:
        """The newest group; `None` if none comes for a while."""
        group = None
        while True:
            try:
                group = self._pg_queue.get(timeout=0 if group else self._check_interval_s)
            except queue.Empty:
                return group


class CleanerCallback(PlacementGroupCleanerCallback):
    """Ray's, with a `Cleaner`."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start the cleaner; it outlives the controller."""
        self._controller_actor_id = ray.get_runtime_context().get_actor_id()
        self._cleaner = (
            ray.remote(num_cpus=0)(Cleaner)
            .options(lifetime="detached")
            .remote(self._controller_actor_id, self._check_interval_s, self._get_actor_timeout_s, self._stop_timeout)
        )


class Trainer(TorchTrainer):
    """See the module."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()
        mine = CleanerCallback(check_interval_s=CHECK_SECONDS)
        found = [isinstance(callback, PlacementGroupCleanerCallback) for callback in made]
        assert sum(found) == 1, "another version of Ray: see vidfuse.on_ray.trainer"
        return [mine if theirs else callback for callback, theirs in zip(made, found, strict=True)]


def is_alive(actor: str) -> bool:
    """Whether an actor of this cluster lives or will live again; `actor`: its id in hex."""
    found: dict[str, Any] = actors(actor)
    return bool(found) and found["State"] != "DEAD"
