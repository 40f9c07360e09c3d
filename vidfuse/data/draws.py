"""How often each sample is used in an epoch, where it is not once: weights, balanced classes, a curriculum.

Comes in: weights and difficulties of samples, an epoch. Goes out: uses, as many in all as the split has samples, so that steps and
schedules are those of a plain epoch. They are a pure function of (files, seed, epoch): a weighted epoch is a plan, too, and the ledger
and the audit count against it (systematic sampling, Madow 1949: a sample of expected e uses has floor(e) or ceil(e) of them).
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vidfuse.config import Curriculum
from vidfuse.data.sampling import generator
from vidfuse.data.shards import DataError, SplitIndex

DRAWS = 5
"""Purpose that keeps these draws apart from others of the same epoch."""
MOST_USES = 255
"""Of a sample in an epoch; the ledger counts in bytes."""

Uses = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """What decides how often samples are used; nothing: each once."""

    weights: Values | None = None
    """[N] relative expected uses."""
    difficulty: Values | None = None
    """[N] the larger, the harder."""
    curriculum: Curriculum | None = None

    @property
    def digest(self) -> str:
        """Hash of the values; empty if each sample is used once."""
        values = {"weights": self.weights, "difficulty": self.difficulty}
        parts = [name.encode() + part.tobytes() for name, part in values.items() if part is not None]
        return hashlib.sha256(b"|".join(parts)).hexdigest() if parts else ""

    def uses(self, samples: int, *, seed: int, epoch: int) -> Uses:
        """[N] uses of each sample in an epoch; their sum is N."""
        weights = self.weights if self.weights is not None else np.ones(samples)
        if self.difficulty is not None and self.curriculum is not None:
            pool = math.ceil(pool_share(self.curriculum, epoch) * samples)
            hard = np.argsort(self.difficulty, kind="stable")[pool:]
            weights = weights.copy()
            weights[hard] = 0.0
        if (weights == weights[0]).all():
            return np.ones(samples, np.uint8)
        rng = generator(seed, epoch, DRAWS)
        order = rng.permutation(samples)
        ends = np.cumsum(weights[order] * (samples / weights.sum()))
        ends[-1] = samples
        uses = np.empty(samples, np.int64)
        uses[order] = np.diff(np.floor(ends + rng.random()), prepend=0)
        assert uses.sum() == samples and uses.min() >= 0 and uses.max() <= MOST_USES
        return uses.astype(np.uint8)

    def check(self, samples: int) -> Draws:
        """Itself, if every epoch of it can be made.

        Raises:
            DataError: in an epoch a sample would be used too often, or all that it draws from weigh nothing.
        """
        weights, pools = self.weights if self.weights is not None else np.ones(samples), [samples]
        if self.difficulty is not None and self.curriculum is not None:
            weights = weights[np.argsort(self.difficulty, kind="stable")]
            shares = [pool_share(self.curriculum, epoch) for epoch in range(self.curriculum.epochs + 1)]
            pools = [math.ceil(share * samples) for share in shares]
        most, totals = np.maximum.accumulate(weights), np.cumsum(weights)
        for epoch, last in enumerate(pool - 1 for pool in pools):
            if not totals[last] > 0:
                raise DataError(
                    f"data.weighting, data.curriculum: all samples that epoch {epoch} draws from have the weight 0; give some of them "
                    "another one, or raise data.curriculum.start"
                )
            if (uses := most[last] / totals[last] * samples) > MOST_USES - 1:
                raise DataError(
                    f"data.weighting, data.curriculum: a sample would be used {uses:,.0f} times in epoch {epoch}, which has {samples:,} "
                    f"uses in all; {MOST_USES - 1} are the most. Make the weights less uneven (a CSV file in place of `balanced`), or raise "
                    "data.curriculum.start"
                )
        return self


def pool_share(curriculum: Curriculum, epoch: int) -> float:
    """Share of the samples, the easiest first, that an epoch draws from: from `start` in a line up to 1."""
    return min(1.0, curriculum.start + (1 - curriculum.start) * epoch / curriculum.epochs)


def balanced(labels: npt.NDArray[np.integer]) -> Values:
    """Weights with which each class that occurs is used equally often; samples without a label count as one."""
    _, which, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return 1.0 / counts[which]


def read_values(content: bytes, index: SplitIndex, where: str, *, least: float = 0.0) -> Values:
    """A number for each sample of a split, from CSV with the columns `key,value`.

    Args:
        content: of the file.
        index: of the split.
        where: for messages.
        least: Smallest number that is allowed.

    Raises:
        DataError: no CSV in UTF-8, other columns, a key that is no sample's or is there twice, a sample without a value, or a value that is
            no number or too small.
    """
    rows = {str(key): row for row, key in enumerate(index.key)}
    values = np.full(len(index), np.nan)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
        if reader.fieldnames is None or set(reader.fieldnames) != {"key", "value"}:
            raise DataError(f"{where}: a CSV file with the header `key,value` is needed, given {reader.fieldnames}")
        for line in reader:
            row = rows.get(line["key"])
            if row is None or not np.isnan(values[row]):
                fault = "is no sample of the split" if row is None else "is there twice"
                raise DataError(
                    f"{where}, line {reader.line_num}: key {line['key']!r} {fault}; give each sample of the split once"
                )
            values[row] = _number(line["value"])
            if not least <= values[row] < math.inf:
                wanted = "number" if math.isinf(least) else f"number of at least {least:g}"
                raise DataError(f"{where}: line {reader.line_num} has no {wanted} after the key")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is no UTF-8; save the table as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{where}: line {reader.line_num} is no CSV: {error}") from None
    lacking = np.flatnonzero(np.isnan(values))
    if len(lacking):
        raise DataError(f"{where}: {len(lacking)} samples have no value, the first is {index.key[lacking[0]]!r}")
    return values


def _number(value: str | None) -> float:
    try:
        return float(value or "nan")
    except ValueError:
        return math.nan
