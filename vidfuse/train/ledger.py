"""Which samples of the running epoch are used up.

Comes in: sample numbers, as steps use them. Goes out: what is left of an epoch's order, and a readable record for the
checkpoint. A sample's identity is (shard, place in the shard); the record is a bitmap a shard, so that it holds for any number
of workers: each rank counts what it used, and the counts of all ranks are summed before a checkpoint. A sum, not a union: a
sample that two ranks used is seen.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vidfuse.data.sampling import Samples, use_of

Counts = npt.NDArray[np.uint8]


@dataclass
class Ledger:
    """Uses of the samples of a split in one epoch, in shard order."""

    shards: Mapping[str, int]
    """Samples of each shard, by name, in the order of the split's index."""
    epoch: int = 0
    merged: Counts = field(default_factory=lambda: np.zeros(0, np.uint8))
    """How often each sample was used by all ranks, up to the last `add`."""
    fresh: Counts = field(default_factory=lambda: np.zeros(0, np.uint8))
    """How often this rank used each sample since then."""

    def __post_init__(self) -> None:
        for name in ("merged", "fresh"):
            if not len(getattr(self, name)):
                setattr(self, name, np.zeros(sum(self.shards.values()), np.uint8))

    @property
    def uses(self) -> Counts:
        """How often each sample was used, as far as this rank knows."""
        return self.merged + self.fresh

    def mark(self, samples: npt.NDArray[np.int64]) -> None:
        """Count samples as used by this rank (padding is passed over)."""
        np.add.at(self.fresh, samples[samples >= 0], 1)

    def add(self, uses: Counts) -> None:
        """Take over the sum of all ranks' `fresh` counts."""
        self.merged = self.merged + uses
        self.fresh = np.zeros_like(self.fresh)

    def left(self, order: Samples) -> Samples:
        """The part of an epoch's order that is not used yet, in order: of a sample used n times, all but its first n places."""
        samples, before = use_of(order, len(self.merged))
        return order[before >= self.uses[samples]]

    def next_epoch(self) -> Ledger:
        """An empty ledger of the epoch after this one."""
        return Ledger(self.shards, self.epoch + 1)

    def to_json(self) -> dict[str, Any]:
        """`{epoch, used: as by `pack`}`."""
        return {"epoch": self.epoch, **pack(self.shards, self.merged)}

    @classmethod
    def from_json(cls, shards: Mapping[str, int], record: Mapping[str, Any]) -> Ledger:
        """Read a record back.

        Raises:
            ValueError: the record names a shard that the split does not have, or with another number of samples.
        """
        return cls(shards, int(record["epoch"]), unpack(shards, record))


def pack(shards: Mapping[str, int], counts: Counts) -> dict[str, Any]:
    """Counts as `{used: {shard: "all" | bitmap}, repeated: {sample: count}}`.

    Untouched shards are absent; a bitmap is base64 of zlib of packed bits. `repeated` has the samples (rows of the split's index)
    that were used more than once; it is absent where there are none.
    """
    used: dict[str, str] = {}
    for shard, start, stop in _places(shards):
        bits = counts[start:stop] > 0
        if bits.all() and len(bits):
            used[shard] = "all"
        elif bits.any():
            used[shard] = base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()
    more = {str(sample): int(counts[sample]) for sample in np.flatnonzero(counts > 1)}
    return {"used": used, **({"repeated": more} if more else {})}


def unpack(shards: Mapping[str, int], record: Mapping[str, Any]) -> Counts:
    """The counts that `pack` was given.

    Raises:
        ValueError: the record is of another manifest.
    """
    counts = np.zeros(sum(shards.values()), np.uint8)
    strange = sorted(set(record["used"]) - set(shards))
    if strange:
        raise ValueError(
            f"the ledger is of another manifest: it names {', '.join(strange[:5])}, which this split does not have"
        )
    for shard, start, stop in _places(shards):
        word = record["used"].get(shard)
        if word == "all":
            counts[start:stop] = 1
        elif word is not None:
            packed = np.frombuffer(zlib.decompress(base64.b64decode(word)), np.uint8)
            if len(packed) != -(-(stop - start) // 8):
                raise ValueError(f"the ledger is of another manifest: {shard} has {stop - start} samples here")
            counts[start:stop] = np.unpackbits(packed, count=stop - start)
    for sample, count in record.get("repeated", {}).items():
        counts[int(sample)] = count
    return counts


def _places(shards: Mapping[str, int]) -> list[tuple[str, int, int]]:
    stops = np.cumsum(list(shards.values())).tolist()
    return [(shard, stop - count, stop) for (shard, count), stop in zip(shards.items(), stops, strict=True)]
