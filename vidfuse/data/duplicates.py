"""Videos that look the same: a hash of some frames, and all pairs of hashes that are near each other.

Axes: N videos, F frames of a video. Comes in: luma pictures, or the hashes of a whole set. Goes out: 64 bits a frame, or the pairs
whose hashes differ in few bits.

The hash is pHash (Zauner, *Implementation and Benchmarking of Perceptual Image Hash Functions*, 2010): which of the 8 x 8 lowest
frequencies of a 32 x 32 picture are above their median. Frames of a video are taken at the same shares of its length, so that
another codec, size or frame rate gives nearly the same bits; a cut or shifted copy does not.

Pairs are found exactly and without comparing all with all, by multi-index hashing (Norouzi, Punjani, Fleet, CVPR 2012,
10.1109/CVPR.2012.6248043): of B bits cut into r + 1 bands, two hashes that differ in at most r bits agree in one band at
least. A band's bits are drawn from all frames and frequencies, since those of one frame say much the same as those of the next.

Where very many agree in a band (a camera that stands still), nearly all pairs may be near, and are as many as the square of the videos. Of
such a crowd only as many pairs are given as show which of its videos hang together, by a search through it that compares with what it has
not reached yet.
"""

from __future__ import annotations

from collections.abc import Sequence
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
CROWD = 400
"""Videos that agree in a band, more of which are a crowd."""

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
    """All pairs whose hashes differ in at most so many bits; of a crowd (`CROWD`) some of them, by which the same videos hang together.

    Time grows with the pairs that agree in some band: few where hashes are spread. In a crowd it grows with the pairs of what does not hang
    together. Memory is a small multiple of the hashes' own and the pairs that are found.

    Args:
        hashes: [N, F].
        most_bits: Over all frames of a video.
        seed: Of the draw of bits for each band; the pairs do not depend on it, but for those of a crowd.
    """
    count, frames = hashes.shape
    bits = frames * FRAME_BITS
    found = np.empty(0, np.int64)  # first * count + second
    group, crowded = np.arange(count), np.zeros(count, bool)  # what hangs together so far, and who was in a crowd
    for band in np.array_split(np.random.default_rng(seed).permutation(bits), min(most_bits + 1, bits)):
        keys = _band(hashes, band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
        sizes = np.diff(begins, append=count)
        many = sizes > CROWD
        if many.any():
            crowds = [order[begin : begin + size] for begin, size in zip(begins[many], sizes[many], strict=True)]
            found = _distinct([found, *(_links(hashes, rows, group, most_bits) for rows in crowds)])
            group = groups(*np.divmod(found, count), count)
            crowded[np.concatenate(crowds)] = True
        parts = [found]
        starts = np.flatnonzero(~np.repeat(many, sizes))
        for distance in range(1, count):
            starts = starts[starts + distance < count]
            starts = starts[keys[starts] == keys[starts + distance]]  # sorted: who differs here differs further on
            if not len(starts):
                break
            for chunk in _chunks(starts):
                one, other = order[chunk], order[chunk + distance]
                if crowded.any():
                    told = crowded[one] & crowded[other] & (group[one] == group[other])
                    one, other = one[~told], other[~told]
                near = _differing(hashes, one, other) <= most_bits
                parts.append(np.minimum(one, other)[near] * count + np.maximum(one, other)[near])
        found = _distinct(parts)
    first, second = np.divmod(found, max(count, 1))
    differing = [_differing(hashes, first[chunk], second[chunk]) for chunk in _chunks(np.arange(len(found)))]
    return Pairs(first, second, np.concatenate(differing))


def groups(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Which of `count` videos hang together by pairs: the number of each one's group."""
    links = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
    return connected_components(links, directed=False)[1].astype(np.int64)


def _links(hashes: Hashes, rows: npt.NDArray[np.int64], group: npt.NDArray[np.int64], most_bits: int) -> npt.NDArray[np.int64]:
    """Near pairs of a crowd, as first * N + second, by which it hangs together as by all of them; `group` hangs together without them."""
    group = group[rows]
    left, bits = np.arange(len(rows)), np.ascontiguousarray(hashes[rows].T)
    unreached = bits
    reached: list[int] = []
    links = [np.empty(0, np.int64)]
    while len(left):
        if reached:
            row = reached.pop()
            differing = np.bitwise_count(unreached ^ bits[:, row, None]).sum(axis=0, dtype=np.int64)
            near = left[differing <= most_bits]
            if not len(near):
                continue
            links.append(np.minimum(rows[row], rows[near]) * len(hashes) + np.maximum(rows[row], rows[near]))
        else:
            near = left[:1]
        new = np.isin(group[left], group[near])
        reached += left[new].tolist()
        left, unreached = left[~new], unreached[:, ~new]
    return np.concatenate(links)


def _band(hashes: Hashes, bits: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """[N] the chosen bits of each hash (up to 64 of them, further ones are left out) as one number."""
    keys = np.zeros(len(hashes), np.uint64)
    for bit in bits[:FRAME_BITS]:
        frame, place = divmod(int(bit), FRAME_BITS)
        keys = (keys << np.uint64(1)) | (hashes[:, frame] >> np.uint64(place) & np.uint64(1))
    return keys


def _distinct(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """All numbers once, in order. NumPy 2.4's own, by a hash table, takes 0.5 s where this takes 6 ms for a million pairs."""
    values = np.sort(np.concatenate(parts))
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def _chunks(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    return np.array_split(rows, max(-(-len(rows) // _CHUNK), 1))


def _differing(hashes: Hashes, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.bitwise_count(hashes[one] ^ hashes[other]).sum(axis=1, dtype=np.int64)
