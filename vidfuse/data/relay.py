"""Parts in streams that follow each other without a pause.

Comes in: `pull`, and the parts of all that is to be read. Goes out: the columns of all of them, in order.

A stream is several short epochs or a piece of a long one, so that what plans and tasks hold does not grow with the set. It takes seconds
to start (Ray Data: 0.6 s and 0.15 ms a part, 2 cores, Ray 2.60), in which nothing comes: the next one starts while the last is still
being used, in a thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain, islice, repeat

from vidfuse.data.clips import ClipReader, Columns, Part

Pull = Callable[[ClipReader, Sequence[Part], int], Iterator[Columns]]
"""(reader, parts, rows) -> columns of `rows` rows each, in the order of the parts; the last may be shorter."""

FIRST_PARTS, PARTS_AT_ONCE = 512, 2048
"""Parts of the first stream, for which a recovery waits, and of those after it."""
AHEAD_SECONDS = 8.0
"""How long before a stream is used up, at the pace it is used at, the next one starts; in its second half at the soonest."""
PARTING_SECONDS = 5.0
"""How long a stream that is being started is waited for when nobody wants it any more."""


@dataclass
class _Stream:
    """One that has given its first columns."""

    columns: Iterator[Columns]
    rows: int
    """In all."""
    used: int = 0
    began: float = 0.0
    """When it was first asked for columns."""

    def ends_soon(self) -> bool:
        """Whether the next one has to start now."""
        left = self.rows - self.used
        return left <= self.used and left * (time.monotonic() - self.began) <= AHEAD_SECONDS * self.used


def relay(pull: Pull, reader: ClipReader, parts: Iterator[Part], rows: int) -> Generator[Columns, None, None]:
    """Columns of all parts, as `pull` gives them.

    Args:
        pull: reads the parts of one stream.
        reader: of the parts.
        parts: each but the last of whole `rows`, or streams would be told by their short batches.
        rows: of the columns.
    """
    sizes = chain((FIRST_PARTS,), repeat(PARTS_AT_ONCE))

    def start() -> _Stream | None:
        some = list(islice(parts, next(sizes)))
        if not some:
            return None
        columns = pull(reader, some, rows)
        return _Stream(chain((next(columns),), columns), sum(reader.rows(part) for part in some))

    threads = ThreadPoolExecutor(1, "vidfuse-next-stream")
    coming: Future[_Stream | None] | None = threads.submit(start)
    try:
        while coming is not None and (stream := coming.result()) is not None:
            coming, stream.began = None, time.monotonic()
            for columns in stream.columns:
                stream.used += len(columns["sample"])
                if coming is None and stream.ends_soon():
                    coming = threads.submit(start)
                yield columns
            coming = coming or threads.submit(start)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        if coming is not None:  # Ray, once shut down, ends a process that still asks it for something
            wait((coming,), timeout=PARTING_SECONDS)
