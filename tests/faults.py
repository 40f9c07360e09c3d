"""A place for runs to be hurt in: several raylets, an S3 server behind a proxy, and what can befall them."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests import support
from tests.proxy import Proxy, proxy
from tests.raylets import Nodes, Training, nodes
from vidfuse.config import Config, from_mapping
from vidfuse.data.shards import read_index, read_manifest
from vidfuse.on_ray.runs import RunFolder
from vidfuse.on_ray.storage import join, open_storage, read_bytes, write_bytes
from vidfuse.train.errors import DamageError

OUTAGE_SECONDS = 20
REFUSING_SECONDS = 60
READER_TITLE = re.compile(r"ray::.*Read")
TRAIN, UNREADABLE = 96, 2
"""Videos of the hurt set, and how many of them nothing can read."""


class Store:
    """An S3 server which can be killed and started again with its objects and on its port."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, contextlib.ExitStack()
        self.server = self._stack.enter_context(support.object_store(folder))

    def outage(self, seconds: float) -> None:
        """Kill the server, and start it again after some seconds."""
        port = int(self.server.endpoint.rpartition(":")[2])
        os.kill(self.server.pid, 9)
        self.server.program.wait(20)
        time.sleep(seconds)
        self.server = self._stack.enter_context(support.object_store(self._folder, port=port))

    def close(self) -> None:
        self._stack.close()


@dataclass
class Place:
    """What a run needs, and what can go wrong with it."""

    store: Store
    proxy: Proxy
    environment: Mapping[str, str]
    """What a process needs to use the server through the proxy."""
    cluster: Nodes
    size: int

    def mend(self) -> None:
        """All nodes are back, the storage is well."""
        self.proxy.faults.share = 0.0
        while len(self.cluster.nodes) < self.size:
            self.cluster.add()


@contextlib.contextmanager
def place(folder: Path, size: int) -> Iterator[Place]:
    """A server in `folder`, a proxy before it, a cluster of `size` nodes that uses it; AWS_* of this process point to it."""
    store, before = Store(folder), dict(os.environ)
    try:
        with proxy(store.server.endpoint) as between:
            environment = {**store.server.environment, "AWS_ENDPOINT_URL": between.endpoint}
            os.environ.update(environment)
            with nodes(size, environment) as cluster:
                yield Place(store, between, environment, cluster, size)
    finally:
        os.environ.clear()
        os.environ.update(before)
        store.close()


def hurt_set(url: str, source: Path) -> None:
    """Pack a set of small videos; then one of them is corrupt in its shard, and a shard is truncated within its last one."""
    support.make_ssv2(source, {"train": TRAIN, "validation": 6})
    done = support.run_job("pack", str(source), url, "--shard-bytes", "100kB")
    assert done.returncode == 0, done.stderr
    filesystem, root = open_storage(url)
    index = read_index(filesystem, root, "train", manifest=read_manifest(filesystem, root))
    shards = sorted(set(map(int, index.shard)))
    assert len(shards) > 1
    first, second = join(root, index.shards[shards[0]]), join(root, index.shards[shards[1]])
    sample = next(s for s in range(len(index)) if index.shard[s] == shards[0])
    content, start, size = bytearray(read_bytes(filesystem, first)), int(index.offset[sample]), int(index.size[sample])
    content[start + 40 : start + size] = bytes(size - 40)
    write_bytes(filesystem, first, bytes(content))
    end = max(int(index.offset[s] + index.size[s]) for s in range(len(index)) if index.shard[s] == shards[1])
    write_bytes(filesystem, second, read_bytes(filesystem, second)[: end - 100])


