"""Functions in another process: their crashes and hangs are exceptions, the next call works, and no process is left over."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pyarrow import fs as pafs

from tests import support
from vidfuse.config import from_mapping
from vidfuse.data import contained, decode
from vidfuse.data.clips import ClipReader, Part, Video
from vidfuse.data.contained import CrashError, iterate
from vidfuse.data.decode import decode_frames, probe
from vidfuse.data.video import DecodeError

pytest.importorskip("decord")

# --- what runs in the other process ---


def counted(count: int, fault: str = ""):
    yield from range(count)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hangs":
        time.sleep(60)
    if fault == "raises":
        raise EOFError("said the function")


def its_pid():
    yield os.getpid()


def its_modules():
    yield sorted(sys.modules)


def slow_but_alive(steps: int):
    for _ in range(steps):
        time.sleep(0.5)
        yield None
    yield "done"


def from_bytes(video, indices, *bounds):
    """decord reading from bytes, and a segmentation fault at an AVI that is cut off, where decord itself does not always crash."""
    import decord

    if int.from_bytes(video[4:8], "little") + 8 > len(video):
        ctypes.string_at(0)
    reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    yield list(zip(indices, reader.get_batch(indices).asnumpy(), strict=True))


# --- tests ---


def pid() -> int:
    (found,) = iterate(its_pid)
    return found


def alive(number: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    stat = Path(f"/proc/{number}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end_of(number: int, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while alive(number):
        assert time.monotonic() < end, f"process {number} is still there"
        time.sleep(0.05)


def test_items_come_in_order_from_one_process_that_is_kept():
    assert list(iterate(counted, 5)) == list(range(5))
    assert pid() == pid() != os.getpid()


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("killed", CrashError, r"^crashed \(signal 9\)$"),
        ("hangs", CrashError, r"^gave nothing for 2 s$"),
        ("raises", EOFError, "said the function"),
    ],
)
def test_what_was_yielded_before_a_fault_arrives_and_the_next_call_works(fault, error, words):
    before = pid()
    found = iterate(counted, 3, fault, seconds=2 if fault == "hangs" else 60)  # killed, it may die slowly
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error, match=words):
        next(found)
    assert list(iterate(counted, 2)) == [0, 1]
    assert (pid() == before) == (fault == "raises")
    if fault != "raises":
        wait_for_the_end_of(before)


def test_a_slow_function_that_is_alive_does_not_hang():
    pid()  # it has imported this module
    assert list(iterate(slow_but_alive, 6, seconds=2.5)) == [None] * 6 + ["done"]


def test_one_that_died_while_it_waited_is_replaced():
    before = pid()
    os.kill(before, signal.SIGKILL)
    contained._idle[-1].process.wait(20)
    assert pid() != before


def test_calls_at_the_same_time_have_a_process_each():
    a, b = iterate(counted, 3), iterate(counted, 3)
    assert [x for pair in zip(a, b, strict=True) for x in pair] == [0, 0, 1, 1, 2, 2]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda count: len(list(iterate(counted, count))), range(20))) == list(range(20))


def test_one_that_is_not_read_to_its_end_is_let_go():
    found = iterate(its_pid_for_ever)
    number = next(found)
    del found
    gc.collect()
    wait_for_the_end_of(number)


def its_pid_for_ever():
    while True:
        yield os.getpid()


def test_threads_that_end_take_no_process_with_them():
    with ThreadPoolExecutor(1) as pool:
        before = pool.submit(pid).result()
    time.sleep(0.2)
    assert alive(before)


def test_it_imports_what_decoding_needs_and_nothing_of_its_parent(tmp_path):
    """The parent's main module, which in a Ray worker is Ray's own, is not run there."""
    script = tmp_path / "main.py"
    script.write_text(
        "import colorsys, sys\n"
        "from tests import support\n"
        "from vidfuse.data import contained, decode\n"
        "assert len(list(decode.decode_frames(support.make_video(4), [0], decoder='decord'))) == 1\n"
        "print(*contained.iterate(eval, '__import__(\"sys\").modules'))\n"
    )
    settings = {**os.environ, "PYTHONPATH": str(support.REPO)}
    done = subprocess.run([sys.executable, str(script)], env=settings, capture_output=True, text=True, check=True)
    there = done.stdout.split()
    assert {"vidfuse.data.decode", "decord", "numpy"} <= {*there}
    assert not {"colorsys", "tests.support", "torch", "ray", "pydantic", "vidfuse.config"} & {*there}


@pytest.mark.parametrize("busy", [False, True])
def test_it_dies_with_a_parent_that_is_killed(busy):
    """Also while it is at work, where it does not look at the pipe. The parent's main module must not be run again."""
    code = f"""
import sys
from tests.data.test_contained import *
first = iterate(its_pid)
print(next(first), list(first), flush=True)
list(iterate(slow_but_alive, 0) if not {busy} else iterate(counted, 0, "hangs"))
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=support.REPO, **pipes) as parent:
        number = int(parent.stdout.readline().split()[0])
        time.sleep(0.3)
        assert alive(number)
        parent.kill()
        parent.wait()
        wait_for_the_end_of(number, 5)


# --- decord ---


def test_a_decoder_that_crashes_costs_its_own_video(monkeypatch):
    """A real segmentation fault of decord's; through a file, as it is called here, 900 mutated videos gave none."""
    good = support.make_video(30, suffix="avi")
    cut = good[: len(good) * 55 // 100]
    with monkeypatch.context() as patch:
        patch.setattr(decode, "_decode_decord", from_bytes)
        with pytest.raises(match=r"^the decoder crashed \(signal 11\)$"):
            list(decode_frames(cut, [0, 3], decoder="decord"))
        assert [i for i, _ in decode_frames(good, [0, 3], decoder="decord")] == [0, 3]
    with pytest.raises(DecodeError):
        list(decode_frames(cut, [0, 29], decoder="decord"))
    assert {i: support.shown_index(f) for i, f in decode_frames(good, [0, 29], decoder="decord")} == {0: 0, 29: 29}


def test_a_decoder_that_hangs_costs_its_own_video(monkeypatch):
    monkeypatch.setattr(contained, "iterate", lambda *_, **__: iterate(counted, 0, "hangs", seconds=0.3))
    for call in (lambda: probe(b"x", decoder="decord"), lambda: list(decode_frames(b"x", [0], decoder="decord"))):
        with pytest.raises(match=r"^the decoder gave nothing for 0\.3 s$"):
            call()


def test_it_is_the_real_decoder_that_runs_there():
    """Frames are those of decord in this process."""
    for suffix in ("mp4", "avi"):
        video = support.make_video(40, suffix=suffix)
        wanted = [0, 7, 16, 39]
        here = [item for some in decode._decode_decord(video, wanted, 100, 10**6) for item in some]
        there = list(decode_frames(video, wanted, decoder="decord"))
        assert [i for i, _ in here] == [i for i, _ in there] == wanted
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(here, there, strict=True))


def test_a_part_goes_on_after_a_crash(tmp_path, monkeypatch):
    """The second of three videos makes the decoder crash: its row has weight 0 and the reason, the others are read."""
    good = support.make_video(30, suffix="avi")
    contents = [good, good[: len(good) * 55 // 100], good]
    (tmp_path / "a.tar").write_bytes(b"".join(contents))
    starts = np.cumsum([0, *map(len, contents)])
    rows = tuple(Video(i, "a.tar", f"key{i}", 0, int(starts[i]), len(c), 30, 128, 96) for i, c in enumerate(contents))
    monkeypatch.setattr(decode, "_decode_decord", from_bytes)
    config = from_mapping({"data": {"frames": 4, "size": 32, "decoder": "decord"}})
    columns = ClipReader(pafs.LocalFileSystem(), str(tmp_path), config.data, 0).read(Part(None, rows))
    assert columns["weight"].tolist() == [1, 0, 1]
    assert columns["error"].tolist() == ["", "a.tar\tkey1\tthe decoder crashed (signal 11)", ""]
    assert columns["clip"][0].any() and np.array_equal(columns["clip"][0], columns["clip"][2])
