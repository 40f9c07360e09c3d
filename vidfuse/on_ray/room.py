"""What a cluster gives a run: how many workers, on what, and Ray Train's settings for them.

Comes in: a config; Ray is initialised. Goes out: `Resources`, or a refusal that says what would fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig

from vidfuse.config import Config, ConfigError
from vidfuse.data.feed import BLOCKS_AT_ONCE, BYTES_PER_TASK, block_bytes, tasks_at_once
from vidfuse.on_ray.recovery import QuickTorchConfig
from vidfuse.on_ray.standby import environment
from vidfuse.on_ray.storage import open_storage
from vidfuse.on_ray.waiting import Asked, autoscaled

WORKERS_WITHOUT_GPU = 2
"""Train workers where `cluster.workers` is null and the cluster has no GPU."""


@dataclass(frozen=True)
class Resources:
    """What the cluster gives a run."""

    least: int
    """Fewest workers."""
    most: int
    """Most workers."""
    gpu: bool
    """Whether each worker has one."""

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        device = "one GPU each" if self.gpu else "on CPUs, as no node of the cluster has a GPU that Ray knows of"
        return f"{count} worker{'s' * (self.most > 1)}, {device}"

    @property
    def device(self) -> torch.device:
        """Kind of device of a worker."""
        return torch.device("cuda" if self.gpu else "cpu")

    def asked(self, config: Config) -> Asked:
        """What has to be free for it to begin."""
        return Asked(self.least, config.cluster.cpus_per_worker, float(self.gpu))


def resources(config: Config) -> Resources:
    """How many workers, on what; Ray is initialised.

    Of a cluster with an autoscaler nobody knows the bounds: workers that do not fit today are waited for, which `waiting` tells.

    Raises:
        ConfigError: more workers than a cluster of a fixed size has room for, or a world size that cannot divide the global batch.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    wanted = config.cluster.workers
    least, most = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    least, most = least or gpus or WORKERS_WITHOUT_GPU, most or gpus or WORKERS_WITHOUT_GPU
    per_worker = config.cluster.cpus_per_worker
    room = sum(math.floor(node.get("CPU", 0) / per_worker + 1e-9) for node in nodes)
    room = min(room, gpus) if gpus else room
    cpus, reading = sum(node.get("CPU", 0) for node in nodes), config.data.cpus_per_task
    tight = least > room or cpus + 1e-9 < least * per_worker + reading
    fixed = tight and not autoscaled()
    if fixed and least > room:
        has = f"{cpus:g} CPUs and {gpus} GPUs on {len(nodes)} nodes"
        raise ConfigError(
            f"cluster.workers: {least} workers with {per_worker:g} CPUs{' and 1 GPU' if gpus else ''} each do not fit: the cluster "
            f"has {has}, room for {room}; lower cluster.workers or cluster.cpus_per_worker, or add nodes"
        )
    if fixed:
        raise ConfigError(
            f"cluster.workers: {least} workers with {per_worker:g} CPUs each leave none of the cluster's {cpus:g} to read for them, "
            f"and a reading task takes data.cpus_per_task = {reading:g}; lower one of the three, or add nodes"
        )
    sizes = [size for size in range(least, most + 1) if config.train.global_batch % (size * config.train.micro_batch) == 0]
    if len(sizes) != most - least + 1:
        raise ConfigError(
            f"train.global_batch: {config.train.global_batch} is not divided by every allowed number of workers ({least} to {most}) "
            f"x micro_batch {config.train.micro_batch}; it is by {', '.join(map(str, sizes)) or 'none of them'}. Change "
            "train.global_batch, train.micro_batch or cluster.workers"
        )
    check_buffer(config, most)
    return Resources(least, most, gpu=bool(gpus))


def check_buffer(config: Config, workers: int) -> None:
    """Refuse a buffer that cannot hold what each worker's stream needs.

    Raises:
        ConfigError: what is needed.
    """
    data, rows = config.data, config.train.micro_batch * config.data.repeats
    needed = workers * BLOCKS_AT_ONCE * rows * data.frames * data.size**2 * 3
    if needed > data.buffer_bytes:
        raise ConfigError(
            f"data.buffer_bytes: {data.buffer_bytes:,} is too little for {workers} workers with micro batches of {rows} clips of "
            f"{data.frames} x {data.size} x {data.size}: at least {needed:,} are needed; raise it, or lower train.micro_batch or "
            "data.repeats"
        )


def reading(config: Config, workers: int, cluster: Mapping[str, float]) -> str | None:
    """In words, that the buffer keeps CPUs from reading; `None`: it does not, or the object stores have room for no more.

    Args:
        config: of the run.
        workers: that it has.
        cluster: resources of all nodes.
    """
    data = config.data
    clip = data.frames * data.size**2 * 3
    least = config.train.micro_batch * data.repeats * clip
    block = max(block_bytes(data, workers), least)
    idle = cluster.get("CPU", 0.0) - workers * config.cluster.cpus_per_worker
    used = workers * tasks_at_once(data, workers, block) * data.cpus_per_task
    tasks, whole = math.ceil(idle / data.cpus_per_task / workers), max(data.block_bytes, least)
    needed = min(tasks * workers * BYTES_PER_TASK * whole, int(cluster.get("object_store_memory", 0.0) / 2))
    if used >= idle or needed <= data.buffer_bytes:
        return None
    return (
        f"data.buffer_bytes = {data.buffer_bytes:,} lets {used:g} of the {idle:g} CPUs read that workers leave; if steps wait for "
        f"clips, --set data.buffer_bytes={needed}"
    )


def ray_settings(config: Config, room: Resources, storage: str, name: str) -> dict[str, Any]:
    """Ray Train's own settings of a run."""
    filesystem, root = open_storage(storage, write=True)
    workers = room.least if room.least == room.most else (room.least, room.most)
    return {
        "torch_config": QuickTorchConfig(precision=config.train.precision),
        "scaling_config": ScalingConfig(
            num_workers=workers,
            use_gpu=room.gpu,
            elastic_resize_monitor_interval_s=config.cluster.resize_seconds,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if room.gpu else {})},
        ),
        "run_config": RayRunConfig(
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            worker_runtime_env=environment(config, elastic=room.least < room.most),
        ),
    }
