"""A storage that refuses, is slow or breaks connections gives what a good one gives; a truncated shard costs its own videos."""

from __future__ import annotations

import numpy as np
import pytest

from tests import support
from tests.proxy import proxy
from vidfuse.config import DataConfig
from vidfuse.data import ranges
from vidfuse.data.clips import COSTS, ClipReader, parts_of
from vidfuse.data.shards import read_index, read_manifest
from vidfuse.on_ray.storage import join, open_storage, read_bytes, write_bytes
from vidfuse.train.shelf import Shelf

pytestmark = pytest.mark.s3
DATA = DataConfig(classes=3, frames=4, size=32)


@pytest.fixture(scope="module")
def url(s3, tmp_path_factory) -> str:
    source = support.make_ssv2(tmp_path_factory.mktemp("source"), {"train": 29, "validation": 3})
    made = s3.url("faulty")
    done = support.run_job("pack", str(source), made)
    assert done.returncode == 0, done.stderr
    return made


def read_all(url: str, *, step: int = 1, per_part: int = 32):
    """The split in the order of its index, where videos that follow each other are asked for at once, or each `step`-th."""
    filesystem, root = open_storage(url)
    index = read_index(filesystem, root, "train", manifest=read_manifest(filesystem, root))
    reader = ClipReader(filesystem, root, DATA, seed=0)
    read = [reader.read(part) for part in parts_of(index, np.arange(len(index))[::step], per_part, epoch=0)]
    return index, {name: np.concatenate([block[name] for block in read]) for name in read[0]}


@pytest.fixture
def faulty(s3, monkeypatch):
    """A proxy before the server; this process uses it."""
    with proxy(s3.endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        yield made


@pytest.mark.parametrize(("step", "per_part", "share"), [(-1, 32, 0.3), (1, 2, 0.4)], ids=["one by one", "neighbours at once"])
def test_clips_are_those_of_a_good_storage(url, faulty, step, per_part, share):
    _, good = read_all(url, step=step, per_part=per_part)
    for kind in ("500", "503", "cut", "slow"):
        faulty.faults.share, faulty.faults.kinds, faulty.faults.slow_seconds = share, (kind,), 0.2
        _, found = read_all(url, step=step, per_part=per_part)
        assert faulty.faults.done[kind] >= 4, faulty.faults.done  # the proxy's draws are the same in each run
        assert all(np.array_equal(good[name], found[name]) for name in good.keys() - set(COSTS)), kind
        assert (found["bytes"] == good["bytes"]).all()
    assert (good["weight"] == 1).all()


def test_checkpoints_are_stored_and_found(s3, faulty, tmp_path):
    shelf = Shelf(*open_storage(s3.url("shelf"), write=True))
    (tmp_path / "zero").mkdir()
    content = np.random.default_rng(0).bytes(12_000_000)  # several parts of an upload
    (tmp_path / "zero/state.pt").write_bytes(content)
    faulty.faults.share, faulty.faults.kinds, faulty.faults.slow_seconds = 0.3, ("500", "503", "slow"), 0.2
    for number in (1, 2, 3):
        name = f"step-{number:08d}-{number:04d}-abcd"
        shelf.close(name, shelf.store(name, tmp_path), {"top1": number / 10})
        shelf.note(name, {"top1": number / 10}, keep=1)
    assert sum(faulty.faults.done[kind] for kind in faulty.faults.kinds) >= 5
    assert shelf.names() == [name] and shelf.record()["best"] == name
    assert (shelf.fetch(name, tmp_path / "back") / "zero/state.pt").read_bytes() == content


def test_a_truncated_shard_costs_the_videos_behind_its_end(url):
    index, good = read_all(url)
    filesystem, root = open_storage(url)
    shard = int(index.shard[-1])
    path = join(root, index.shards[shard])
    content = read_bytes(filesystem, path)
    mine = [s for s in range(len(index)) if index.shard[s] == shard]
    lost = sorted(mine, key=lambda s: int(index.offset[s]))[-2:]
    end = int(index.offset[lost[0]] + index.size[lost[0]] - 1)
    try:
        write_bytes(filesystem, path, content[:end])
        ranges._open.cache_clear()  # an open file knows its size from before
        _, found = read_all(url)
    finally:
        write_bytes(filesystem, path, content)
        ranges._open.cache_clear()
    for sample in range(len(index)):
        broken = sample in lost
        assert found["weight"][sample] == (not broken) and bool(found["error"][sample]) == broken
        assert broken or np.array_equal(found["clip"][sample], good["clip"][sample])
    shard_name, key, reason = found["error"][lost[0]].split("\t")
    assert (shard_name, key) == (index.shards[shard], str(index.key[lost[0]]))
    assert reason == f"the shard ends at byte {end}, this video at {end + 1}: it is truncated"
