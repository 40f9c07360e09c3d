"""How well an epoch is shuffled: how far samples move, and how much a sample's shard tells of its place; beside webdataset's.

webdataset 1.0.2 shuffles the order of shards and then draws from a buffer of samples (`webdataset.filters.shuffle`). vidfuse's
order is one permutation of the whole split, so both figures should be those of chance; bounds are four standard errors of the
figure over random permutations (numpy's), not figures of the implementation.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from vidfuse.data.sampling import epoch_order

SHARDS, PER_SHARD = 100, 200
SAMPLES = SHARDS * PER_SHARD
BATCH = 64
SHARD = np.repeat(np.arange(SHARDS), PER_SHARD)


def displacement(order: np.ndarray) -> float:
    """Mean distance of a sample's place from its number, as a share of all; 1/3 for a random permutation."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    return float(np.abs(place - np.arange(len(order))).mean() / len(order))


def told_by_shard(order: np.ndarray) -> float:
    """Share of the variance of a sample's place that its shard explains (eta squared): 0 nothing, 1 all."""
    place = np.empty(len(order))
    place[order] = np.arange(len(order))
    means = place.reshape(SHARDS, PER_SHARD).mean(axis=1)
    return float(means.var() / place.var())


def shards_in_a_batch(order: np.ndarray) -> float:
    """Mean number of shards among the samples of a batch."""
    whole = len(order) // BATCH * BATCH
    return float(np.mean([len(np.unique(batch)) for batch in SHARD[order[:whole]].reshape(-1, BATCH)]))


def webdataset_order(seed: int, buffer: int) -> np.ndarray:
    """Shards in random order, then webdataset's own shuffle buffer."""
    from webdataset.filters import shuffle

    rng = random.Random(seed)
    shards = list(range(SHARDS))
    rng.shuffle(shards)
    samples = (shard * PER_SHARD + i for shard in shards for i in range(PER_SHARD))
    return np.fromiter(shuffle(buffer, initial=buffer, rng=rng)(samples), np.int64)


@pytest.mark.parametrize("figure", [displacement, told_by_shard, shards_in_a_batch])
def test_an_epoch_is_shuffled_as_a_random_permutation_is(figure):
    rng = np.random.default_rng(0)
    chance = [figure(rng.permutation(SAMPLES)) for _ in range(30)]
    ours = [figure(epoch_order(SAMPLES, seed=seed, epoch=epoch)) for seed in (0, 1) for epoch in range(3)]
    far = 4 * np.std(chance, ddof=1)
    assert np.abs(np.array(ours) - np.mean(chance)).max() < far, (ours, np.mean(chance), far)


def test_a_shuffle_buffer_leaves_a_sample_near_its_shard():
    """The figures do tell: webdataset's customary buffer of 1,000 leaves most of a sample's place to its shard."""
    theirs, ours = webdataset_order(0, 1000), epoch_order(SAMPLES, seed=0, epoch=0)
    assert sorted(theirs) == list(range(SAMPLES))
    print(f"told by shard: ours {told_by_shard(ours):.4f}, webdataset {told_by_shard(theirs):.4f}")
    print(f"shards in a batch of {BATCH}: ours {shards_in_a_batch(ours):.1f}, webdataset {shards_in_a_batch(theirs):.1f}")
    assert told_by_shard(theirs) > 0.9 and told_by_shard(ours) < 0.02
    assert shards_in_a_batch(theirs) < 0.5 * shards_in_a_batch(ours)


def test_epochs_and_seeds_are_unrelated():
    """Places of a sample in two orders do not correlate beyond chance (|r| < 4 / sqrt(samples))."""
    orders = [epoch_order(SAMPLES, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    places = [np.argsort(order) for order in orders]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.corrcoef(places[i], places[j])[0, 1]) < 4 / SAMPLES**0.5


@pytest.mark.parametrize("block", [4, 8, 7])
def test_blocks_are_shuffled_as_single_samples_are(block):
    """Neighbours follow each other, blocks begin elsewhere in each epoch, and their places are those of chance."""
    rng = np.random.default_rng(0)
    whole = SAMPLES // block * block
    starts = set()
    for figure in (displacement, told_by_shard):
        chance = [figure(chance_of_blocks(rng, block)) for _ in range(30)]
        ours = []
        for epoch in range(6):
            order = epoch_order(SAMPLES, seed=0, epoch=epoch, block=block)
            assert np.array_equal(np.sort(order), np.arange(SAMPLES))
            blocks = order[:whole].reshape(-1, block)
            assert ((blocks[:, 1:] - blocks[:, :-1]) % SAMPLES == 1).all()
            starts.add(int(order[0]) % block)
            ours.append(figure(order))
        assert np.abs(np.array(ours) - np.mean(chance)).max() < 4 * np.std(chance, ddof=1), (figure, ours)
    assert len(starts) > 1
    fewer = shards_in_a_batch(epoch_order(SAMPLES, seed=0, epoch=0, block=block))
    assert fewer <= BATCH / block + 2 * BATCH / PER_SHARD + 2 < shards_in_a_batch(epoch_order(SAMPLES, seed=0, epoch=0))


def chance_of_blocks(rng: np.random.Generator, block: int) -> np.ndarray:
    starts = rng.permutation(np.arange(0, SAMPLES, block))
    return np.concatenate([np.arange(start, min(start + block, SAMPLES)) for start in starts])


def test_a_set_that_is_smaller_than_a_block_is_used_whole():
    assert sorted(epoch_order(5, seed=0, epoch=0, block=8)) == list(range(5))
