"""Checkpoints in the background: two ranks on a disk, storage that is slow, that fails, and processes that die."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import torch.distributed as dist

from vidfuse.train.errors import CheckpointError
from vidfuse.train.keeper import Keeper
from vidfuse.train.shelf import FILES, UNFINISHED, Shelf
from vidfuse.train.worker import init_process_group


class Slow(Shelf):
    """Storage that can be held up and can fail."""

    gate = threading.Event()
    fault: Exception | None = None

    def store(self, name, folder):
        assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        return super().store(name, folder)


@pytest.fixture
def slow(tmp_path):
    Slow.gate, Slow.fault = threading.Event(), None
    yield Slow(pafs.LocalFileSystem(), str(tmp_path / "run"))
    Slow.gate.set()


def keeper_of(shelf, *, published=None, in_place=False):
    init_process_group()
    return Keeper(shelf, machine="here", in_place=in_place, publish=(published if published is not None else []).append)


def write(content: str):
    return lambda folder: (folder / "state.json").write_text(content) and None


def found(shelf) -> tuple[str | None, str | None, list[str]]:
    with keeper_of(shelf).find() as it:
        content = (it.folder / "state.json").read_text() if it.folder else None
        return it.name, content, [damage.found for damage in it.damaged]


def test_training_goes_on_while_a_checkpoint_is_stored(slow):
    keeper = keeper_of(slow)
    began = time.monotonic()
    name = keeper.save("step-00000001", write("one"), {}, keep=2)
    assert time.monotonic() - began < 30 and not slow.gate.is_set()
    assert slow.names() == [] and found(slow) == (None, None, [])  # not whole: it does not count
    slow.gate.set()
    keeper.settle()
    assert found(slow) == (name, "one", []) and slow.record()["last"] == name


def test_one_at_a_time(slow):
    keeper, order = keeper_of(slow), []

    def writing(content):
        def it(folder):
            order.append((content, slow.names()))
            write(content)(folder)

        return it

    first = keeper.save("step-00000001", writing("one"), {}, keep=2)
    threading.Timer(0.3, slow.gate.set).start()
    second = keeper.save("step-00000002", writing("two"), {}, keep=2)
    assert order == [("one", []), ("two", [first])]
    keeper.settle()
    assert slow.names() == [first, second]


def test_a_step_that_is_saved_again_is_another_checkpoint(slow):
    slow.gate.set()
    keeper = keeper_of(slow)
    names = [keeper.save("step-00000001", write(c), {}, keep=9) for c in ("one", "two")]
    keeper.settle()
    assert slow.names() == names and len(set(names)) == 2 and found(slow)[:2] == (names[1], "two")


def test_a_fault_of_the_storage_is_raised_at_the_next_save_and_harms_nothing(slow):
    slow.gate.set()
    keeper = keeper_of(slow)
    good = keeper.save("step-00000001", write("one"), {"top1": 0.5}, keep=1)
    keeper.settle()
    Slow.fault = OSError(5, "the storage is gone")
    lost = keeper.save("step-00000002", write("two"), {}, keep=1)
    with pytest.raises(CheckpointError, match=f"{lost} was not stored.*the storage is gone.*the one before is unharmed"):
        keeper.save("step-00000003", write("three"), {}, keep=1)
    assert found(slow)[:2] == (good, "one") and slow.record()["last"] == slow.record()["best"] == good
    Slow.fault = None
    keeper.save("step-00000003", write("three"), {}, keep=1)  # told once; the storage is back
    keeper.settle()
    assert found(slow)[1] == "three"


def test_a_fault_at_the_end_is_raised_there(slow):
    Slow.fault = RuntimeError("not even an OSError")
    slow.gate.set()
    keeper = keeper_of(slow)
    keeper.save("step-00000001", write("one"), {}, keep=1)
    with pytest.raises(CheckpointError, match="RuntimeError: not even an OSError"):
        keeper.settle()
    keeper.settle()


def test_an_end_by_another_fault_waits_no_longer_than_it_may(slow):
    keeper = keeper_of(slow)
    keeper.save("step-00000001", write("one"), {}, keep=1)
    with pytest.raises(CheckpointError, match=r"given up.*0\.1 s"):
        keeper.settle(at_most_seconds=0.1)


def test_records_are_those_of_the_save_and_are_there_before_the_checkpoint_counts(slow, tmp_path):
    records, seen = tmp_path / "records", []
    records.mkdir()
    (records / "metrics.jsonl").write_text("step 1\n")

    def publish(folder):
        whole = [name for name in slow.names() if (Path(slow.root) / name / FILES).exists()]
        seen.append(((folder / "metrics.jsonl").read_text(), whole))

    init_process_group()
    keeper = Keeper(slow, machine="here", in_place=False, publish=publish)
    keeper.save("step-00000001", write("one"), {}, keep=2, records=records)
    with open(records / "metrics.jsonl", "a") as file:
        file.write("step 2\n")
    slow.gate.set()
    keeper.settle()
    assert seen == [("step 1\n", [])]


def test_nothing_is_left_behind_on_the_machine(slow, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    slow.gate.set()
    keeper = keeper_of(slow)
    (tmp_path / "records").mkdir()
    keeper.save("step-00000001", write("one"), {}, keep=2, records=tmp_path / "records")
    keeper.settle()
    found(slow)
    Slow.fault = OSError(5, "gone")
    keeper.save("step-00000002", write("two"), {}, keep=2, records=tmp_path / "records")
    with pytest.raises(CheckpointError):
        keeper.settle()
    assert list(scratch.iterdir()) == []


# --- two ranks ---


def _find(shelf: Shelf, machine: str) -> tuple:
    with Keeper(shelf, machine=machine, in_place=False, publish=print).find() as it:
        parts = it.folder and sorted(p.read_text() for p in (it.folder / "zero").iterdir())
        return it.name, parts, [(damage.checkpoint, damage.file) for damage in it.damaged], str(it.folder)


def _rank(rank: int, store: str, root: str, case: str) -> list:
    options = {"store": dist.FileStore(store, 2), "rank": rank, "world_size": 2, "timeout": timedelta(seconds=60)}
    dist.init_process_group("gloo", **options)
    shelf, told = Shelf(pafs.LocalFileSystem(), root), []

    def writing(folder: Path) -> None:
        (folder / "zero").mkdir()
        (folder / "zero" / f"rank_{rank}").write_text(f"part {rank}")
        if case == "full" and rank == 1:
            raise OSError(28, "No space left on device")

    def store_fails(name, folder):
        raise OSError(5, "rank 1 cannot reach the storage")

    def dies(name, folder):
        os._exit(9)

    keeper = Keeper(shelf, machine="a", in_place=False, publish=print)
    if rank == 1 and case in ("upload", "killed"):
        object.__setattr__(shelf, "store", store_fails if case == "upload" else dies)
    try:
        for step in (1, 2):
            keeper.save(f"step-{step:08d}", writing, {"top1": 0.5}, keep=2)
        keeper.settle()
    except CheckpointError as error:
        return [str(error).partition(": ")[2]]
    if rank == 0:
        (Path(root) / shelf.names()[-1] / "zero/rank_1").write_text("PART 1")
    dist.barrier()
    for machine in ("a", "ab"[rank]):
        told.append(_find(shelf, machine))
    return told


def two(root: Path, case: str) -> list:
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_rank, rank, f"{folder}/store", str(root), case) for rank in range(2)]
        return [job.exception() or job.result() for job in jobs]


def test_two_ranks_make_one_checkpoint_and_agree_on_the_good_one(tmp_path):
    """Of one machine (a copy each would be waste), then of two."""
    (here, mine), (there, its) = two(tmp_path, "good")
    shelf = Shelf(pafs.LocalFileSystem(), str(tmp_path))
    first, second = shelf.names()
    assert set(shelf.contents(second)[0]) == {"zero/rank_0", "zero/rank_1"}
    expected = (first, ["part 0", "part 1"], [(second, "zero/rank_1")])
    assert here[:3] == there[:3] == mine[:3] == its[:3] == expected
    assert here[3] == there[3] and mine[3] != its[3]


@pytest.mark.parametrize(("case", "words"), [("full", "No space left"), ("upload", "rank 1 cannot reach the storage")])
def test_a_fault_of_one_rank_is_told_by_all(tmp_path, case, words):
    first, second = two(tmp_path, case)
    assert first == second and words in first[0]
    assert Shelf(pafs.LocalFileSystem(), str(tmp_path)).record()["last"] is None


def test_a_rank_that_is_killed_while_it_stores_leaves_a_checkpoint_that_does_not_count(tmp_path):
    two(tmp_path, "killed")
    shelf = Shelf(pafs.LocalFileSystem(), str(tmp_path))
    assert len(shelf.names()) == 1 and shelf.record()["last"] is None  # rank 0 has stored its part
    assert found(shelf) == (None, None, [UNFINISHED])
