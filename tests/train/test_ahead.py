"""Steps that are copied ahead: the same ones in the same order, one at a time, and nothing left running."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidfuse.config import from_mapping
from vidfuse.data.batch import Batch, Features
from vidfuse.data.feed import Feed
from vidfuse.data.sampling import World
from vidfuse.train import ahead as ahead_module
from vidfuse.train.ahead import Ahead, ahead
from vidfuse.train.clock import Clock


def batch_of(seed: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    clips = torch.randint(0, 256, (2, 4, 8, 8, 3), dtype=torch.uint8, generator=draw).permute(0, 1, 4, 2, 3)
    tokens = Features(torch.rand(2, 5, 3, generator=draw), torch.rand(5, 3))
    return Batch(
        clips, torch.tensor([seed, 1]), torch.tensor([1.0, 0.0]), torch.tensor([seed, -1]), features={"motion": tokens}
    )


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "vidfuse-ahead"]


def test_one_item_is_made_while_another_is_used():
    asked: list[int] = []

    def items():
        for number in range(6):
            asked.append(number)
            yield number

    made = Ahead(items(), lambda number: number * 10)
    for number in range(6):
        deadline = time.monotonic() + 10
        while len(asked) <= number and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert asked == list(range(number + 1)), "the next one, and no further: STEPS_HELD with the one in use"
        assert next(made) == number * 10
    assert list(made) == [] and list(made) == []
    assert not running()


def test_a_fault_is_raised_at_its_place():
    def items():
        yield 1
        raise OSError("the storage is gone")

    made = Ahead(items(), lambda number: number)
    assert next(made) == 1
    with pytest.raises(OSError, match="the storage is gone"):
        next(made)
    assert list(made) == [] and not running()


def test_what_is_not_read_to_its_end_is_let_go():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    source = items()
    with contextlib.closing(Ahead(source, lambda number: number)) as made:
        next(made)
    assert not running()
    source.close()  # no thread is inside of it
    assert closed.is_set() and list(made) == []


def test_a_fault_is_told_though_the_stream_gives_nothing(monkeypatch):
    """The thread that waits for the stream is left behind; when the stream gives something, it alone is in there, and ends it."""
    monkeypatch.setattr(ahead_module, "PARTING_SECONDS", 0.2)
    gpu, ended_by = FakeGpu(monkeypatch), queue.SimpleQueue[str]()
    waits, gives = threading.Event(), threading.Event()
    monkeypatch.setattr(Batch, "pinned", lambda batch: pinned.append(batch) or batch)
    pinned: list[Batch] = []

    def stream(epoch, left):
        try:
            for number in range(8):
                if number == 2:
                    waits.set()
                    assert gives.wait(60)
                yield batch_of(number)
        finally:
            ended_by.put(threading.current_thread().name)

    config = from_mapping({"train": {"global_batch": 2, "micro_batch": 1}})
    feed = Feed(config, SimpleNamespace(indices={"train": range(8)}), World(1, 0, 2, 1), None)
    monkeypatch.setattr(feed, "_open", stream)
    began = time.monotonic()
    with pytest.raises(ZeroDivisionError), contextlib.closing(feed):
        for step in Clock().timed(ahead(feed.train(0, np.arange(8)), torch.device("cuda", 0))):
            assert waits.wait(10)
            raise ZeroDivisionError(f"in a step of {len(step)} micro batches")
    assert time.monotonic() - began < 5 and running() and ended_by.empty()
    assert gpu.streams and len(pinned) == 2
    gives.set()
    assert ended_by.get(timeout=10) == "vidfuse-ahead" and len(pinned) == 2
    while running():
        time.sleep(0.01)


def test_on_a_cpu_there_is_no_thread_and_no_copy():
    steps = [(batch_of(0), batch_of(1)), (batch_of(2),)]
    given = ahead(iter(steps), torch.device("cpu"))
    assert next(given) is steps[0] and not running() and next(given) is steps[1]


def test_weights_stay_on_the_host_too():
    batch = batch_of(3)
    moved = batch.to(torch.device("meta"))
    assert moved.clips.is_meta and moved.features["motion"].values.is_meta and moved.weights.is_meta
    assert not moved.samples.is_meta and moved.host_weights is batch.weights is batch.host_weights
    assert moved.to(torch.device("meta")).host_weights is batch.weights


def test_weights_are_on_the_host_after_pinning_too(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    batch = batch_of(3)
    moved = batch.pinned().to(torch.device("meta"))
    assert moved.weights.is_meta and moved.features["motion"].values.is_meta
    assert torch.equal(moved.host_weights, batch.weights) and torch.equal(moved.samples, batch.samples)


class FakeGpu:
    """A CPU in the place of a GPU: what is asked of its streams, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, object]] = []
        self.streams: list[FakeGpu] = []
        ahead_module.copy_stream.cache_clear()
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: self.asked.append(("kept", tensor.data_ptr()))
        )
        monkeypatch.setattr(Batch, "to", lambda batch, device: batch)

    def stream(self, device: int) -> FakeGpu:
        self.streams.append(self)
        return self

    def record_event(self) -> int:
        return len(self.asked)

    def wait_event(self, event: int) -> None:
        self.asked.append(("waited", event))


