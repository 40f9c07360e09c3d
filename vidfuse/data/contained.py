"""A function that may take its process down with it, run in another one: a crash there is an exception here.

Comes in: a function of a module, its arguments, how long it may be silent. Goes out: what it yields, one by one, or `CrashError`. The
process is kept for the next call and replaced after a crash or a hang; calls at the same time have one each. It starts as a bare
interpreter with this one's `sys.path`, not as `multiprocessing` starts one: that would import the parent's main module, which in a
Ray worker is Ray's own. It dies with its parent, however the parent ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from typing import Any

SILENT_SECONDS = 60.0
"""How long a function may be silent before it counts as hanging."""
START_SECONDS = 600.0
"""How long a new process may take to be there: many may start at once, from a slow disk."""

_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vidfuse.data.contained import _serve; _serve()"
_READY, _ITEM, _END, _ERROR = range(4)
_GONE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1


class CrashError(Exception):
    """The process of a function died, or was silent for too long; the message says which."""

    @property
    def killed(self) -> bool:
        """Whether something else ended it, as the kernel does where no memory is left."""
        return f"signal {signal.SIGKILL:d}" in str(self)


def iterate(function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float = SILENT_SECONDS) -> Iterator[Any]:
    """Yield what a function yields that runs in another process.

    Args:
        function: Found by its name in its module, which is imported there.
        arguments: Can be pickled, as must be what is yielded.
        seconds: How long it may be silent: until the first item, and between two.

    Raises:
        CrashError: while iterating: it crashed or hangs.
        OSError: the process cannot be started, which is not the function's fault.
        Exception: what the function raises.
    """
    child, whole = _take(), False
    try:
        child.ask(function, arguments)
        while True:
            kind, value = child.answer(seconds)
            whole = kind in (_END, _ERROR)
            if kind == _ERROR:
                raise value
            if kind == _END:
                return
            yield value
    finally:  # one that was not read to its end is still at it
        if whole:
            _idle.append(child)
        else:
            child.end()


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    pipe: Connection

    @classmethod
    def start(cls) -> _Child:
        here, there = Pipe()
        with there:
            path = json.dumps([str(folder) for folder in sys.path])
            command = [sys.executable, "-c", _CODE, path, str(there.fileno()), str(os.getpid())]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(there.fileno(),))
        child = cls(process, here)
        try:
            child.answer(START_SECONDS)
        except CrashError as error:
            child.end()
            raise OSError(f"the process in which videos are decoded does not start: it {error}") from None
        return child

    def ask(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it is dead, which `answer` tells
            _send(self.pipe, (function, arguments))

    def answer(self, seconds: float) -> tuple[int, Any]:
        try:
            if not self.pipe.poll(seconds):
                raise CrashError(f"gave nothing for {seconds:g} s")
            kind, value = _receive(self.pipe)
            return kind, value
        except (EOFError, OSError):
            raise CrashError(f"crashed ({self.end(_GONE_SECONDS)})") from None

    def end(self, wait: float = 0.0) -> str:
        """End the process, which may end by itself for some seconds more, and say how it ended."""
        self.pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(wait)
        self.process.kill()
        status = self.process.wait()
        return f"signal {-status}" if status < 0 else f"exit code {status}"


_idle: list[_Child] = []
_starter = ThreadPoolExecutor(1, "vidfuse-contained")
"""The kernel ends a child with the *thread* that started it: this one lives as long as the process does."""


def _take() -> _Child:
    while _idle:
        with contextlib.suppress(IndexError):  # another thread was faster
            child = _idle.pop()
            if child.process.poll() is None:
                return child
            child.end()
    return _starter.submit(_Child.start).result()


def _forget() -> None:
    """In a process that was forked off: the children are its parent's, and the thread is not here."""
    global _starter
    _idle.clear()
    _starter = ThreadPoolExecutor(1, "vidfuse-contained")


os.register_at_fork(after_in_child=_forget)


def _send(pipe: Connection, message: Any) -> None:
    """Arrays go as they are: `Connection.send` alone copies them so often that frames take three times as long."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    pipe.send((head, [view.nbytes for view in views]))
    for view in views:
        pipe.send_bytes(view)


def _receive(pipe: Connection) -> Any:
    head, sizes = pipe.recv()
    buffers = [bytearray(size) for size in sizes]
    for buffer in buffers:
        pipe.recv_bytes_into(buffer)
    return pickle.loads(head, buffers=buffers)  # noqa: S301  (of the process that was started here)


# --- the other process ---


def _serve() -> None:
    """Run functions until the other end closes."""
    pipe, parent = Connection(int(sys.argv[2])), int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's affair
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it died before it could be told
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _send(pipe, (_READY, None))
        while True:
            function, arguments = _receive(pipe)
            for answer in _answers(function, arguments):
                _send(pipe, answer)


def _answers(function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
    try:
        for item in function(*arguments):
            yield _ITEM, item
        yield _END, None
    except Exception as error:
        yield _ERROR, error
