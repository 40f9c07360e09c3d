"""Streams that follow each other: all of it in order, the next one started in time, and nothing left when they are let go."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from vidfuse.data import relay as module
from vidfuse.data.relay import relay

READER = SimpleNamespace(rows=lambda part: 2)


class Reading:
    """A `pull` that notes what it does; each part is two rows of its number."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.ended = 0
        self.may_start = threading.Event()
        self.may_start.set()
        self.fails_at = -1
        self.threads: set[str] = set()

    def __call__(self, reader, parts, rows):
        self.begun.append(list(parts))
        self.threads.add(threading.current_thread().name)
        assert self.may_start.wait(20)
        if len(self.begun) - 1 == self.fails_at:
            raise OSError("the storage is gone")
        try:
            for part in parts:
                yield {"sample": np.full(rows, part)}
        finally:
            self.ended += 1


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Streams of 4 and then of 10 parts; the next one may start as soon as half of one is used."""
    monkeypatch.setattr(module, "FIRST_PARTS", 4)
    monkeypatch.setattr(module, "PARTS_AT_ONCE", 10)
    monkeypatch.setattr(module, "AHEAD_SECONDS", 1e9)


def numbers(stream) -> list[int]:
    return [int(columns["sample"][0]) for columns in stream]


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 14, 15, 40])
def test_all_parts_come_in_order(count):
    reading = Reading()
    assert numbers(relay(reading, READER, iter(range(count)), 2)) == list(range(count))
    assert [len(some) for some in reading.begun][:2] == [n for n in (min(count, 4), min(count - 4, 10)) if n > 0]
    assert [part for some in reading.begun for part in some] == list(range(count)) and reading.ended == len(reading.begun)


def test_the_next_one_starts_when_half_of_the_last_is_used_and_nobody_waits_for_it():
    reading = Reading()
    stream = relay(reading, READER, iter(range(24)), 2)
    assert int(next(stream)["sample"][0]) == 0 and len(reading.begun) == 1
    reading.may_start.clear()
    for expected in (1, 2, 3):  # the first one's, while the second cannot start
        assert int(next(stream)["sample"][0]) == expected
        until(lambda: len(reading.begun) == 2)
    reading.may_start.set()
    assert [int(next(stream)["sample"][0]) for _ in range(4)] == [4, 5, 6, 7]
    assert len(reading.begun) == 2, "never more than two at a time"
    assert numbers(stream) == list(range(8, 24)) and len(reading.begun) == 3
    assert threading.current_thread().name not in reading.threads


def test_one_that_lasts_long_lets_the_next_wait(monkeypatch):
    """At the pace at which it is used: ten parts of which each takes 0.05 s, and 0.12 s ahead."""
    monkeypatch.setattr(module, "FIRST_PARTS", 10)
    monkeypatch.setattr(module, "AHEAD_SECONDS", 0.12)
    reading, begun = Reading(), []
    for _ in relay(reading, READER, iter(range(20)), 2):
        time.sleep(0.05)
        begun.append(len(reading.begun))
    assert begun[:6] == [1] * 6, "not in the first half, nor long before it is used up"
    assert begun[10:] == [2] * 10


def test_what_a_stream_cannot_read_is_told_after_all_that_was_read_before():
    reading = Reading()
    reading.fails_at = 1
    found: list[int] = []
    with pytest.raises(OSError, match="the storage is gone"):
        for columns in relay(reading, READER, iter(range(24)), 2):
            found.append(int(columns["sample"][0]))
    assert found == [0, 1, 2, 3] and len(reading.begun) == 2 and reading.ended == 1


@pytest.mark.parametrize("starting", [False, True])
def test_streams_that_are_let_go_are_closed(starting):
    """Also the one that is being started just then."""
    reading = Reading()
    stream = relay(reading, READER, iter(range(24)), 2)
    next(stream)
    if starting:
        reading.may_start.clear()
    next(stream)
    until(lambda: len(reading.begun) == 2)
    threading.Timer(0.3, reading.may_start.set).start()
    stream.close()
    assert reading.may_start.is_set() or not starting, "it is waited for"
    until(lambda: reading.ended == 2)
    assert len(reading.begun) == 2


def test_one_that_does_not_start_is_not_waited_for_long(monkeypatch):
    monkeypatch.setattr(module, "PARTING_SECONDS", 0.1)
    reading = Reading()
    stream = relay(reading, READER, iter(range(24)), 2)
    next(stream)
    reading.may_start.clear()
    next(stream)
    until(lambda: len(reading.begun) == 2)
    stream.close()
    assert not reading.may_start.is_set()
    reading.may_start.set()
    until(lambda: reading.ended == 2)
