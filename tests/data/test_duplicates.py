"""Hashes of frames, and all pairs of them that are near: nothing missed, nothing more."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from vidfuse.data import duplicates
from vidfuse.data.duplicates import frame_hash, groups, near_pairs


def brute_force(hashes: np.ndarray, most: int) -> dict[tuple[int, int], int]:
    bits = {
        (a, b): int(np.bitwise_count(hashes[a] ^ hashes[b]).sum()) for a, b in itertools.combinations(range(len(hashes)), 2)
    }
    return {pair: count for pair, count in bits.items() if count <= most}


def flipped(rng: np.random.Generator, row: np.ndarray, bits: int) -> np.ndarray:
    row = row.copy()
    for bit in rng.choice(64 * len(row), bits, replace=False):
        row[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    return row


@pytest.mark.parametrize(("frames", "most"), [(1, 0), (1, 5), (4, 16), (8, 32), (2, 70)])
def test_it_finds_what_comparing_all_with_all_finds(frames, most):
    rng = np.random.default_rng(frames * 100 + most)
    hashes = rng.integers(0, 2**64, (200, frames), dtype=np.uint64)
    near = [flipped(rng, hashes[row], bits % min(64 * frames, 2 * most + 2)) for row, bits in enumerate(range(60))]
    crowd = [flipped(rng, hashes[0], 1) for _ in range(20)]
    hashes = rng.permutation(np.concatenate([hashes, near, crowd]))
    pairs = near_pairs(hashes, most)
    found = dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.bits.tolist(), strict=True))
    assert found == brute_force(hashes, most)
    assert len(found) == len(pairs.first)


@pytest.mark.parametrize("crowd", [3, 40])
@pytest.mark.parametrize(("frames", "most"), [(1, 5), (4, 16), (2, 40)])
def test_crowds_hang_together_as_by_all_pairs(frames, most, crowd, monkeypatch):
    """Several of them, near and less near, with what is near to one of a crowd alone."""
    monkeypatch.setattr(duplicates, "CROWD", crowd)
    rng = np.random.default_rng(frames * 100 + most)
    seeds = rng.integers(0, 2**64, (4, frames), dtype=np.uint64)
    seeds[3] = flipped(rng, seeds[2], min(2 * most, 64 * frames // 2))
    wide = [flipped(rng, seed, int(rng.integers(0, most + most // 2))) for seed in seeds for _ in range(150)]
    chain = [seeds[0]]
    for _ in range(30):
        chain.append(flipped(rng, chain[-1], most))
    hashes = rng.permutation(np.concatenate([wide, chain, rng.integers(0, 2**64, (50, frames), dtype=np.uint64)]))
    expected, pairs = brute_force(hashes, most), near_pairs(hashes, most)
    found = dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.bits.tolist(), strict=True))
    assert found.items() <= expected.items() and len(found) < len(expected)
    all_first, all_second = np.array(list(expected)).T
    together = zip(groups(pairs.first, pairs.second, len(hashes)), groups(all_first, all_second, len(hashes)), strict=True)
    assert (
        len(set(together))
        == len(set(groups(pairs.first, pairs.second, len(hashes))))
        == len(set(groups(all_first, all_second, len(hashes))))
    )


def test_a_crowd_takes_no_more_than_its_videos():
    """Of a camera that stands still: pairs are as the videos, not as their square."""
    rng = np.random.default_rng(0)
    hashes = np.repeat(rng.integers(0, 2**64, (1, 8), dtype=np.uint64), 3000, axis=0)
    for _ in range(4):
        hashes[np.arange(3000), rng.integers(0, 8, 3000)] ^= np.uint64(1) << rng.integers(0, 64, 3000, dtype=np.uint64)
    pairs = near_pairs(hashes, 32)
    assert 2999 <= len(pairs.first) < 30_000
    assert len(set(groups(pairs.first, pairs.second, 3000))) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_to_pair(count):
    assert len(near_pairs(np.zeros((count, 8), np.uint64), 32).first) == 0


def test_a_group_hangs_together_by_pairs():
    group = groups(np.array([0, 1, 5]), np.array([1, 2, 4]), 6).tolist()
    assert group[0] == group[1] == group[2] != group[3] != group[4] == group[5]


def test_the_same_picture_in_another_size_and_quality_has_nearly_the_same_bits():
    rng = np.random.default_rng(0)
    pictures = [
        cv2.resize(rng.integers(0, 256, (9, 12), dtype=np.uint8), (320, 240), interpolation=cv2.INTER_CUBIC) for _ in range(20)
    ]
    hashes = [frame_hash(picture) for picture in pictures]
    for picture, bits in zip(pictures, hashes, strict=True):
        jpeg = cv2.imdecode(cv2.imencode(".jpg", cv2.resize(picture, (160, 120)), [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 0)
        assert (frame_hash(jpeg) ^ bits).bit_count() <= 4
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(hashes, 2)) > 12
