"""The audit of a run on its storage.

Comes in: a run's folder. Goes out: an `Audit`: its journal against the index of the packed set that it trained on.
"""

from __future__ import annotations

from vidfuse.data.shards import DataError
from vidfuse.on_ray.preflight import open_set
from vidfuse.on_ray.runs import RunFolder
from vidfuse.train.audit import Audit, audit


def audit_run(folder: RunFolder) -> Audit:
    """Judge a run.

    Raises:
        DataError: no journal, or the packed set is another one than the run trained on.
        StorageError: the run or its packed set cannot be read.
    """
    config, entries = folder.config(), folder.journal()
    if not entries:
        raise DataError(f"{folder.url} has no journal: no worker of it has started yet, or an older vidfuse wrote it")
    split = config.data.train_split
    packed = open_set(config, split)
    others = {entry["manifest"] for entry in entries if entry["kind"] == "start"} - {packed.manifest.version}
    if others:
        raise DataError(
            f"{folder.url} was trained on packed set {', '.join(sorted(others))}, {config.data.url} holds {packed.manifest.version}"
        )
    index = packed.indices[split]
    names = [f"{index.shards[shard]}/{key}" for shard, key in zip(index.shard, index.key, strict=True)]
    shards = {shard.name: shard.samples for shard in packed.manifest.splits[split].shards}
    return audit(entries, shards, names, lambda epoch: packed.draws.uses(len(index), seed=config.seed, epoch=epoch))
