"""Cross-attention against an obvious loop, and its options."""

import math

import pytest
import torch
import torch.nn.functional as F

from vidfuse.models import select
from vidfuse.models.attention import Attention
from vidfuse.models.layers import encode_positions, grid_positions
from vidfuse.models.parts import Tokens

WIDTHS = {"semantic": 10, "motion": 14}


def _build(**options):
    torch.manual_seed(0)
    fusion = select.build("fusion", "cross_attention", widths=WIDTHS, **{"width": 12, "heads": 3, **options})
    for parameter in fusion.parameters():  # biases and norms, too, have to be used
        torch.nn.init.normal_(parameter, std=0.5)
    return fusion.eval()


def _streams():
    draw = torch.Generator().manual_seed(1)
    masks = {"semantic": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]), "motion": torch.tensor([[1, 1, 1], [0, 1, 0]])}
    grids = {"semantic": (2, 1, 2), "motion": (3, 1, 1)}
    return {
        n: Tokens(torch.randn(2, m.shape[1], WIDTHS[n], generator=draw), grid_positions(*grids[n]), m.bool())
        for n, m in masks.items()
    }


def _norm(layer, x):
    x = (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt()
    return x * layer.weight + layer.bias


def _place(position, width):
    """Sines of all axes, cosines of all axes, zeros."""
    count = width // 6
    waves = [2.0 * (1 / 32) ** (i / (count - 1) if count > 1 else 0) for i in range(count)]
    angles = [2 * math.pi * p / w for p in position.tolist() for w in waves]
    encoded = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(encoded + [0.0] * (width - len(encoded)))


def _read(reader, x, others, heads):
    """One query token over the other stream's real tokens, then the feed-forward part."""
    read, seen = _attend(reader.attention, _norm(reader.norm_query, x), [_norm(reader.norm_key, y) for y in others], heads)
    return _feed_forward(reader.mlp, x + read), seen


def _pooled(pool, tokens, heads):
    """The learned query over a stream's real tokens, then the feed-forward part."""
    query = pool.query[0, 0]
    return _feed_forward(pool.mlp, query + _attend(pool.attention, query, [_norm(pool.norm, x) for x in tokens], heads)[0])


def _attend(attention, x, others, heads):
    """Head by head."""
    width = len(x)
    d = width // heads
    query = attention.query(x)
    pairs = [attention.key_value(y) for y in others]
    result, seen = [], []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = [float(query[part] @ pair[:width][part]) / math.sqrt(d) for pair in pairs]
        total = sum(math.exp(s) for s in scores)
        weights = [math.exp(s) / total for s in scores]
        result.append(sum(w * pair[width:][part] for w, pair in zip(weights, pairs, strict=True)))
        seen.append(weights)
    return attention.out(torch.cat(result)), seen


def _feed_forward(part, x):
    if part is None:
        return x
    norm, mlp = part
    return x + mlp[3](F.gelu(mlp[0](_norm(norm, x))))


def _by_loop(fusion, streams, heads, pool):
    features, seen = [], {}
    for clip in range(2):
        tokens = {
            name: [
                fusion.project[name][1](_norm(fusion.project[name][0], value)) + _place(position, fusion.token_width)
                for value, position, real in zip(s.values[clip], s.positions, s.mask[clip], strict=True)
                if real
            ]
            for name, s in streams.items()
        }
        for i, layer in enumerate(fusion.layers):
            after = dict(tokens)
            for a, b in layer.pairs:
                read = [_read(layer.readers[f"{a}_to_{b}"], x, tokens[b], heads) for x in tokens[a]]
                after[a] = [x for x, _ in read]
                seen[clip, f"layer{i}.{a}_to_{b}"] = [weights for _, weights in read]
            tokens = after
        normed = {n: [_norm(fusion.norm[n], x) for x in tokens[n]] for n in fusion.norm}
        if pool == "attentive":
            pooled = [_pooled(fusion.read[n], normed[n], heads) for n in normed]
        else:
            pooled = [torch.stack(normed[n]).mean(0) for n in normed]
        features.append(sum(pooled) / 2 if pool == "mean" else torch.cat(pooled))
    return torch.stack(features), seen


@pytest.mark.parametrize("direction", ["both", "semantic_to_motion", "motion_to_semantic"])
@pytest.mark.parametrize(("layers", "mlp_ratio", "pool"), [(1, 2.0, "concat"), (2, None, "mean"), (2, 1.0, "attentive")])
@torch.no_grad()
def test_is_the_loop(direction, layers, mlp_ratio, pool):
    fusion, streams = _build(direction=direction, layers=layers, mlp_ratio=mlp_ratio, pool=pool), _streams()
    want, seen = _by_loop(fusion, streams, 3, pool)
    plain, asked = fusion(streams), fusion(streams, return_attention=True)
    torch.testing.assert_close(plain.feature, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked.feature, want, rtol=1e-4, atol=1e-5)
    assert len(asked.attention) == layers * (2 if direction == "both" else 1)
    for (clip, name), weights in seen.items():
        queries, keys = (streams[n].mask[clip] for n in name.split(".")[1].split("_to_"))
        ours = asked.attention[name][clip][:, queries][:, :, keys]
        torch.testing.assert_close(ours.movedim(0, 1), torch.tensor(weights), rtol=1e-4, atol=1e-5)


def test_attention_asked_for_in_training_has_dropout_after_it():
    fusion = _build(dropout=0.5).train()
    weights = fusion(_streams(), return_attention=True).attention["layer0.semantic_to_motion"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("asked", [True, False])
def test_a_clip_without_a_real_key_reads_nothing(asked):
    attention, keys = Attention(12, 3).eval(), torch.randn(2, 4, 12)
    read, _ = attention(torch.randn(2, 5, 12), keys, torch.tensor([[False] * 4, [True] * 4]), return_attention=asked)
    assert torch.equal(read[0], attention.out.bias.expand(5, -1))
    assert not torch.allclose(read[1], attention.out.bias.expand(5, -1))


def test_positions_tell_time_from_space_and_neighbours_apart():
    positions = grid_positions(16, 14, 14)
    encoded = encode_positions(positions, 512)
    assert encoded.shape == (16 * 14 * 14, 512) and encoded.abs().max() <= 1
    near = encoded[[0, 1, 14, 14 * 14]]  # a cell and its neighbours in width, height, time
    distance = torch.cdist(near, near)
    assert (distance[~torch.eye(4, dtype=torch.bool)] > 1).all()
    torch.testing.assert_close(encode_positions(positions[5:6], 20), encode_positions(positions, 20)[5:6])


def test_default_is_the_plans_and_small():
    with torch.device("meta"):
        fusion = select.build("fusion", "cross_attention", widths={"semantic": 384, "motion": 2048})
    assert fusion.width == 1024 and fusion.layers[0].readers["semantic_to_motion"].attention.heads == 8
    assert sum(p.numel() for p in fusion.parameters()) < 20e6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "heads=5 does not divide width=12; heads that do: 1, 2, 4, 6, 12"),
        ({"heads": 0}, "heads=0"),
        ({"dropout": 1.0}, "dropout is a share"),
        ({"layers": 0}, "layers >= 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio > 0"),
        ({"direction": "sideways"}, "option direction is one of 'both', 'semantic_to_motion', 'motion_to_semantic'"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        _build(**options)


def test_refuses_one_stream():
    with pytest.raises(ValueError, match=r"joins two streams, semantic and motion, given motion.*take fusion mean or concat"):
        select.build("fusion", "cross_attention", widths={"motion": 8})
