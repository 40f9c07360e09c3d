"""The sample schema of a packed set: shards, their index, the manifest.

A packed set is a folder (local or on object storage):

    manifest.json                 what is here: classes, splits, shards with counts, bytes and sha256 (`Manifest`)
    quarantine.json               videos that were left out, each with its reason
    <split>.index.parquet         one row a sample, in shard order (`SplitIndex`): where its bytes are
    <split>-<number>.tar          WebDataset shard: members `<key>.<video ext>` and `<key>.json` for each sample
    <split>-<number>.json         the shard's own record, written after the tar: the shard is complete (`ShardRecord`)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

MANIFEST = "manifest.json"
QUARANTINE = "quarantine.json"
VIDEO_SUFFIXES = ("mp4", "webm", "avi", "mkv", "mov")


class DataError(ValueError):
    """A data set that cannot be used as it is: the message says what was found, what is allowed and what to do."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SampleMeta(_Record):
    """The `<key>.json` member: one video."""

    key: str
    label: int | None
    """Class; `None` where the split has no labels."""
    text: str
    """Its description as annotated (SSv2: the sentence; UCF101: the class name)."""
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


class ShardInfo(_Record):
    """A shard as the manifest lists it."""

    name: str
    samples: int
    bytes: int
    sha256: str


class SplitInfo(_Record):
    """A split as the manifest lists it."""

    samples: int
    bytes: int
    index: str
    """Name of its index file."""
    index_sha256: str
    shards: tuple[ShardInfo, ...]


class Manifest(_Record):
    """`manifest.json`."""

    format: int = 1
    dataset: str
    classes: tuple[str, ...]
    splits: dict[str, SplitInfo]
    quarantined: int
    """Videos left out."""
    plan: str
    """Hash of what was packed (sources and options): packing the same again writes nothing."""


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

    def __len__(self) -> int:
        return len(self.key)
