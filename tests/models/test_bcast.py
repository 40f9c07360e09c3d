"""B-CAST: windows against their rule token by token, the exchange against an obvious loop and the published structure."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vidfuse.models import select
from vidfuse.models.attention import Attention
from vidfuse.models.exchange import BottleneckExchange, attend_in, windows_along
from vidfuse.models.layers import encode_positions, frame_positions, grid_positions
from vidfuse.models.parts import Tokens

WIDTHS = {"semantic": 10, "motion": 14}
GRIDS = {
    "one grid": (grid_positions(3, 2, 2), grid_positions(3, 2, 2)),
    "coarser keys": (grid_positions(4, 4, 4), grid_positions(2, 2, 2)),
    "finer keys": (grid_positions(2, 1, 2), grid_positions(4, 2, 4)),
    "of no common measure": (grid_positions(3, 5, 5), grid_positions(2, 3, 3)),
    "class tokens": (frame_positions(4, 2, 2), grid_positions(2, 4, 4)),
    "class tokens as keys": (grid_positions(2, 3, 3), frame_positions(4, 4, 4)),
}
FIXED = {"time": [1, 2], "space": [0]}
"""What two tokens of a window have in common, as axes of a position."""


def _away(p, q, axes):
    return math.sqrt(sum((float(p[a]) - float(q[a])) ** 2 for a in axes))


def _meets(queries, keys, along):
    """[Q][K]: one is the nearest that its stream has to the other, as seen along the axes that a window does not span."""
    axes = FIXED[along]
    away = [[_away(q, k, axes) for k in keys] for q in queries]
    to_key = [min(row) for row in away]
    to_query = [min(row[j] for row in away) for j in range(len(keys))]
    return [[d <= to_key[i] + 1e-6 or d <= to_query[j] + 1e-6 for j, d in enumerate(row)] for i, row in enumerate(away)]


def _as_matrix(windows, queries, keys):
    """[Q, K] and how often each query is in a window."""
    matrix, times = torch.zeros(queries, keys, dtype=torch.bool), torch.zeros(queries, dtype=torch.long)
    for window in windows:
        for members, others in zip(window.queries.tolist(), window.keys.tolist(), strict=True):
            for q in members:
                times[q] += 1
                for k in others:
                    matrix[q, k] = True
    return matrix, times


@pytest.mark.parametrize("along", ["time", "space"])
@pytest.mark.parametrize("grids", GRIDS)
def test_windows_are_the_rule(grids, along):
    queries, keys = GRIDS[grids]
    draw = torch.Generator().manual_seed(0)
    queries, keys = (p[torch.randperm(len(p), generator=draw)] for p in (queries, keys))
    matrix, times = _as_matrix(windows_along(queries, keys, along), len(queries), len(keys))
    assert (times == 1).all()
    assert matrix.tolist() == _meets(queries, keys, along)
    assert matrix.any(dim=1).all() and matrix.any(dim=0).all()


def test_windows_of_one_grid_are_its_columns_and_frames():
    positions = grid_positions(4, 3, 3)
    (time,), (space,) = (windows_along(positions, positions, along) for along in ("time", "space"))
    assert time.queries.tolist() == time.keys.tolist() and space.queries.tolist() == space.keys.tolist()
    assert sorted(time.queries.tolist()) == [list(range(place, 36, 9)) for place in range(9)]
    assert sorted(space.queries.tolist()) == [list(range(t * 9, t * 9 + 9)) for t in range(4)]


def test_a_coarse_cell_meets_the_fine_cells_in_it():
    fine, coarse = grid_positions(1, 4, 4), grid_positions(1, 2, 2)
    for matrix in (
        _as_matrix(windows_along(fine, coarse, "time"), 16, 4)[0].T,
        _as_matrix(windows_along(coarse, fine, "time"), 4, 16)[0],
    ):
        assert [row.nonzero().flatten().tolist() for row in matrix] == [
            [0, 1, 4, 5],
            [2, 3, 6, 7],
            [8, 9, 12, 13],
            [10, 11, 14, 15],
        ]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("along", ["time", "space"])
@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_attention_in_windows_is_attention_under_their_mask(grids, along, asked):
    torch.manual_seed(0)
    queries, keys = GRIDS[grids]
    attention, x, y = Attention(12, 3).eval(), torch.randn(2, len(queries), 12), torch.randn(2, len(keys), 12)
    mask = torch.rand(2, len(keys)) < 0.6
    mask[0, keys[:, 0] == keys[0, 0]] = mask[1, (keys[:, 1:] == keys[0, 1:]).all(dim=1)] = False
    among = torch.tensor(_meets(queries, keys, along)) & mask[:, None]
    assert grids != "one grid" or not among.any(dim=-1).all(), "windows without a real key belong to this test"
    want, seen = attention(x, y, among, return_attention=True)
    windows = windows_along(queries, keys, along)
    got, weights = attend_in(windows, attention, x, y, mask, return_attention=asked)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if asked:
        torch.testing.assert_close(weights, seen)
        assert torch.equal(weights.sum(dim=-1) > 0, among.any(dim=-1)[:, None].expand(-1, 3, -1))


def _build(**options):
    torch.manual_seed(0)
    fusion = select.build("fusion", "bcast", widths=WIDTHS, **{"bottleneck": 12, "heads": 3, **options})
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return fusion.eval()


def _streams():
    draw = torch.Generator().manual_seed(1)
    positions = {"semantic": frame_positions(2, 1, 2), "motion": grid_positions(4, 1, 1)}
    masks = {"semantic": [[1, 1, 0, 1, 1, 1], [1] * 6], "motion": [[1, 1, 1, 1], [0, 1, 0, 0]]}
    return {
        n: Tokens(torch.randn(2, len(p), WIDTHS[n], generator=draw), p, torch.tensor(masks[n]).bool())
        for n, p in positions.items()
    }


def _norm(layer, x):
    x = (x - x.mean()) / (x.var(unbiased=False) + layer.eps).sqrt()
    return x * layer.weight + layer.bias


def _place(position, along, width):
    kept = [float(position[a]) if along == "all" or a not in FIXED[along] else 0.0 for a in range(3)]
    return encode_positions(torch.tensor([kept]), width)[0]


def _read(layer, pair, x, others, along, heads):
    """One query, (value, position), over the tokens it may see, head by head; and the weights."""
    a, b = pair
    attention, width = layer.attention[f"{a}_to_{b}"], layer.bottleneck
    d = width // heads

    def low(name, token):
        linear, norm = layer.down[name]
        return _norm(norm, linear(token[0])) + _place(token[1], along, width)

    query = attention.query(low(a, x))
    pairs = [attention.key_value(low(b, y)) for y in others]
    result, seen = [torch.zeros(d)] * heads, []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = [float(query[part] @ p[:width][part]) / math.sqrt(d) for p in pairs]
        total = sum(math.exp(s) for s in scores)
        seen.append([math.exp(s) / total for s in scores])
        for weight, p in zip(seen[-1], pairs, strict=True):
            result[head] = result[head] + weight * p[width:][part]
    read = attention.out(torch.cat(result))
    return x[0] + layer.up[a][1](read * 0.5 * (1 + torch.erf(read / math.sqrt(2)))), seen


ALONG = {"time_space": ("time", "space"), "space_time": ("space", "time"), "none": ("all", "all")}


@pytest.mark.parametrize("direction", ["both", "semantic_to_motion", "motion_to_semantic"])
@pytest.mark.parametrize(("windows", "layers"), [("time_space", 1), ("time_space", 3), ("space_time", 2), ("none", 2)])
@torch.no_grad()
def test_is_the_loop(direction, windows, layers):
    fusion, streams = _build(direction=direction, windows=windows, layers=layers), _streams()
    along = dict(zip(("semantic", "motion"), ALONG[windows], strict=True))
    features, seen = [], {}
    for clip in range(2):
        values = {n: list(s.values[clip]) for n, s in streams.items()}
        for i, layer in enumerate(fusion.layers):
            after = {n: list(v) for n, v in values.items()}
            for a, b in layer.pairs:
                at, at_keys, real = streams[a].positions, streams[b].positions, streams[b].mask[clip]
                meets = [[True] * len(at_keys)] * len(at) if along[a] == "all" else _meets(at, at_keys, along[a])
                for q in range(len(at)):
                    keys = [k for k in range(len(at_keys)) if meets[q][k] and real[k]]
                    others = [(values[b][k], at_keys[k]) for k in keys]
                    after[a][q], weights = _read(layer, (a, b), (values[a][q], at[q]), others, along[a], 3)
                    seen[clip, f"layer{i}.{a}_to_{b}", q] = keys, weights
            values = after
        real = {n: [v for v, kept in zip(values[n], s.mask[clip], strict=True) if kept] for n, s in streams.items()}
        features.append(torch.cat([torch.stack([_norm(fusion.norm[n], v) for v in real[n]]).mean(0) for n in fusion.norm]))
    plain, asked = fusion(streams), fusion(streams, return_attention=True)
    torch.testing.assert_close(plain.feature, torch.stack(features), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked.feature, torch.stack(features), rtol=1e-4, atol=1e-5)
    assert len(asked.attention) == layers * (2 if direction == "both" else 1)
    for (clip, name, q), (keys, weights) in seen.items():
        if streams[name.split(".")[1].split("_to_")[0]].mask[clip, q]:
            want = torch.zeros(3, asked.attention[name].shape[-1])
            want[:, keys] = torch.tensor(weights)
            torch.testing.assert_close(asked.attention[name][clip, :, q], want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_with_identities_it_is_plain_cross_attention():
    """A bottleneck as wide as the streams, projections that change nothing: GELU of cross-attention, added."""
    torch.manual_seed(0)
    exchange = BottleneckExchange({"semantic": 12, "motion": 12}, bottleneck=12, heads=3, windows="none").eval()
    for linear in (
        exchange.down["semantic"][0],
        exchange.down["motion"][0],
        exchange.up["semantic"][1],
        exchange.up["motion"][1],
    ):
        linear.weight.copy_(torch.eye(12))
        linear.bias.zero_()
    positions = {"semantic": grid_positions(2, 2, 2), "motion": grid_positions(3, 1, 1)}
    values = {name: torch.randn(2, len(p), 12) for name, p in positions.items()}
    after, _ = exchange(values, positions, dict.fromkeys(values), exchange.meeting(positions))
    placed = {n: F.layer_norm(v, (12,), eps=1e-6) + encode_positions(positions[n], 12) for n, v in values.items()}
    for a, b in (("semantic", "motion"), ("motion", "semantic")):
        plain = Attention(12, 3)
        plain.load_state_dict(exchange.attention[f"{a}_to_{b}"].state_dict())
        torch.testing.assert_close(after[a], values[a] + F.gelu(plain(placed[a], placed[b])[0]), rtol=1e-5, atol=1e-6)


def test_an_untrained_exchange_changes_nothing():
    """Published: the projections up start at zero (`_init_adpater_weight` of the authors' code)."""
    exchange = BottleneckExchange(WIDTHS, bottleneck=12, heads=3)
    streams = _streams()
    values, positions, masks = ({n: getattr(s, what) for n, s in streams.items()} for what in ("values", "positions", "mask"))
    after, _ = exchange(values, positions, masks, exchange.meeting(positions))
    assert all(torch.equal(after[n], values[n]) for n in values)


def test_has_the_published_blocks_parameters():
    """Listed by the authors' code (KHU-VLL/CAST at 51eb871, `Block`'s cross-attention), less its tables of positions."""
    d, low = 768, 768 // 2
    down, norm, up = d * low + low, 2 * low, low * d + d
    query, key_value, out = low * low + low, low * 2 * low + 2 * low, low * low + low
    with torch.device("meta"):
        exchange = BottleneckExchange({"semantic": 768, "motion": 768}, bottleneck=384, heads=12)
    assert sum(p.numel() for p in exchange.parameters()) == 2 * (down + norm + query + key_value + out + up)


@pytest.mark.parametrize("windows", ["time_space", "space_time", "none"])
def test_padding_may_lie_anywhere(windows):
    fusion, streams = _build(windows=windows, layers=2), _streams()
    draw = torch.Generator().manual_seed(3)

    def shuffled(tokens):
        values = tokens.values.clone()
        for clip, mask in enumerate(tokens.mask):
            padded = (~mask).nonzero().flatten()
            values[clip, padded] = torch.randn(len(padded), values.shape[-1], generator=draw) * 100
        return replace(tokens, values=values)

    spoilt = {name: shuffled(tokens) for name, tokens in streams.items()}
    assert torch.equal(fusion(spoilt).feature, fusion(streams).feature)


def test_windows_cost_less():
    """16 x 14 x 14 and 8 x 14 x 14 tokens: as many scores as the windows have pairs."""
    streams = {"semantic": grid_positions(16, 14, 14), "motion": grid_positions(8, 14, 14)}
    scores = {}
    for windows in ("time_space", "none"):
        exchange = BottleneckExchange({"semantic": 16, "motion": 16}, bottleneck=16, heads=2, windows=windows)
        values = {name: torch.zeros(1, len(p), 16) for name, p in streams.items()}
        meeting = exchange.meeting(streams)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            exchange(values, streams, dict.fromkeys(values), meeting, return_attention=True)  # fused kernels are not counted
        per_pair = 2 * 2 * 16  # products and sums of a score and of a value
        linear = 2 * 16 * 16 * (16 * 196 + 8 * 196) * (1 + 1 + 1 + 2 + 1)  # down, query, out, key_value, up
        scores[windows] = (counter.get_total_flops() - linear) / per_pair
    assert scores["none"] == 2 * (16 * 196) * (8 * 196)
    assert scores["time_space"] == 196 * 16 * 8 + 16 * 196 * 196


def test_default_bottleneck_is_half():
    with torch.device("meta"):
        fusion = select.build("fusion", "bcast", widths={"semantic": 768, "motion": 768}, heads=12)
        uneven = select.build("fusion", "bcast", widths={"semantic": 384, "motion": 500})
    assert fusion.layers[0].bottleneck == 384 and fusion.width == 1536
    assert uneven.layers[0].bottleneck == 256 and uneven.width == 884


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 5}, "heads=5 does not divide width=12"),
        ({"heads": 0}, "heads >= 1"),
        ({"bottleneck": 3}, "bottleneck of 6 or more, given 3"),
        ({"dropout": 1.0}, "dropout is a share"),
        ({"layers": 0}, "layers >= 1"),
        ({"windows": "time"}, "option windows is one of 'time_space', 'space_time', 'none'"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        _build(**options)
