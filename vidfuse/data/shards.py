"""The sample schema of a packed set: the manifest, the index, the records of shards and samples (`data.tars`: the shards).

A packed set is a folder (local or on object storage):

    manifest.json                 what is here: classes, splits, shards with counts, bytes and sha256 (`Manifest`)
    quarantine.json               videos that were left out, each with its reason
    <split>.index.parquet         one row a sample, in shard order (`SplitIndex`): where its bytes are
    <split>-<number>.tar          WebDataset shard: members `<key>.<video ext>` and `<key>.json` for each sample
    <split>-<number>.json         the shard's own record, written after the tar: the shard is complete (`ShardRecord`)

A manifest is never written over, and its `version` is the hash of its content, which has the hash of every shard and, through the
index, of every sample: two sets of one version are the same bytes.

Comes in: a pyarrow file system and the set's folder on it (credentials are the business of `on_ray.storage`), or bytes. Goes
out: the records above, checked, or a `DataError`. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from vidfuse.config import TranscodeConfig

FORMAT = 2
"""Of the manifest and the index."""
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
VIDEO_SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov", "mpg", "mpeg", "m4v", "wmv", "flv", "ts", "3gp")
"""Of files that are packed, and of a shard's members; the decoder looks at the content alone."""
META_SUFFIX = "json"
_KEY = re.compile(r"[A-Za-z0-9_+=,@()-]{1,90}")

Record = TypeVar("Record", bound=BaseModel)


class DataError(ValueError):
    """A data set that cannot be used as it is: the message says what was found, what is allowed and what to do."""


class Frozen(BaseModel):
    """A record that is not changed; unknown fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SampleMeta(Frozen):
    """The `<key>.json` member: one video."""

    key: str
    label: int | None
    """Class; `None` where the split has no labels."""
    text: str
    """Its description as annotated (SSv2: the sentence; else: the class name)."""
    placeholders: tuple[str, ...] = ()
    """SSv2: what the sentence puts into its template, as annotated."""
    duration: float
    """Seconds."""
    frames: int
    """Frames that decode, counted."""
    fps: float
    width: int
    """Pixels, as shown (after rotation)."""
    height: int
    sha256: str
    """Of the video's bytes."""
    source_sha256: str | None = None
    """Of the file that it was transcoded from; `None`: it is that file."""


class Recipe(Frozen):
    """How a set was made."""

    layout: str
    """Of the annotations (`data.layouts`)."""
    options: dict[str, int | float]
    """Options of the layout that decided which video is in which split."""
    shard_bytes: int
    """Bound of a shard."""
    transcode: TranscodeConfig | None
    """Form that videos were brought into; `None`: they are stored as they were."""


class ShardInfo(Frozen):
    """A shard as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class SplitInfo(Frozen):
    """A split as the manifest lists it."""

    samples: int
    bytes: int
    index: str
    """Name of its index file."""
    index_sha256: str
    shards: tuple[ShardInfo, ...]


class Manifest(Frozen):
    """`manifest.json`."""

    format: int = FORMAT
    dataset: str
    classes: tuple[str, ...]
    splits: dict[str, SplitInfo]
    quarantined: int
    """Videos left out."""
    plan: str
    """Hash of what was packed (sources and options): packing the same again writes nothing."""
    recipe: Recipe

    @property
    def version(self) -> str:
        """Name of this very content."""
        return hashlib.sha256(dump_record(self)).hexdigest()[:16]


class IndexRow(Frozen):
    """A sample of a shard: where its video is inside the tar, and what reading needs to know of it."""

    key: str
    label: int
    """-1: none."""
    suffix: str
    offset: int
    size: int
    frames: int
    width: int
    height: int
    sha256: str
    """Of the video's bytes."""


class Quarantined(Frozen):
    """A video that was left out."""

    split: str
    key: str
    path: str
    """Below the source folder."""
    reason: str


class ShardRecord(Frozen):
    """`<split>-<number>.json`: a shard that is complete."""

    name: str
    plan: str
    bytes: int
    """0: no video of the shard could be read, there is no tar."""
    sha256: str
    samples: tuple[IndexRow, ...]
    quarantined: tuple[Quarantined, ...]


