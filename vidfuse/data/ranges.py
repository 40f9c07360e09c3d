"""Byte ranges of files on a storage, as reading tasks ask for them.

Comes in: a pickled pyarrow file system (tasks of one process share what they open), a path, a range. Goes out: its bytes, or an
`EndError` where the file ends before it. Ranges that follow each other in a file are asked for at once: of 92 KB each, eight cost a
reader a third of what eight requests do, and the storage less than half (tests/bench).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

READS = 3
"""Tries of a byte range, beyond those of the file system: a connection that is lost within the answer is no error to pyarrow."""
GAP_BYTES = 16 * 1024
"""What may lie between two ranges that are asked for at once: tar headers and annotations of a packed set."""
JOINED_BYTES = 4 * 1024**2
"""Most that is asked for at once, beyond a single range: several requests at the same time bring large ones sooner."""


class EndError(Exception):
    """A file ends before a range; `size` is its length in bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


class Range(NamedTuple):
    """Bytes of a file."""

    path: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.size


class Fetched(NamedTuple):
    """The bytes of a range, or that they are not there."""

    content: bytes | EndError
    retries: int = 0


def joined(ranges: Sequence[Range | None]) -> Iterator[list[Range]]:
    """Ranges that are asked for at once, in their order; `None` is nothing to ask for, an empty list."""
    run: list[Range] = []
    for wanted in ranges:
        if run and not (wanted and _follows(run, wanted)):
            yield run
            run = []
        if wanted is None:
            yield []
        else:
            run.append(wanted)
    if run:
        yield run


def _follows(run: Sequence[Range], wanted: Range) -> bool:
    gap = wanted.offset - run[-1].end
    return wanted.path == run[-1].path and 0 <= gap <= GAP_BYTES and wanted.end - run[0].offset <= JOINED_BYTES


def fetch(filesystem: bytes, run: Sequence[Range]) -> list[Fetched]:
    """The bytes of ranges that follow each other in a file; an empty list is one range of no bytes.

    Raises:
        OSError: the storage does not give them.
    """
    if not run:
        return [Fetched(b"")]
    first, retries = run[0], list[None]()
    try:
        content = read_range(
            filesystem, first.path, first.offset, run[-1].end - first.offset, again=lambda: retries.append(None)
        )
    except EndError as end:
        if len(run) == 1:
            return [Fetched(end, len(retries))]
        return [each for wanted in run for each in fetch(filesystem, [wanted])]
    if len(run) == 1:
        return [Fetched(content, len(retries))]
    starts = [wanted.offset - first.offset for wanted in run]
    return [
        Fetched(content[start : start + wanted.size], 0 if start else len(retries))
        for start, wanted in zip(starts, run, strict=True)
    ]


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
