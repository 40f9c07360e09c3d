"""What removes a training's placement group if its controller is killed: an actor. See `on_ray/trainer.py`.

Its module does not import torch, since its process has to start for each training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import actors, state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.util.placement_group import PlacementGroup, remove_placement_group

log = logging.getLogger(__name__)


class Cleaner(PlacementGroupCleaner):
    """Ray's, but that it asks the cluster that it belongs to.

    It needs no word from the controller, which may be killed before it can give one: it looks from its beginning on, and the
    groups are those that the controller made.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.start_monitoring()

    def _monitor_loop(self) -> None:
        while not self._stop_event.wait(self._check_interval_s):
            try:
                if not is_alive(self._controller_actor_id):
                    self._clean()
            except Exception as error:  # the control store did not answer: it is asked again
                log.warning("a training's placement groups could not be looked at: %s", error)

    def _clean(self) -> None:
        for group in groups_of(self._controller_actor_id):
            log.warning("the controller of a training is gone; its placement group %s is removed", group.id.hex())
            remove_placement_group(group)
        ray.kill(ray.get_runtime_context().current_actor)  # `exit_actor`, as in Ray's, ends this thread only


def is_alive(actor: str) -> bool:
    """Whether an actor of this cluster lives or will live again; `actor`: its id in hex."""
    found: dict[str, Any] = actors(actor)
    return bool(found) and found["State"] != "DEAD"


def groups_of(actor: str) -> Iterator[PlacementGroup]:
    """The placement groups that an actor has made and that are there."""
    for content in state._connect_and_get_accessor().get_placement_group_table():
        row = PlacementGroupTableData.FromString(content)
        if row.creator_actor_id.hex() == actor and row.state != PlacementGroupTableData.REMOVED:
            yield PlacementGroup(ray.PlacementGroupID(row.placement_group_id))