class Quarantine(Frozen):
    """`quarantine.json`."""

    videos: tuple[Quarantined, ...]


@dataclass(frozen=True)
class SplitIndex:
    """Where each sample of a split is; row i is sample i (shard order, then order inside the shard)."""

    shards: tuple[str, ...]
    """Names of the split's shards."""
    shard: npt.NDArray[np.int32]
    """Which of `shards`."""
    key: npt.NDArray[np.object_]
    label: npt.NDArray[np.int32]
    """-1: none."""
    suffix: npt.NDArray[np.object_]
    """Video extension without the dot."""
    offset: npt.NDArray[np.int64]
    """First byte of the video inside the tar."""
    size: npt.NDArray[np.int64]
    """Bytes of the video."""
    frames: npt.NDArray[np.int32]
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    sha256: npt.NDArray[np.uint8]
    """Of each video's bytes, [samples, 32]."""

    def __len__(self) -> int:
        return len(self.key)


def shard_name(split: str, number: int) -> str:
    """File name of a split's shard."""
    return f"{split}-{number:05d}.tar"


def record_name(shard: str) -> str:
    """File name of a shard's record."""
    return f"{shard.removesuffix('.tar')}.json"


def index_name(split: str) -> str:
    """File name of a split's index."""
    return f"{split}.index.parquet"


def check_key(key: str) -> str:
    """Return `key` if it can name a sample (a dot or a slash would end the key inside a tar).

    Raises:
        DataError: it cannot.
    """
    if not _KEY.fullmatch(key):
        raise DataError(f"sample key {key!r}: 1 to 90 of A-Z a-z 0-9 _ + = , @ ( ) - are allowed; rename the video")
    return key


# --- manifest and index ---


def read_manifest(fs: Any, root: str) -> Manifest:
    """Read a packed set's manifest.

    Args:
        fs: A pyarrow file system.
        root: The set's folder on it.

    Raises:
        DataError: there is none, it is not one, or it lists no sample at all.
    """
    try:
        content = read_file(fs, root, MANIFEST)
    except FileNotFoundError:
        raise DataError(
            f"no {MANIFEST} in {root}: not a finished packed set; give the folder that jobs.pack wrote, or run"
            f" python -m jobs.pack SOURCE URL (an interrupted one continues)"
        ) from None
    _check_format(content, f"{root}/{MANIFEST}")
    manifest = parse_record(Manifest, content, f"{root}/{MANIFEST}")
    if not any(info.shards for info in manifest.splits.values()):
        raise DataError(f"{root}/{MANIFEST} lists no shards; pack a source that has videos")
    return manifest


def _check_format(content: bytes, where: str) -> None:
    """Before the fields are: a manifest of another format has others."""
    try:
        found = json.loads(content).get("format", FORMAT)
    except (ValueError, AttributeError):
        return  # no manifest at all, which is told with the place of the fault
    if found != FORMAT:
        raise DataError(f"{where}: format {found}, this version reads {FORMAT}; update vidfuse, or pack again to another place")


def check_classes(manifest: Manifest, classes: int) -> None:
    """Check that a set has as many classes as the config says.

    Raises:
        DataError: it has not.
    """
    if len(manifest.classes) != classes:
        raise DataError(
            f"data.classes is {classes}, the packed set {manifest.dataset!r} has {len(manifest.classes)} classes;"
            f" set data.classes={len(manifest.classes)} or give another data.url"
        )


def split_info(manifest: Manifest, split: str) -> SplitInfo:
    """A split of a manifest.

    Raises:
        DataError: there is no such split, or nothing is in it.
    """
    if split not in manifest.splits:
        raise DataError(
            f"no split {split!r} in the packed set {manifest.dataset!r}; it has {', '.join(sorted(manifest.splits))}"
        )
    info = manifest.splits[split]
    if not info.shards or not info.samples:
        raise DataError(
            f"split {split!r} of the packed set {manifest.dataset!r} has no samples; pack it again with videos in it"
        )
    return info


