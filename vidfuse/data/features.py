"""Cached tokens of a stream that stays as it is: what a cache is made of, where its rows are, and reading them.

A cache is a folder, of one stream, one split and one set of clips of its videos:

    part-<number>.safetensors   `tokens` [rows, N, D], bfloat16 or float32; all parts are of one size
    part-<number>.json          the part's own record, written after it: it is complete (`PartRecord`)
    checks.bin                  CRC-32 of each row of all parts, in order, little-endian
    features.json               what it was made of, and its parts; written last (`FeatureManifest`)

Rows come draw by draw (in training the `data.views` clips of a video are as many draws, in testing there is one), in a draw video by video
in the order of the split's index, of a video view by view. A part has the rows of `PART_VIDEOS` videos of one draw; the last one of a draw is
filled up. Since all rows are of one size, a row is a byte range; each is checked when it is read, and a process reads the checks once. Rows
of a video that could not be read are NaN throughout, and the part's record has the reason.

Comes in: a pyarrow file system and the cache's folder on it. Goes out: rows as bit patterns (numpy has no bfloat16). Nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vidfuse.data.ranges import EndError, Fetched, Range, filesystem_of, read_range
from vidfuse.data.shards import DataError, Frozen, parse_record

FORMAT = 4
"""Of a cache; raised, too, when a version of vidfuse makes other clips or tokens of the same videos."""
MANIFEST, CHECKS = "features.json", "checks.bin"
PART_VIDEOS = 16
"""Videos of a part: their clips are one block, of 38 MB at 16 x 224 x 224."""

_ANEW = "remove {} and run `python -m jobs.features` with this config again: it makes what is not there"

Precision = Literal["bf16", "fp32"]
BITS: Mapping[Precision, type[np.unsignedinteger[Any]]] = {"bf16": np.uint16, "fp32": np.uint32}
"""What a number is read as."""
NAN: Mapping[Precision, int] = {"bf16": 0x7FC0, "fp32": 0x7FC00000}
"""What the numbers of an unreadable row are."""


class Recipe(Frozen):
    """What decides the numbers of a cache."""

    stream: str
    split: str
    choices: dict[str, Any]
    """What a config asks for: backbone, clips, grid, precision."""
    content: dict[str, str]
    """What was behind the names in it: hashes of the weights and of the packed set, versions of the decoder and of OpenCV."""

    @property
    def folder(self) -> str:
        """Folder of the caches of these choices."""
        return f"{self.split}-{self.stream}-{_hash([self.stream, self.split, self.choices])[:12]}"

    @property
    def key(self) -> str:
        """Name of the cache in it."""
        return _hash(self.content)[:16]

    def differences(self, other: Recipe) -> list[str]:
        """What is behind the same names and differs: `weights: HASH there, HASH now`; versions are whole, hashes are not."""
        names = sorted({*self.content, *other.content})
        return [
            f"{name}: {_short(other.content.get(name, 'none'))} there, {_short(self.content.get(name, 'none'))} now"
            for name in names
            if self.content.get(name) != other.content.get(name)
        ]


class PartRecord(Frozen):
    """`part-<number>.json`: a part that is complete."""

    name: str
    bytes: int
    checks: tuple[int, ...]
    """CRC-32 of each row."""
    unreadable: dict[int, str]
    """By row of the part: `shard\\tkey\\treason`."""


class FeatureManifest(Frozen):
    """`features.json`."""

    format: int = FORMAT
    recipe: Recipe
    samples: int
    """Videos of the split."""
    draws: int
    views: int
    """Rows of a video in a draw."""
    tokens: int
    """N."""
    width: int
    """D."""
    precision: Precision
    positions: tuple[tuple[float, float, float], ...]
    """[N] (time, height, width) of each token."""
    header_bytes: int
    """Of a part, before its first row."""
    checks: int
    """CRC-32 of `checks.bin`."""
    parts: tuple[PartRecord, ...]
    """Without the reasons and checks."""


@dataclass(frozen=True)
class FeatureSet:
    """A cache that is open; it travels to the reading tasks."""

    filesystem: Any
    root: str
    made: FeatureManifest
    """What it is, without its parts."""

    @property
    def stream(self) -> str:
        """Whose tokens these are."""
        return self.made.recipe.stream

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.made.tokens * self.made.width * np.dtype(BITS[self.made.precision]).itemsize

    @property
    def row_shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.made.tokens, self.made.width

    def check(self) -> None:
        """Read what rows are checked by.

        Raises:
            DataError: it is not what was written.
        """
        self._checks(pickle.dumps(self.filesystem))

    def place(self, draw: int, sample: int) -> Range:
        """Where the rows of a video in a draw are."""
        number, row = self._row(draw, sample)
        path, start = f"{self.root}/{part_name(number)}.safetensors", self.made.header_bytes + row * self.row_bytes
        return Range(path, start, self.made.views * self.row_bytes)

    def rows(self, draw: int, sample: int, fetched: Fetched) -> tuple[npt.NDArray[Any], str]:
        """What was fetched of that place: bit patterns [views, N, D], and why the video could not be read when it was cached (or "").

        Raises:
            OSError: the storage does not give what they are checked by.
            DataError: these rows are not what was written, or the part ends before them.
        """
        (number, row), path, content = self._row(draw, sample), self.place(draw, sample).path, fetched.content
        if isinstance(content, EndError):
            raise DataError(f"{path} is shorter than it was written; {_ANEW.format(path)}")
        state, first = pickle.dumps(self.filesystem), number * PART_VIDEOS * self.made.views + row
        if row_checks(content, self.made.views) != self._checks(state)[first : first + self.made.views].tolist():
            raise DataError(f"{path}: row {row} is not what was written; {_ANEW.format(path)}")
        bits = np.frombuffer(content, BITS[self.made.precision]).reshape(self.made.views, *self.row_shape)
        if bits[0, 0, 0] == NAN[self.made.precision] and (bits[0] == NAN[self.made.precision]).all():
            return bits, _reasons(state, f"{self.root}/{part_name(number)}.json").get(row, "\t\tunreadable when it was cached")
        return bits, ""

    def _row(self, draw: int, sample: int) -> tuple[int, int]:
        """The number of a part, and of the first row of a video in it."""
        return draw * parts_of_draw(self.made.samples) + sample // PART_VIDEOS, sample % PART_VIDEOS * self.made.views

    def _checks(self, filesystem: bytes) -> npt.NDArray[np.uint32]:
        rows = self.made.draws * parts_of_draw(self.made.samples) * PART_VIDEOS * self.made.views
        return _checks_at(filesystem, self.root, rows, self.made.checks)


def row_checks(rows: bytes | memoryview, count: int) -> list[int]:
    """CRC-32 of each of `count` rows of the same size."""
    content = memoryview(rows).cast("B")
    size = len(content) // count
    return [zlib.crc32(content[row * size : (row + 1) * size]) for row in range(count)]


def encode_checks(parts: Iterable[PartRecord]) -> bytes:
    """The content of `checks.bin`."""
    return np.array([check for part in parts for check in part.checks], "<u4").tobytes()


def parts_of_draw(samples: int) -> int:
    """Parts of a draw over so many videos."""
    return -(-samples // PART_VIDEOS)


def part_name(number: int) -> str:
    """Of a part, without extension."""
    return f"part-{number:06d}"


def encode_part(bits: npt.NDArray[Any], precision: Precision) -> tuple[bytes, int]:
    """A part's file and the bytes before its first row.

    Args:
        bits: [rows, N, D] bit patterns.
        precision: What they are.
    """
    import torch  # reading tasks, which import this file too, do without: it takes them seconds
    from safetensors.torch import save

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    content: bytes = save({"tokens": torch.from_numpy(np.array(bits)).view(dtype)})
    return content, len(content) - bits.nbytes


def open_features(filesystem: Any, root: str) -> tuple[FeatureSet, FeatureManifest]:
    """Open a cache that is whole.

    Raises:
        FileNotFoundError: it is not.
        DataError: it is of another format, or damaged.
    """
    with filesystem.open_input_file(f"{root}/{MANIFEST}") as file:
        content = bytes(file.read())
    try:
        made = json.loads(content).get("format")
    except (ValueError, AttributeError):
        raise DataError(f"{root}/{MANIFEST} is damaged; {_ANEW.format(f'{root}/{MANIFEST}')}") from None
    if made != FORMAT:
        raise DataError(f"{root}/{MANIFEST} is of format {made}, this version of vidfuse reads {FORMAT}: make the cache anew")
    manifest = parse_record(FeatureManifest, content, f"{root}/{MANIFEST}")
    return FeatureSet(filesystem, root, manifest.model_copy(update={"parts": ()})), manifest


def _short(value: str) -> str:
    return value if len(value) <= 32 else value[:12]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def _checks_at(filesystem: bytes, root: str, rows: int, check: int) -> npt.NDArray[np.uint32]:
    path = f"{root}/{CHECKS}"
    try:
        content = read_range(filesystem, path, 0, 4 * rows)
    except EndError:
        content = b""
    if zlib.crc32(content) != check:
        raise DataError(f"{path} is not what was written; {_ANEW.format(path)}")
    return np.frombuffer(content, "<u4")


@lru_cache(maxsize=64)
def _reasons(filesystem: bytes, path: str) -> dict[int, str]:
    with filesystem_of(filesystem).open_input_file(path) as file:
        return parse_record(PartRecord, bytes(file.read()), path).unreadable