def config_of(url: str, storage: str, name: str, most: int, **train: object) -> Config:
    """A run of many short epochs on 1 to `most` workers."""
    data = {
        "url": url,
        "classes": 3,
        "frames": 4,
        "size": 32,
        "block_bytes": 60_000,
        "buffer_bytes": 2**23,
        "cpus_per_task": 0.2,
    }
    settings = {
        "epochs": 10_000,
        "global_batch": 12,
        "micro_batch": 2,
        "precision": "fp32",
        "zero_stage": 2,
        "checkpoint_every_steps": 5,
        "validate_every_epochs": 10_000,
        **train,
    }
    cluster = {"workers": (1, most), "cpus_per_worker": 0.6, "resize_seconds": 5, "max_failures": -1}
    return from_mapping({"data": data, "train": settings, "cluster": cluster, "run": {"storage": storage, "name": name}})


Fault = Callable[[Place, Training], None]


def _working_now(here: Place):
    return next((node for node in here.cluster.nodes if here.cluster.workers(node)), None)


def _working(here: Place):
    """A node with a Train worker; there is none while a run recovers or takes another size."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        node = _working_now(here)
        if node is not None:
            return node
        time.sleep(0.1)
    raise AssertionError("no Train worker was seen")


def kill_a_worker(here: Place, training: Training) -> None:
    """`kill -9` of a Train worker."""
    here.cluster.kill_worker(_working(here))


def kill_a_node(here: Place, training: Training) -> None:
    """`kill -9` of a raylet with its Train worker and its reading tasks."""
    here.cluster.kill(_working(here))


def kill_a_reader(here: Place, training: Training) -> None:
    """`kill -9` of a process that reads and decodes, as the kernel does when memory is short."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for node in here.cluster.nodes:
            for process in here.cluster.processes(node, READER_TITLE):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
                    return
        time.sleep(0.02)
    raise AssertionError("no reading task was seen")


def kill_a_worker_that_stores_a_checkpoint(here: Place, training: Training) -> None:
    """`kill -9` while the files of a checkpoint are written, which the storage makes last."""
    shelf = RunFolder.of(training.config.run).shelf
    faults = here.proxy.faults
    faults.share, faults.kinds, faults.slow_seconds, faults.only = 1.0, ("slow",), 3.0, ("PUT", "/step-")
    before, deadline = set(shelf.names()), time.monotonic() + 60
    try:
        while not any(_unfinished(shelf, name) for name in set(shelf.names()) - before):
            assert time.monotonic() < deadline, "no checkpoint was seen half-written"
            time.sleep(0.1)
        kill_a_worker(here, training)
    finally:
        faults.share, faults.slow_seconds, faults.only = 0.0, 1.0, ("", "")


def _unfinished(shelf, name: str) -> bool:
    try:
        shelf.contents(name)
    except DamageError:
        return True
    return False


def stop_the_store(here: Place, training: Training) -> None:
    """The storage is down for 20 s."""
    here.store.outage(OUTAGE_SECONDS)


def have_the_store_refuse(here: Place, training: Training) -> None:
    """A minute of 500, 503, slow answers and broken connections, every second request."""
    faults = here.proxy.faults
    faults.kinds, faults.slow_seconds, faults.share = ("500", "503", "slow", "cut"), 1.0, 0.5
    time.sleep(REFUSING_SECONDS)
    faults.share = 0.0


def kill_a_node_and_a_worker(here: Place, training: Training) -> None:
    """Two at once."""
    kill_a_node(here, training)
    other = _working_now(here)
    if other is not None:
        here.cluster.kill_worker(other)


def kill_a_worker_while_the_store_is_away(here: Place, training: Training) -> None:
    """Two at once: nothing can be restored for 20 s."""
    kill_a_worker(here, training)
    here.store.outage(OUTAGE_SECONDS)


FAULTS: tuple[Fault, ...] = (
    kill_a_worker,
    kill_a_node,
    kill_a_reader,
    kill_a_worker_that_stores_a_checkpoint,
    stop_the_store,
    have_the_store_refuse,
    kill_a_node_and_a_worker,
    kill_a_worker_while_the_store_is_away,
)
HARMLESS = (kill_a_reader, stop_the_store, have_the_store_refuse)
"""Those that need not interrupt the training."""