def read_index(fs: Any, root: str, split: str, *, manifest: Manifest | None = None) -> SplitIndex:
    """Read the index of a split, verified against the manifest.

    Args:
        fs: A pyarrow file system.
        root: The set's folder on it.
        split: One of the manifest's splits.
        manifest: What `read_manifest` gave; read again when `None`.

    Raises:
        DataError: no such split, or an index that is missing or is not the manifest's.
    """
    info = split_info(manifest or read_manifest(fs, root), split)
    try:
        content = read_file(fs, root, info.index)
    except FileNotFoundError:
        raise DataError(f"{root}/{info.index}: missing; run python -m jobs.check, pack the set again") from None
    if hashlib.sha256(content).hexdigest() != info.index_sha256:
        raise DataError(f"{root}/{info.index}: not the one the manifest names (sha256 differs); pack the set again")
    index = decode_index(content, tuple(shard.name for shard in info.shards))
    if len(index) != info.samples:
        raise DataError(f"{root}/{info.index}: {len(index)} samples, the manifest says {info.samples}; pack the set again")
    return index


_COLUMNS = {
    "shard": pa.dictionary(pa.int32(), pa.string()),
    "key": pa.string(),
    "label": pa.int32(),
    "suffix": pa.dictionary(pa.int32(), pa.string()),
    "offset": pa.int64(),
    "size": pa.int64(),
    "frames": pa.int32(),
    "width": pa.int32(),
    "height": pa.int32(),
    "sha256": pa.binary(32),
}


def encode_index(records: Iterable[ShardRecord]) -> bytes:
    """The index file (Parquet) of a split's shards, in this order."""
    rows = [(record.name, row) for record in records for row in record.samples]
    columns: dict[str, list[Any]] = {name: [getattr(row, name) for _, row in rows] for name in _COLUMNS if name != "shard"}
    columns["shard"] = [shard for shard, _ in rows]
    columns["sha256"] = [bytes.fromhex(digest) for digest in columns["sha256"]]
    sink = io.BytesIO()
    table = pa.table({name: columns[name] for name in _COLUMNS}, schema=pa.schema(list(_COLUMNS.items())))
    pq.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


def decode_index(content: bytes, shards: tuple[str, ...]) -> SplitIndex:
    """Read an index file's bytes.

    Args:
        content: The file.
        shards: The split's shards, in the manifest's order.

    Raises:
        DataError: it is no index, or names other shards.
    """
    try:
        table = pq.read_table(io.BytesIO(content)).select(list(_COLUMNS))
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"not an index of a packed set: {str(error).splitlines()[0]}; pack the set again") from None
    numbers = {name: number for number, name in enumerate(shards)}
    column = {name: table[name].to_numpy(zero_copy_only=False) for name in _COLUMNS}
    if unknown := set(column["shard"]) - set(numbers):
        raise DataError(f"the index names {sorted(unknown)[0]}, which is no shard of the manifest; pack the set again")
    return SplitIndex(
        shards=shards,
        shard=np.array([numbers[name] for name in column["shard"]], dtype=np.int32),
        key=column["key"].astype(object),
        label=column["label"].astype(np.int32),
        suffix=column["suffix"].astype(object),
        offset=column["offset"].astype(np.int64),
        size=column["size"].astype(np.int64),
        frames=column["frames"].astype(np.int32),
        width=column["width"].astype(np.int32),
        height=column["height"].astype(np.int32),
        sha256=np.frombuffer(b"".join(column["sha256"]), np.uint8).reshape(-1, 32),
    )


def read_file(fs: Any, root: str, name: str) -> bytes:
    """The bytes of a file of a set.

    Raises:
        FileNotFoundError: there is none.
    """
    with fs.open_input_file(f"{root.rstrip('/')}/{name}") as file:
        return file.read()


def parse_record(kind: type[Record], content: bytes, where: str) -> Record:
    """Read one of the records above from JSON.

    Raises:
        DataError: broken JSON or another record; the message starts with `where`.
    """
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(step) for step in fault["loc"])
        raise DataError(f"{where}: not a {kind.__name__}: {field + ': ' if field else ''}{fault['msg']}") from None


def dump_record(record: BaseModel) -> bytes:
    """A record as JSON bytes, the same for the same record."""
    return (json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()
