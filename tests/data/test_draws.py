"""Weighted epochs: their uses, their order, what is left of them; files that do not fit are explained."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.test_repeats import reader_of
from tests.train.local import packed
from vidfuse.config import Curriculum
from vidfuse.data.clips import parts_of
from vidfuse.data.draws import Draws, balanced, pool_share, read_values
from vidfuse.data.sampling import World, epoch_order, rank_rows, use_of
from vidfuse.data.shards import DataError
from vidfuse.train.ledger import Ledger

N = 200


def test_without_weights_an_epoch_is_the_one_it_was():
    assert (Draws().uses(N, seed=0, epoch=3) == 1).all()
    plain = epoch_order(N, seed=1, epoch=2)
    assert np.array_equal(epoch_order(N, seed=1, epoch=2, uses=np.ones(N, np.uint8)), plain)
    assert sorted(plain) == list(range(N))


def test_uses_are_the_weights_to_the_next_whole_number_and_right_on_average():
    weights = np.random.default_rng(0).gamma(1.0, size=N)
    draws, expected = Draws(weights), weights * N / weights.sum()
    epochs = np.stack([draws.uses(N, seed=0, epoch=epoch) for epoch in range(300)])
    assert (epochs.sum(1) == N).all()
    assert (np.abs(epochs - expected) < 1).all()
    assert np.abs(epochs.mean(0) - expected).max() < 0.15
    assert np.array_equal(draws.uses(N, seed=0, epoch=7), epochs[7]) and not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(draws.uses(N, seed=1, epoch=0), epochs[0])


def test_balanced_classes_are_used_equally_often():
    labels = np.array([0] * 120 + [1] * 60 + [2] * 20)
    uses = Draws(balanced(labels)).uses(N, seed=0, epoch=0)
    for label in range(3):
        assert uses[labels == label].sum() == pytest.approx(N / 3, abs=6)


def test_a_curriculum_draws_from_the_easiest_and_then_from_all():
    difficulty = np.random.default_rng(0).permutation(N).astype(float)
    curriculum = Curriculum(difficulty="file", start=0.25, epochs=3)
    draws = Draws(difficulty=difficulty, curriculum=curriculum)
    assert [pool_share(curriculum, epoch) for epoch in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    for epoch, pool in ((0, 50), (1, 100), (2, 150)):
        uses = draws.uses(N, seed=0, epoch=epoch)
        assert uses.sum() == N and set(np.flatnonzero(uses)) == set(np.argsort(difficulty)[:pool])
    assert (draws.uses(N, seed=0, epoch=3) == 1).all()
    both = Draws(np.arange(N) + 1.0, difficulty, curriculum).uses(N, seed=0, epoch=0)
    assert both.sum() == N and (both[difficulty >= 50] == 0).all()


@pytest.mark.parametrize("block", [1, 8])
def test_an_order_has_each_use_once_in_sequence(block):
    uses = Draws(np.random.default_rng(1).gamma(0.5, size=N)).uses(N, seed=0, epoch=0)
    order = epoch_order(N, seed=0, epoch=0, uses=uses, block=block)
    samples, before = use_of(order, N)
    assert len(set(order)) == N and np.array_equal(np.bincount(samples, minlength=N), uses)
    for sample in range(N):
        assert before[samples == sample].tolist() == list(range(uses[sample]))


def test_blocks_of_a_weighted_epoch_are_of_different_samples():
    uses = Draws(balanced(np.arange(N) % 8 == 0)).uses(N, seed=0, epoch=0)
    samples, _ = use_of(epoch_order(N, seed=0, epoch=0, uses=uses, block=8), N)
    assert uses.max() == 4 and all(len(set(block)) == 8 for block in samples.reshape(-1, 8))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_left_after_some_steps_is_the_rest(workers, block):
    uses = Draws(np.random.default_rng(2).gamma(0.3, size=N)).uses(N, seed=0, epoch=0)
    order = epoch_order(N, seed=0, epoch=0, uses=uses, block=block)
    ledger = Ledger({"a.tar": N})
    for rank in range(workers):
        rows = rank_rows(order, World(workers, rank, 16, 2))[: 5 * 16 // (2 * workers)]  # five steps
        ledger.mark(np.where(rows >= 0, rows % N, rows).reshape(-1))
    ledger.add(ledger.fresh)
    assert np.array_equal(ledger.left(order), order[5 * 16 :])
    assert np.array_equal(Ledger.from_json({"a.tar": N}, ledger.to_json()).left(order), order[5 * 16 :])


def test_further_uses_of_a_sample_are_other_clips():
    index = packed(5).indices["train"]
    index.frames[:], index.width[:], index.height[:] = 40, 128, 96
    (part,) = parts_of(index, np.array([3, 3 + 5, 3 + 10, 4]), 4, epoch=0)
    assert [video.sample for video in part.videos] == [3, 3, 3, 4] and [video.use for video in part.videos] == [0, 1, 2, 0]
    plans = [plan for video in part.videos[:3] for plan in reader_of("", 2).plans(video, 0)]
    assert len({plan.box for plan in plans}) == 6


def test_a_sample_that_would_be_used_too_often_is_refused():
    weights = np.full(1000, 1e-6)
    weights[0] = 1.0
    with pytest.raises(DataError, match="used 999 times in epoch 0, which has 1,000 uses in all; 254 are the most"):
        Draws(weights).check(1000)
    with pytest.raises(DataError, match="have the weight 0"):
        Draws(np.zeros(10)).check(10)


def test_every_epoch_of_a_curriculum_is_checked():
    """The heaviest sample is the hardest: it comes in when others share the epoch with it, or when it is nearly alone."""
    late = np.ones(1000)
    late[-1] = 5000.0
    curriculum = Curriculum(difficulty="d.csv", start=0.3, epochs=3)
    with pytest.raises(DataError, match="used 833 times in epoch 3"):
        Draws(late, np.arange(1000.0), curriculum).check(1000)
    early = late[::-1].copy()
    with pytest.raises(DataError, match="used 944 times in epoch 0"):
        Draws(early, np.arange(1000.0), curriculum).check(1000)
    none = np.r_[np.zeros(400), np.ones(600)]
    with pytest.raises(DataError, match="all samples that epoch 0 draws from have the weight 0"):
        Draws(none, np.arange(1000.0), curriculum).check(1000)
    even = Draws(np.random.default_rng(0).uniform(0.5, 2, 1000), np.arange(1000.0), curriculum).check(1000)
    assert all(even.uses(1000, seed=0, epoch=epoch).sum() == 1000 for epoch in range(6))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("key,weight\ntrain0,1\n", "header `key,value` is needed, given"),
        ("key,value\nother,1\n", "line 2: key 'other' is no sample"),
        ("key,value\ntrain0,1\ntrain0,2\n", "line 3: key 'train0' is there twice"),
        ("key,value\ntrain0,1\n", "4 samples have no value, the first is 'train1'"),
        ("key,value\ntrain0,-1\n", "line 2 has no number of at least 0"),
        ("key,value\ntrain0,much\n", "line 2 has no number of at least 0"),
        ("key,value\ntrain0\n", "line 2 has no number of at least 0"),
        ("key,value\ntrain0,1".encode("utf-16"), "byte 0 is no UTF-8; save the table as CSV in UTF-8"),
        ("key,value\ntrainé,1".encode("latin-1"), "byte 15 is no UTF-8"),
        (f'key,value\n"{"x" * 200_000}', "line 1 is no CSV: field larger than"),
    ],
)
def test_files_that_do_not_fit_are_explained(content, words):
    with pytest.raises(DataError, match=words):
        read_values(content if isinstance(content, bytes) else content.encode(), packed(5).indices["train"], "weights.csv")


def test_values_are_read_by_key():
    content = "key,value\n" + "".join(f"train{i},{i / 2}\n" for i in (4, 0, 2, 1, 3))
    assert read_values(content.encode(), packed(5).indices["train"], "w").tolist() == [0, 0.5, 1, 1.5, 2]


def test_difficulties_may_be_negative():
    content = "key,value\n" + "".join(f"train{i},{-i}\n" for i in range(5))
    index = packed(5).indices["train"]
    assert read_values(content.encode(), index, "d", least=-np.inf).tolist() == [0, -1, -2, -3, -4]
    with pytest.raises(DataError, match="line 2 has no number after the key"):
        read_values(b"key,value\ntrain0,nan\n", index, "d", least=-np.inf)
