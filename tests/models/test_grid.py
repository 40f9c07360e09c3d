"""Tokens averaged in a grid: against torch's own pooling, with padding, and where a grid does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vidfuse.models.building import build_recognizer
from vidfuse.models.grid import pool
from vidfuse.models.parts import Tokens


def tokens_of(grid: tuple[int, int, int], *, mask=None, seed: int = 0) -> Tokens:
    axes = [(torch.arange(n) + 0.5) / n for n in grid]
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    values = torch.randn(2, len(positions), 5, generator=torch.Generator().manual_seed(seed))
    return Tokens(values, positions, mask)


def reference(values, grid, wanted):
    volume = values.transpose(1, 2).reshape(len(values), -1, *grid)
    return F.adaptive_avg_pool3d(volume, wanted).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("wanted", [(8, 14, 14), (4, 7, 7), (8, 2, 7), (1, 1, 1)])
def test_equal_cells_are_the_means_of_torchs_pooling(wanted):
    tokens = tokens_of((8, 14, 14))
    pooled = pool(tokens, wanted)
    torch.testing.assert_close(pooled.values, reference(tokens.values, (8, 14, 14), wanted))
    torch.testing.assert_close(pooled.positions, tokens_of(wanted).positions)
    assert pooled.mask is None


def test_every_token_counts_once_where_cells_are_unequal():
    """Of 5 places along time the first two are in the first of two cells; of 7 along a side 2, 3 and 2 are."""
    tokens = tokens_of((5, 7, 7))
    pooled = pool(tokens, (2, 3, 3))
    side = torch.tensor([2, 3, 2])
    sizes = (torch.tensor([2, 3])[:, None, None] * side[:, None] * side).flatten()
    assert pooled.values.shape == (2, 18, 5) and int(sizes.sum()) == 5 * 7 * 7
    torch.testing.assert_close((pooled.values * sizes[:, None]).sum(1), tokens.values.sum(1))


def test_padding_does_not_count_and_a_cell_of_padding_is_padding():
    tokens = tokens_of((2, 2, 2), mask=torch.ones(2, 8, dtype=torch.bool))
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 1] = mask[1, 4:] = False
    pooled = pool(Tokens(tokens.values, tokens.positions, mask), (2, 1, 1))
    torch.testing.assert_close(pooled.values[0, 0], tokens.values[0, [0, 2, 3]].mean(0))
    torch.testing.assert_close(pooled.values[1, 0], tokens.values[1, :4].mean(0))
    assert pooled.mask.tolist() == [[True, True], [True, False]]


def test_a_grid_that_is_too_fine_is_refused():
    with pytest.raises(ValueError, match=r"3 x 2 x 2 cells .* 2 x 2 x 2 different places"):
        pool(tokens_of((2, 2, 2)), (3, 2, 2))


def test_gradients_reach_every_token():
    tokens = tokens_of((4, 4, 4))
    values = tokens.values.clone().requires_grad_()
    pool(Tokens(values, tokens.positions), (2, 3, 1)).values.sum().backward()
    assert (values.grad > 0).all()


def model_of(**motion) -> nn.Module:
    return build_recognizer(
        classes=3,
        frames=4,
        size=32,
        semantic={"name": "tiny_image", "grid": (2, 2, 2)},
        motion={"name": "tiny_motion", **motion},
        fusion={"name": "cross_attention", "options": {"width": 24, "heads": 2, "dropout": 0.0}},
    ).eval()


CLIPS = torch.randint(0, 255, (3, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_cached_tokens_give_the_logits_of_clips():
    model = model_of()
    assert model.cacheable == ("motion", "semantic")
    cached = {name: model.tokens(name, CLIPS) for name in model.cacheable}
    assert cached["semantic"].values.shape[1] == 8
    expected = model(CLIPS)
    for names in (("semantic",), ("motion",), ("semantic", "motion")):
        clips = CLIPS if len(names) == 1 else CLIPS[:, :0]
        assert torch.equal(model(clips, {name: cached[name] for name in names}), expected)


def test_tokens_of_a_trained_stream_are_not_cached():
    model = model_of(frozen=False)
    assert model.cacheable == ("semantic",)
    with pytest.raises(ValueError, match="tokens of the motion stream change"):
        model.tokens("motion", CLIPS)


def test_a_model_names_the_stream_whose_grid_is_too_fine():
    with pytest.raises(ValueError, match=r"motion\.grid: a grid of 4 x 64 x 64"):
        model_of(grid=(4, 64, 64))(CLIPS)
