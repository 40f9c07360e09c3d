"""Steps that are copied ahead: the same ones in the same order, one at a time, and nothing left running."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest
import torch

from vidfuse.data.batch import Batch, Features
from vidfuse.train import ahead as ahead_module
from vidfuse.train.ahead import Ahead, ahead


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
        assert asked == list(range(number + 1)), "the next one, and no further"
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


@pytest.mark.gpu
def test_what_arrives_on_a_gpu_is_what_was_sent():
    device = torch.device("cuda", torch.cuda.current_device())
    sent = [tuple(batch_of(10 * step + number) for number in range(3)) for step in range(20)]
    busy = torch.rand(2048, 2048, device=device)
    for step, there in zip(sent, ahead(iter(sent), device), strict=True):
        for _ in range(5):
            busy = busy @ busy.softmax(-1)  # so that the copies come while the device works
        for one, other in zip(step, there, strict=True):
            assert other.clips.device == device and other.host_weights is one.weights
            for name in ("clips", "labels", "weights"):
                assert torch.equal(getattr(other, name).cpu(), getattr(one, name))
            assert torch.equal(other.features["motion"].values.cpu(), one.features["motion"].values)
    assert not running()
