"""Checkpoints on a real S3 server: stored, verified, pruned; and a server that goes away. (In training: test_fit.py.)"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from tests import support
from vidfuse.on_ray import storage
from vidfuse.on_ray.storage import join, open_storage, read_bytes, write_bytes
from vidfuse.train import shelf as shelf_module
from vidfuse.train.errors import CheckpointError, DamageError
from vidfuse.train.keeper import Keeper
from vidfuse.train.shelf import FILES, UNFINISHED, Shelf
from vidfuse.train.worker import init_process_group

pytestmark = pytest.mark.s3
BIG = os.urandom(1024) * 20_000  # parts of a multipart upload


def shelf_at(url: str) -> Shelf:
    return Shelf(*open_storage(url, write=True))


def keeper_of(shelf: Shelf) -> Keeper:
    init_process_group()
    return Keeper(shelf, machine="here", in_place=False, publish=print)


def writing(content: bytes):
    def write(folder):
        (folder / "zero/state").mkdir(parents=True)
        (folder / "zero/state/rank_0.pt").write_bytes(content)
        (folder / "state.json").write_text("{}")

    return write


def found(shelf: Shelf):
    with keeper_of(shelf).find() as it:
        return it.name, it.folder and (it.folder / "zero/state/rank_0.pt").read_bytes(), it.damaged


def test_there_and_back_and_what_is_damaged_there(s3):
    shelf = shelf_at(s3.url("shelf"))
    assert found(shelf) == (None, None, ())
    keeper = keeper_of(shelf)
    names = [keeper.save(f"step-{n:08d}", writing(BIG + bytes([n])), {}, keep=3) for n in range(1, 6)]
    keeper.settle()
    assert shelf.names() == names[2:] and shelf.record()["last"] == names[4]
    assert found(shelf) == (names[4], BIG + bytes([5]), ())
    for name, file, content in (
        (names[4], "zero/state/rank_0.pt", BIG),
        (names[3], "state.json", None),
    ):
        path = join(shelf.root, name, file)
        shelf.filesystem.delete_file(path) if content is None else write_bytes(shelf.filesystem, path, content)
        with pytest.raises(DamageError) as error:
            shelf.verify(name)
        assert error.value.damage.file == file
    name, content, damaged = found(shelf)
    assert (name, content, [d.checkpoint for d in damaged]) == (names[2], BIG + bytes([3]), [names[4], names[3]])
    shelf.filesystem.delete_file(join(shelf.root, names[2], FILES))
    with pytest.raises(CheckpointError, match="no checkpoint of the run is good"):
        found(shelf)


def test_one_that_was_not_finished_is_never_picked_up(s3):
    shelf = shelf_at(s3.url("half"))
    write_bytes(shelf.filesystem, join(shelf.root, "step-00000001-0001-abcd", "state.json"), b"{}")
    name, content, damaged = found(shelf)
    assert (name, content, [d.found for d in damaged]) == (None, None, [UNFINISHED])


@pytest.fixture
def own_server(tmp_path, monkeypatch, s3):
    """A server that may be killed; started again with `again`, it has what it had."""
    folder = tmp_path / "server"
    with support.object_store(folder) as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        yield folder, store


def test_a_server_that_is_gone_is_told_and_one_that_comes_back_is_waited_for(own_server, monkeypatch):
    folder, store = own_server
    monkeypatch.setattr(storage, "ATTEMPTS", 3)  # the file system's own ten would be waited for each time: 85 s
    shelf = shelf_at(store.url("shelf"))
    keeper = keeper_of(shelf)
    good = keeper.save("step-00000001", writing(b"one"), {"top1": 0.5}, keep=1)
    keeper.settle()
    os.kill(store.pid, signal.SIGKILL)
    monkeypatch.setattr(shelf_module, "RETRY_SECONDS", 0.0)
    began = time.monotonic()
    lost = keeper.save("step-00000002", writing(b"two"), {}, keep=1)
    stalled = time.monotonic() - began
    with pytest.raises(CheckpointError, match=f"{lost} was not stored.*the one before is unharmed"):
        keeper.save("step-00000003", writing(b"three"), {}, keep=1)
    gave_up = time.monotonic() - began
    with pytest.raises(CheckpointError, match="the run's checkpoints cannot be read"):
        found(shelf)

    monkeypatch.setattr(shelf_module, "RETRY_SECONDS", 120.0)
    port = int(store.endpoint.rpartition(":")[2])
    third = keeper.save("step-00000003", writing(b"three"), {}, keep=1)
    time.sleep(5)
    with support.object_store(folder, port=port):
        keeper.settle()
        assert found(shelf)[:2] == (third, b"three")
        assert {good, third} <= set(shelf.names()) and shelf.record()["best"] == good
        shelf.verify(good)
        assert read_bytes(shelf.filesystem, join(shelf.root, third, "state.json")) == b"{}"
    print(f"\nstall {stalled:.2f} s; given up after {gave_up:.1f} s of the file system's own tries")
    assert stalled < 5 and threading.active_count() < 50