def test_a_step_waits_for_its_copy_and_its_memory_is_kept_for_its_user(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    sent = [(batch_of(0), batch_of(1)), (batch_of(2), batch_of(3))]
    for step, there in zip(sent, ahead(iter(sent), torch.device("cuda", 0)), strict=True):
        assert [name for name, _ in gpu.asked] == ["waited", *["kept"] * 8]
        tensors = [t for b in there for t in (b.clips, b.labels, b.weights, b.features["motion"].values)]
        assert [pointer for name, pointer in gpu.asked if name == "kept"] == [t.data_ptr() for t in tensors]
        assert all(torch.equal(one.clips, other.clips) for one, other in zip(step, there, strict=True))
        gpu.asked.clear()
    ahead_module.copy_stream.cache_clear()


def test_a_device_has_one_stream_of_copies_for_all_epochs(monkeypatch):
    """Memory that is freed goes to the stream that allocated it: with streams of their own, epochs would hold that of all before."""
    gpu = FakeGpu(monkeypatch)
    for device in (torch.device("cuda", 0), torch.device("cuda"), torch.device("cuda", 0), torch.device("cuda", 1)):
        assert len(list(ahead(iter([(batch_of(0),)]), device))) == 1
    assert len(gpu.streams) == 2
    ahead_module.copy_stream.cache_clear()


# --- On a GPU. None of these has been run yet: there was none. ---

STEPS, LARGE = 8, (32, 16, 3, 288, 288)
"""127 MB of clips a step."""
LONG = 1_000_000_000
"""Clock cycles, some half a second: longer than a step takes to come, pinned memory allocated anew included."""


def large(value: int) -> Batch:
    """Of one value, so that it is compared where it is, without waiting for it."""
    some = torch.arange(LARGE[0])
    return Batch(torch.full(LARGE, value, dtype=torch.uint8), some + value, torch.full((LARGE[0],), float(value)), some)


def right(batch: Batch, value: int) -> torch.Tensor:
    """Whether it is `large(value)`; on the device, where it is looked at when its stream comes to it."""
    return (batch.clips == value).all() & (batch.weights == value).all() & (batch.labels[0] == value)


def this_gpu() -> tuple[torch.device, torch.cuda.Stream]:
    index = torch.cuda.current_device()
    return torch.device("cuda", index), ahead_module.copy_stream(index)


@pytest.mark.gpu
def test_what_arrives_on_a_gpu_is_what_was_sent():
    device, _ = this_gpu()
    sent = [tuple(batch_of(10 * step + number) for number in range(3)) for step in range(20)]
    for step, there in zip(sent, ahead(iter(sent), device), strict=True):
        for one, other in zip(step, there, strict=True):
            assert other.clips.device == device and not other.host_weights.is_cuda
            assert torch.equal(other.host_weights, one.weights)
            for name in ("clips", "labels", "weights"):
                assert torch.equal(getattr(other, name).cpu(), getattr(one, name))
            assert torch.equal(other.features["motion"].values.cpu(), one.features["motion"].values)
    assert not running()


@pytest.mark.gpu
def test_a_gpu_uses_a_step_when_it_has_come():
    """Copies begin late: who does not wait for them sees what was in that memory before."""
    device, copies = this_gpu()

    def late():
        for value in range(1, STEPS + 1):
            with torch.cuda.stream(copies):
                torch.cuda._sleep(LONG)
            yield (large(value),)

    found = [right(batch, value) for value, (batch,) in enumerate(ahead(late(), device), 1)]
    assert torch.stack(found).all()


@pytest.mark.gpu
def test_memory_of_a_step_is_not_used_anew_before_the_step_is_done():
    """The device looks at steps long after they were dropped, while the copies' stream writes to all memory that it gets."""
    device, copies = this_gpu()

    def overwriting():
        for value in range(1, STEPS + 1):
            time.sleep(0.05)  # the step before the one in use is dropped by now
            with torch.cuda.stream(copies):
                torch.empty(LARGE, dtype=torch.uint8, device=device).zero_()
            yield (large(value),)

    found = []
    for value, (batch,) in enumerate(ahead(overwriting(), device), 1):
        torch.cuda._sleep(LONG)
        found.append(right(batch, value))
        del batch
    assert torch.stack(found).all()


@pytest.mark.gpu
def test_a_gpu_computes_while_the_next_step_comes():
    device, _ = this_gpu()
    sent = [(large(value),) for value in range(1, STEPS + 1)]
    matrix = torch.rand(4096, 4096, device=device)

    def milliseconds(steps, products: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in steps:
            for _ in range(products):
                torch.mm(matrix, matrix)
            torch.cuda.synchronize()  # as a step does that looks at its loss
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    milliseconds(ahead(iter(sent), device), 1)  # memory is allocated, kernels are loaded
    copied = milliseconds((batch.pinned().to(device) for (batch,) in sent), 0)
    products = max(round(100 * copied / milliseconds(range(STEPS), 100)), 1)
    computed = milliseconds(range(STEPS), products)
    together = milliseconds(ahead(iter(sent), device), products)
    assert together < 0.8 * (copied + computed), (
        f"copied {copied:.0f} ms, computed {computed:.0f} ms, together {together:.0f} ms"
    )
