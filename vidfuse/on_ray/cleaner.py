"""What removes a training's placement group if its controller is killed: an actor. See `on_ray/trainer.py`.

Its module does not import torch, since its process has to start for each training.
"""

from __future__ import annotations

import queue
from typing import Any

import ray
from ray._private.state import actors
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner


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


def is_alive(actor: str) -> bool:
    """Whether an actor of this cluster lives or will live again; `actor`: its id in hex."""
    found: dict[str, Any] = actors(actor)
    return bool(found) and found["State"] != "DEAD"
