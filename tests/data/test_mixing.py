"""Mixup and CutMix: timm's arithmetic, shares that are volumes, pairs that do not depend on how the global batch is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vidfuse.config import ConfigError, Mixing, from_mapping
from vidfuse.data.batch import Batch
from vidfuse.data.mixing import Pair, mix, pairs

T, SIDE = 8, 16
SHAPE = (T, SIDE, SIDE)


def batch_of(rows: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    clips = torch.from_numpy(rng.integers(0, 256, (rows, T, SIDE, SIDE, 3), dtype=np.uint8)).permute(0, 1, 4, 2, 3)
    return Batch(clips, torch.arange(rows), torch.ones(rows), torch.arange(rows))


def drawn(mixing: Mixing, videos: int = 8, *, place: int = 0, repeats: int = 1, key=(0, 0), weights=None) -> list[Pair]:
    rows = torch.ones(videos * repeats) if weights is None else torch.tensor(weights)
    return list(pairs(rows, mixing, shape=SHAPE, place=place, repeats=repeats, key=key))


def test_mixup_is_timms_up_to_rounding():
    from timm.data.mixup import mixup_target

    batch = batch_of(2)
    mixed = mix(batch, [Pair(0, 1, 0.3, None)])
    reference = batch.clips.float() * 0.3 + batch.clips.float().flip(0) * 0.7
    assert (mixed.clips - reference).abs().max() < 0.501 and mixed.clips.dtype == torch.uint8
    one_hot = torch.nn.functional.one_hot
    soft = one_hot(batch.labels, 2) * mixed.shares[:, None] + one_hot(mixed.others, 2) * (1 - mixed.shares[:, None])
    assert torch.allclose(soft, mixup_target(batch.labels, 2, 0.3))


@pytest.mark.parametrize("cut", ["spatial", "temporal", "spatiotemporal"])
def test_a_cut_is_exchanged_and_its_volume_is_the_share(cut):
    batch, mixing = batch_of(8), Mixing(mixup_alpha=None, cut=cut)
    chosen = drawn(mixing)
    mixed = mix(batch, chosen)
    assert len(chosen) == 4
    for pair in chosen:
        a, b = pair.first, pair.second
        assert torch.equal(mixed.clips[a].int() + mixed.clips[b], batch.clips[a].int() + batch.clips[b])  # nothing is lost
        own = (mixed.clips[a] == batch.clips[a]).all(dim=1)
        time, height, width = pair.cut
        box = torch.ones(T, SIDE, SIDE, dtype=torch.bool)
        box[time, height, width] = False
        assert own[box].all() and own.float().mean() == pytest.approx(pair.share, abs=0.01)
        assert (time == slice(0, T)) == (cut == "spatial") and (height == width == slice(0, SIDE)) == (cut == "temporal")


@pytest.mark.parametrize("cut", ["spatial", "temporal", "spatiotemporal"])
def test_shares_are_spread_as_beta_is(cut):
    """CutMix with alpha 1: uniform shares, less what falls outside of the clip; mean exchanged volume is timm's for a picture."""
    from timm.data.mixup import cutmix_bbox_and_lam

    found = [1 - pair.share for step in range(200) for pair in drawn(Mixing(mixup_alpha=None, cut=cut), key=(0, step))]
    assert min(found) >= 0 and max(found) <= 1
    if cut == "spatial":
        rng = np.random.default_rng(0)
        np.random.seed(0)
        theirs = [1 - cutmix_bbox_and_lam((SIDE, SIDE), rng.beta(1, 1))[1] for _ in range(2000)]
        assert np.mean(found) == pytest.approx(np.mean(theirs), abs=0.04)


def test_probability_and_switch_are_kept():
    chosen = [p for step in range(500) for p in drawn(Mixing(probability=0.6, switch_probability=0.25), key=(0, step))]
    assert len(chosen) / 2000 == pytest.approx(0.6, abs=0.045)
    assert sum(pair.cut is not None for pair in chosen) / len(chosen) == pytest.approx(0.25, abs=0.05)
    assert all(pair.cut is None for pair in drawn(Mixing(cutmix_alpha=None)))


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_mixed_step_is_one_function_of_the_global_batch(repeats):
    """Cut into micro batches of 2, 4 or 8 videos: the same partners, shares and cuts."""

    def whole(micro: int) -> list[tuple]:
        found = []
        for place in range(0, 8, micro):
            for pair in drawn(Mixing(), micro, place=place, repeats=repeats, key=(1, 2)):
                found.append((place * repeats + pair.first, place * repeats + pair.second, pair.share, pair.cut))
        return found

    assert whole(8) == whole(4) == whole(2) and len(whole(8)) == 4 * repeats
    assert {b - a for a, b, *_ in whole(8)} == {repeats}  # another video, the same repeat
    assert whole(8) != [(p.first, p.second, p.share, p.cut) for p in drawn(Mixing(), 8, repeats=repeats, key=(1, 3))]


def test_rows_that_weigh_nothing_are_not_mixed_and_neither_are_their_partners():
    weights = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    chosen = drawn(Mixing(), weights=weights)
    assert [(pair.first, pair.second) for pair in chosen] == [(0, 1), (4, 5)]
    batch = batch_of(8)
    mixed = mix(batch, chosen)
    for row in (2, 3, 6, 7):
        assert torch.equal(mixed.clips[row], batch.clips[row])
        assert mixed.shares[row] == 1 and mixed.others[row] == batch.labels[row]
    # the others are drawn as if nothing were missing
    assert [c for c in drawn(Mixing()) if c.first in (0, 4)] == chosen


def test_the_batch_is_left_as_it_is():
    batch = batch_of(4)
    before = batch.clips.clone(), batch.labels.clone()
    mix(batch, drawn(Mixing(), 4))
    assert torch.equal(batch.clips, before[0]) and torch.equal(batch.labels, before[1])


def test_settings_that_mix_nothing_or_cannot_pair_are_refused():
    with pytest.raises(ConfigError, match=r"both null.*train\.mixing=null"):
        from_mapping({"train": {"mixing": {"mixup_alpha": None, "cutmix_alpha": None}}})
    with pytest.raises(ConfigError, match="micro_batch is even, given 3"):
        from_mapping({"train": {"mixing": {}, "global_batch": 9, "micro_batch": 3}})
