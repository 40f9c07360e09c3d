"""Byte ranges of files on a storage, as reading tasks ask for them.

Comes in: a pickled pyarrow file system (tasks of one process share what they open), a path, a range. Goes out: its bytes, or an
`EndError` where the file ends before it.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any

READS = 3
"""Tries of a byte range, beyond those of the file system: a connection that is lost within the answer is no error to pyarrow."""


class EndError(Exception):
    """A file ends before a range; `size` is its length in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def read_range(filesystem: bytes, path: str, offset: int, size: int, *, again: Callable[[], None] | None = None) -> bytes:
    """A byte range of a file; `again` is called before each further try.

    Raises:
        EndError: the file ends before it.
        OSError: the storage does not give it.
    """
    for attempt in range(READS):
        if attempt and again is not None:
            again()
        file = (
            _open(filesystem, path) if attempt == 0 else filesystem_of(filesystem).open_input_file(path)
        )  # it may be another now
        if offset + size > file.size():
            raise EndError(file.size())
        try:
            content: bytes = file.read_at(size, offset)
        except OSError:
            if attempt + 1 == READS:
                raise
            continue
        if len(content) == size:
            return content
    raise OSError(f"{path}: {size} bytes wanted at {offset}, {len(content)} came, {READS} times")


@lru_cache(maxsize=8)
def filesystem_of(state: bytes) -> Any:
    """The file system of a pickled one."""
    return pickle.loads(state)  # noqa: S301  (what this very process, or its driver, pickled; never bytes from storage)


@lru_cache(maxsize=256)
def _open(filesystem: bytes, path: str) -> Any:
    """An open file, kept for the life of the reading process: byte ranges of it cost one request each."""
    return filesystem_of(filesystem).open_input_file(path)
