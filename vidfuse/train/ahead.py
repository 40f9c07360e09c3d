"""Batches on their way to a GPU while the one before is used.

Comes in: steps, each as its micro batches. Goes out: the same steps, on the device. A thread takes the next step from the stream, copies
it to pinned memory and from there, on a CUDA stream of its own, to the device: one step waits there while one is used. On a CPU nothing
is copied and there is no thread; Ray Data reads ahead as it is.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from vidfuse.data.batch import Batch

Step = tuple[Batch, ...]
T = TypeVar("T")
U = TypeVar("U")

PARTING_SECONDS = 5.0
"""How long a thread that waits for the stream is waited for when nobody wants its next step any more."""
STEPS_HELD = 2
"""Steps that a GPU holds at a time: one is used, one is on its way."""


def ahead(steps: Iterator[Step], device: torch.device) -> Iterator[Step]:
    """The steps on a device, in the same order, the next one being copied while one is used.

    What the stream raises is raised here, at its place.
    """
    if device.type != "cuda":
        yield from steps
        return
    copies = copy_stream(torch.cuda.current_device() if device.index is None else device.index)

    def copy(step: Step) -> tuple[Step, torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(copies):
            return tuple(batch.pinned().to(device) for batch in step), copies.record_event()

    with contextlib.closing(Ahead(steps, copy)) as copied:
        for step, done in copied:
            used = torch.cuda.current_stream(device)
            used.wait_event(done)
            for batch in step:
                batch.record_stream(used)
            yield step


@functools.cache
def copy_stream(device: int) -> torch.cuda.Stream:
    """The stream on which everything is copied to a device: memory that is freed is used anew on the stream of its allocation alone."""
    return torch.cuda.Stream(device)


class Ahead(Generic[T, U]):
    """An iterator whose next item is made by a thread while one is used; `close` it where it is not read to its end."""

    def __init__(self, items: Iterator[T], make: Callable[[T], U]) -> None:
        self._room = threading.Semaphore(1)
        self._made: queue.SimpleQueue[U | BaseException | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(items, make), name="vidfuse-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[U]:
        return self

    def __next__(self) -> U:
        made = None if self._closed else self._made.get()
        if made is None or isinstance(made, BaseException):
            self.close()
            raise StopIteration if made is None else made
        self._room.release()
        return made

    def close(self) -> None:
        """End the thread.

        If it waits for the stream, it is waited for no longer than `PARTING_SECONDS`: what closes this may be a fault that is to be told.
        It ends when the stream has given what it was asked for, and lets go of the stream then; nothing is made of that any more.
        """
        self._closed = True
        self._room.release()
        self._thread.join(PARTING_SECONDS)

    def _work(self, items: Iterator[T], make: Callable[[T], U]) -> None:
        last: BaseException | None = None
        try:
            while self._room.acquire() and not self._closed:
                item = next(items)
                if not self._closed:
                    self._made.put(make(item))
        except StopIteration:
            pass
        except BaseException as error:
            last = error
        self._made.put(last)
