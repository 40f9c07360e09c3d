"""Videos that look the same: a hash of some frames, and all pairs of hashes that are near each other.

Axes: N videos, F frames of a video. Comes in: luma pictures, or the hashes of a whole set. Goes out: 64 bits a frame, or the pairs
whose hashes differ in few bits.

The hash is pHash (Zauner, *Implementation and Benchmarking of Perceptual Image Hash Functions*, 2010): which of the 8 x 8 lowest
frequencies of a 32 x 32 picture are above their median. Frames of a video are taken at the same shares of its length, so that
another codec, size or frame rate gives nearly the same bits; a cut or shifted copy does not.

Pairs are found exactly and without comparing all with all, by multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012,
10.1109/CVPR.2012.6248043): of B bits cut into r + 1 bands, two hashes that differ in at most r bits agree in one band at
least. A band's bits are drawn from all frames and frequencies, since those of one frame say much the same as those of the next.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vidfuse.data.opencv import cv2

FRAME_BITS = 64
_SIDE = 32
_LOW = 8
_CHUNK = 1 << 18
"""Candidate pairs that are compared at a time."""

Hashes = npt.NDArray[np.uint64]
"""[N, F]"""


class Pairs(NamedTuple):
    """Pairs of videos, the first before the second."""

    first: npt.NDArray[np.int64]
    second: npt.NDArray[np.int64]
    bits: npt.NDArray[np.int64]
    """In which their hashes differ, over all frames."""


def frame_hash(luma: npt.NDArray[np.uint8]) -> int:
    """The 64 bits of a picture [H, W]."""
    small = cv2.resize(luma, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:_LOW, :_LOW].reshape(-1)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def near_pairs(hashes: Hashes, most_bits: int, *, seed: int = 0) -> Pairs:
    """All pairs whose hashes differ in at most so many bits.

    Time grows with the pairs that agree in some band: few where hashes are spread, all pairs of a crowd where many are nearly
    equal. Memory is a small multiple of the hashes' own and the pairs that are found.

    Args:
        hashes: [N, F].
        most_bits: Over all frames of a video.
        seed: Of the draw of bits for each band; the pairs do not depend on it.
    """
    count, frames = hashes.shape
    bits = frames * FRAME_BITS
    found = np.empty(0, np.int64)  # first * count + second
    for band in np.array_split(np.random.default_rng(seed).permutation(bits), min(most_bits + 1, bits)):
        keys = _band(hashes, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        parts = [found]
        starts = np.arange(count)
        for distance in range(1, count):
            starts = starts[starts + distance < count]
            starts = starts[keys[starts] == keys[starts + distance]]  # sorted: who differs here differs further on
            if not len(starts):
                break
            for chunk in _chunks(starts):
                one, other = order[chunk], order[chunk + distance]
                near = _differing(hashes, one, other) <= most_bits
                parts.append(np.minimum(one, other)[near] * count + np.maximum(one, other)[near])
        found = np.unique(np.concatenate(parts))
    first, second = np.divmod(found, max(count, 1))
    differing = [_differing(hashes, first[chunk], second[chunk]) for chunk in _chunks(np.arange(len(found)))]
    return Pairs(first, second, np.concatenate(differing))


def groups(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Which of `count` videos hang together by pairs: the number of each one's group."""
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _band(hashes: Hashes, bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """[N] the chosen bits of each hash (up to 64 of them, further ones are left out) as one number."""
    keys = np.zeros(len(hashes), np.uint64)
    for bit in bits[:FRAME_BITS]:
        frame, place = divmod(int(bit), FRAME_BITS)
        keys = (keys << np.uint64(1)) | (hashes[:, frame] >> np.uint64(place) & np.uint64(1))
    return keys


def _chunks(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return np.array_split(rows, max(-(-len(rows) // _CHUNK), 1))


def _differing(hashes: Hashes, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1, dtype=np.int64)
