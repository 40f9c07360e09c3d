"""Ray's TorchTrainer, ended at once, leaving nothing behind, and saying when it waits for room.

Comes in: what TorchTrainer takes. Goes out: the same training; its placement group is removed though its controller was killed.

Ray 2.60 has a detached actor see to that, which asks the state API of the dashboard whether the controller lives. Without a
dashboard each question takes 20 seconds and has no answer: the actor is never told to go before 12 of them are over, at the end of
each training, and the group of a killed controller stays. With several clusters on one machine it asks the one started last
(ray#54305). Here it asks the control store of its own cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import PreemptingState, RunningState, ShuttingDownState
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidfuse.on_ray.cleaner import Cleaner
from vidfuse.on_ray.recovery import QuickScalingPolicy

CHECK_SECONDS = 0.5
"""Between two looks at the controller."""
PLACED = (RunningState, PreemptingState, ShuttingDownState)
"""States of a controller in which workers have their room, or need none any more."""


class CleanerCallback(PlacementGroupCleanerCallback):
    """Ray's, with a `Cleaner`."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Start the cleaner; it outlives the controller, and other nodes."""
        context = ray.get_runtime_context()
        self._controller_actor_id = context.get_actor_id()
        here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
        self._cleaner = (
            ray.remote(num_cpus=0)(Cleaner)
            .options(lifetime="detached", scheduling_strategy=here)
            .remote(self._controller_actor_id, self._check_interval_s, self._get_actor_timeout_s, self._stop_timeout)
        )


class PlacingCallback(ControllerCallback):
    """Has a run's monitor know while workers are not placed: there is no room, or their processes start.

    Args:
        monitor: of the run.
    """

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def after_controller_start(self, train_run_context: Any) -> None:
        """None is placed yet."""
        self._monitor.place.remote(ray.get_runtime_context().get_actor_id())

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """The controller is in another state."""
        placing = not isinstance(current_state, PLACED) and not current_state.is_terminal()
        self._monitor.place.remote(ray.get_runtime_context().get_actor_id() if placing else None)


class Trainer(TorchTrainer):
    """See the module.

    Args:
        loop: what each worker runs.
        reading_cpus: see `QuickScalingPolicy`.
        monitor: of the run; `None`: nobody is told when it waits.
        settings: TorchTrainer's.
    """

    def __init__(self, loop: Callable[..., Any], *, reading_cpus: float = 0.0, monitor: Any = None, **settings: Any) -> None:
        super().__init__(loop, **settings)
        self._reading_cpus, self._monitor = reading_cpus, monitor

    def _create_default_callbacks(self) -> list[Any]:
        """Ray's, with another cleaner, and without the one that starts an actor for data sets given to the trainer: none are."""
        left = (PlacementGroupCleanerCallback, DatasetsCallback)
        kept = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, left)]
        told = [] if self._monitor is None else [PlacingCallback(self._monitor)]
        return [*kept, CleanerCallback(check_interval_s=CHECK_SECONDS), *told]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if isinstance(settings["scaling_policy"], ElasticScalingPolicy):
            settings["scaling_policy"] = QuickScalingPolicy(self.scaling_config, self._reading_cpus)
        return super()._initialize_and_run_controller(**settings)
