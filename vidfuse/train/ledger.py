"""Which samples of the running epoch are used up.

Comes in: sample numbers, as steps use them. Goes out: what is left of an epoch's order, and a readable record for the
checkpoint. A sample's identity is (shard, place in the shard); the record is a bitmap a shard, so that it holds for any number
of workers: each rank marks what it used, and the union is what the checkpoint says.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vidfuse.data.sampling import Samples


@dataclass
class Ledger:
    """Used samples of one epoch over the samples of a split, in shard order."""

    shards: Mapping[str, int]
    """Samples of each shard, by name, in the order of the split's index."""
    epoch: int = 0
    used: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))

    def __post_init__(self) -> None:
        if not len(self.used):
            self.used = np.zeros(sum(self.shards.values()), np.bool_)

    def mark(self, samples: npt.NDArray[np.int64]) -> None:
        """Note samples as used (padding is passed over).

        Raises:
            AssertionError: a sample is used a second time in the epoch; that would break the promise of the whole system.
        """
        samples = samples[samples >= 0]
        assert not self.used[samples].any(), f"used twice in epoch {self.epoch}: {samples[self.used[samples]].tolist()}"
        self.used[samples] = True

    def left(self, order: Samples) -> Samples:
        """The part of an epoch's order that is not used yet, in order."""
        return order[~self.used[order]]

    def merged(self, other: npt.NDArray[np.bool_]) -> Ledger:
        """The union with what another rank used."""
        return Ledger(self.shards, self.epoch, self.used | other)

    def next_epoch(self) -> Ledger:
        """An empty ledger of the epoch after this one."""
        return Ledger(self.shards, self.epoch + 1)

    def to_json(self) -> dict[str, Any]:
        """`{epoch, used: {shard: "all" | bitmap}}`; untouched shards are absent; a bitmap is base64 of zlib of packed bits."""
        used: dict[str, str] = {}
        for shard, start, stop in self._places():
            bits = self.used[start:stop]
            if bits.all():
                used[shard] = "all"
            elif bits.any():
                used[shard] = base64.b64encode(zlib.compress(np.packbits(bits).tobytes())).decode()
        return {"epoch": self.epoch, "used": used}

    @classmethod
    def from_json(cls, shards: Mapping[str, int], record: Mapping[str, Any]) -> Ledger:
        """Read a record back.

        Raises:
            ValueError: the record names a shard that the split does not have, or with another number of samples.
        """
        ledger = cls(shards, int(record["epoch"]))
        strange = sorted(set(record["used"]) - set(shards))
        if strange:
            raise ValueError(
                f"the ledger is of another manifest: it names {', '.join(strange[:5])}, which this split does not have"
            )
        for shard, start, stop in ledger._places():
            word = record["used"].get(shard)
            if word == "all":
                ledger.used[start:stop] = True
            elif word is not None:
                packed = np.frombuffer(zlib.decompress(base64.b64decode(word)), np.uint8)
                if len(packed) != -(-(stop - start) // 8):
                    raise ValueError(f"the ledger is of another manifest: {shard} has {stop - start} samples here")
                ledger.used[start:stop] = np.unpackbits(packed, count=stop - start).astype(np.bool_)
        return ledger

    def _places(self) -> list[tuple[str, int, int]]:
        stops = np.cumsum(list(self.shards.values())).tolist()
        return [(shard, stop - count, stop) for (shard, count), stop in zip(self.shards.items(), stops, strict=True)]
