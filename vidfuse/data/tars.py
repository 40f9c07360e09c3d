"""WebDataset tars: one is a shard, a sample is two members, `<key>.<video ext>` and `<key>.json`.

Comes in: open files. Goes out: members, index rows, or a `DataError`. Tars are read strictly: where tarfile ends a damaged archive
without a word, `read_members` raises; members are regular files with an allowed suffix.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from vidfuse.data.shards import META_SUFFIX, VIDEO_SUFFIXES, DataError, IndexRow, SampleMeta, check_key, parse_record

_BLOCK = 512
_MEMBER_BYTES = 4 * 1024**3
"""Largest member that is read into memory."""


@dataclass(frozen=True)
class Member:
    """A file inside a tar."""

    key: str
    suffix: str
    offset: int
    """First byte of its content inside the tar."""
    size: int


def write_shard(file: BinaryIO, samples: Iterable[tuple[SampleMeta, str, bytes]]) -> None:
    """Write a WebDataset tar; the same samples always give the same bytes.

    Args:
        file: Open for writing, at its start.
        samples: Meta data, video suffix without the dot, and the video's bytes; one sample at a time is held.

    Raises:
        DataError: a key or a suffix that a shard cannot have.
    """
    from webdataset import TarWriter  # imports torch: seconds, and nothing that reads shards should pay for it

    with TarWriter(file, user="vidfuse", group="vidfuse", mtime=0, encoder=False) as tar:
        for meta, suffix, video in samples:
            key = check_key(meta.key)
            _check_suffix(suffix, (*VIDEO_SUFFIXES,), key)
            tar.write({"__key__": key, suffix: video})
            tar.write({"__key__": key, META_SUFFIX: meta.model_dump_json().encode()})


def read_members(file: BinaryIO) -> Iterator[tuple[Member, bytes]]:
    """Walk a tar from its start to its end mark, one member's content in memory at a time.

    Raises:
        DataError: a damaged header, an unexpected end, a member that is no regular file or whose suffix is not allowed.
    """
    position = 0
    while True:
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise DataError(f"the tar is cut off at byte {position + len(header)}: its end mark is missing")
        if not any(header):
            if any(any(rest) for rest in iter(lambda: file.read(_BLOCK * 128), b"")):
                raise DataError(f"damaged tar header at byte {position}: zeros, and more data after them")
            return
        member, padded = _parse_header(header, position + _BLOCK)
        content = file.read(padded)
        if len(content) < padded:
            raise DataError(
                f"the tar is cut off at byte {position + _BLOCK + len(content)}, inside {member.key}.{member.suffix}"
            )
        yield member, content[: member.size]
        position += _BLOCK + padded


def _parse_header(header: bytes, offset: int) -> tuple[Member, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        raise DataError(f"damaged tar header at byte {offset - _BLOCK}: {error}") from None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or not 0 <= info.size <= _MEMBER_BYTES:
        raise DataError(f"member {info.name!r} is not a regular file of at most {_MEMBER_BYTES} bytes; only those are read")
    key, _, suffix = info.name.partition(".")
    _check_suffix(suffix, (*VIDEO_SUFFIXES, META_SUFFIX), key)
    return Member(check_key(key), suffix, offset, info.size), -(-info.size // _BLOCK) * _BLOCK


def _check_suffix(suffix: str, allowed: tuple[str, ...], key: str) -> None:
    if suffix not in allowed:
        raise DataError(f"{key}: suffix {suffix!r} is not allowed in a shard; allowed are {', '.join(allowed)}")


def index_rows(file: BinaryIO) -> tuple[IndexRow, ...]:
    """Index a tar by walking it.

    Raises:
        DataError: what `read_members` raises, a broken meta member, or a video without one (and the other way round).
    """
    rows: list[IndexRow] = []
    video: Member | None = None
    for member, content in read_members(file):
        if member.suffix != META_SUFFIX:
            if video is not None:
                raise DataError(f"{video.key}: the video has no {META_SUFFIX} member after it")
            video = member
            continue
        if video is None or video.key != member.key:
            raise DataError(f"{member.key}: the {META_SUFFIX} member has no video before it")
        rows.append(index_row(video, parse_record(SampleMeta, content, f"{member.key}.{META_SUFFIX}")))
        video = None
    if video is not None:
        raise DataError(f"{video.key}: the video has no {META_SUFFIX} member after it")
    return tuple(rows)


def index_row(video: Member, meta: SampleMeta) -> IndexRow:
    """The index row of a video member and its meta data."""
    return IndexRow(
        key=meta.key,
        label=-1 if meta.label is None else meta.label,
        suffix=video.suffix,
        offset=video.offset,
        size=video.size,
        frames=meta.frames,
        width=meta.width,
        height=meta.height,
        sha256=meta.sha256,
    )
