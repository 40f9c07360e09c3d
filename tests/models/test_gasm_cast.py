"""GASM-CAST: its graphs edge by edge, graph attention against an obvious loop and against plain attention."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vidfuse.models import select
from vidfuse.models.attention import Attention
from vidfuse.models.exchange import windows_along
from vidfuse.models.fusion.gasm_cast import GraphAttention
from vidfuse.models.layers import frame_positions, grid_positions
from vidfuse.models.parts import Tokens

WIDTHS = {"semantic": 12, "motion": 8}


def _build(**options):
    torch.manual_seed(0)
    given = {"bottleneck": 12, "heads": 2, "layers": 2, **options}
    fusion = select.build("fusion", "gasm_cast", widths=WIDTHS, **given)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return fusion.eval()


def _streams(*, masked=True, motion_grid=(5, 1, 2)):
    draw = torch.Generator().manual_seed(1)
    positions = {"semantic": frame_positions(3, 2, 2), "motion": grid_positions(*motion_grid)}
    streams = {}
    for name, at in positions.items():
        values = 1.5 * torch.randn(2, 1, WIDTHS[name], generator=draw) + torch.randn(2, len(at), WIDTHS[name], generator=draw)
        mask = torch.rand(2, len(at), generator=draw) < 0.7 if masked else None
        streams[name] = Tokens(values, at, mask)
    return streams


def _cosine(x, y):
    return float(sum(x * y)) / math.sqrt(float(sum(x * x))) / math.sqrt(float(sum(y * y)))


def _joined(name, tokens, clip, i, j, *, similarity, time_reach):
    """Whether token i may look at token j."""
    p, q = tokens.positions[i].tolist(), tokens.positions[j].tolist()
    if tokens.mask is not None and not tokens.mask[clip, j]:
        return False
    if i == j:
        return True
    if name == "semantic":
        return p[0] == q[0] and _cosine(tokens.values[clip, i], tokens.values[clip, j]) >= similarity
    times = sorted(set(tokens.positions[:, 0].tolist()))
    return p[1:] == q[1:] and abs(times.index(p[0]) - times.index(q[0])) <= time_reach


def _graph(module, name, tokens, **limits):
    """Values after graph attention, token by token, and the weights [B, h, N, N]."""
    attention, count, width = module.attention, len(tokens.positions), tokens.values.shape[-1]
    d = width // attention.heads
    after, seen = tokens.values.clone(), torch.zeros(2, attention.heads, count, count)
    for clip in range(2):
        normed = [module.norm(v) for v in tokens.values[clip]]
        for i in range(count):
            if tokens.mask is not None and not tokens.mask[clip, i]:
                continue
            neighbours = [j for j in range(count) if _joined(name, tokens, clip, i, j, **limits)]
            query, read = attention.query(normed[i]), torch.zeros(width)
            for head in range(attention.heads):
                part = slice(head * d, (head + 1) * d)
                pairs = {j: attention.key_value(normed[j]) for j in neighbours}
                exps = {j: math.exp(float(query[part] @ kv[:width][part]) / math.sqrt(d)) for j, kv in pairs.items()}
                for j in neighbours:
                    weight = exps[j] / sum(exps.values())
                    seen[clip, head, i, j] = weight
                    read[part] += weight * pairs[j][width:][part]
            after[clip, i] = tokens.values[clip, i] + attention.out(read)
    return after, seen


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("similarity", "time_reach"), [(0.8, 2), (0.6, 1), (-1.0, 9), (1.0, 0)])
@torch.no_grad()
def test_graphs_are_the_loop(masked, similarity, time_reach):
    limits = {"similarity": similarity, "time_reach": time_reach}
    fusion, streams = _build(**limits), _streams(masked=masked)
    plain, asked = fusion(streams), fusion(streams, return_attention=True)
    positions = {n: s.positions for n, s in streams.items()}
    masks = {n: s.mask for n, s in streams.items()}
    values, edges = {}, 0
    for name, graph in fusion.graphs.items():
        values[name], seen = _graph(graph, name, streams[name], **limits)
        real = slice(None) if masks[name] is None else masks[name]
        got = asked.attention[f"graph.{name}_to_{name}"].movedim(1, 2)[real]
        torch.testing.assert_close(got, seen.movedim(1, 2)[real], rtol=1e-4, atol=1e-5)
        edges += int((seen > 0).sum())
    assert edges > 0
    for layer in fusion.layers:  # held to a loop in test_bcast
        values, _ = layer(values, positions, masks, layer.meeting(positions))
    pooled = []
    for name, norm in fusion.norm.items():
        real = torch.ones(values[name].shape[:2]) if masks[name] is None else masks[name].float()
        pooled.append((norm(values[name]) * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    for fused in (plain, asked):
        torch.testing.assert_close(fused.feature, torch.cat(pooled, dim=-1), rtol=1e-4, atol=1e-5)


def test_threshold_and_reach_choose():
    """The limits of the loop test are no formality: graphs between none and all of their edges."""
    tokens = _streams(masked=False)
    counts = {}
    for similarity, time_reach in ((1.0, 0), (0.8, 2), (-1.0, 9)):
        seen = _build(similarity=similarity, time_reach=time_reach)(tokens, return_attention=True).attention
        for name in WIDTHS:
            counts.setdefault(name, []).append(int((seen[f"graph.{name}_to_{name}"][:, 0] > 0).sum()))
    assert counts["semantic"][0] == 2 * 15 and counts["semantic"][2] == 2 * 3 * 5 * 5
    assert counts["motion"] == [2 * 10, 2 * 2 * (3 + 4 + 5 + 4 + 3), 2 * 2 * 5 * 5]
    assert counts["semantic"][0] < counts["semantic"][1] < counts["semantic"][2]


@pytest.mark.parametrize("name", ["semantic", "motion"])
@torch.no_grad()
def test_of_a_complete_graph_it_is_plain_attention(name):
    """One frame, or one place: then all tokens are one group."""
    torch.manual_seed(0)
    fusion = _build(similarity=-1.0, time_reach=100)
    positions = grid_positions(1, 3, 3) if name == "semantic" else grid_positions(9, 1, 1)
    mask = torch.rand(2, 9) < 0.7
    tokens = Tokens(torch.randn(2, 9, WIDTHS[name]), positions, mask)
    windows, edges = fusion._spatial(tokens) if name == "semantic" else fusion._temporal(tokens)
    graph = fusion.graphs[name]
    plain = Attention(WIDTHS[name], graph.attention.heads)
    plain.load_state_dict(graph.attention.state_dict())
    for asked in (True, False):
        got, seen = graph(tokens.values, mask, windows, edges, return_attention=asked)
        normed = graph.norm(tokens.values)
        want, weights = plain(normed, normed, mask, return_attention=asked)
        torch.testing.assert_close(got, tokens.values + want, rtol=1e-5, atol=1e-6)
        assert not asked or torch.allclose(seen, weights, atol=1e-6)


@torch.no_grad()
def test_alone_a_token_reads_itself():
    module, x = GraphAttention(8, 2, 0.0).eval(), torch.randn(1, 6, 8)
    positions = grid_positions(2, 1, 3)
    windows = windows_along(positions, positions, "space")
    edges = [(w.queries[:, :, None] == w.keys[:, None])[None] for w in windows]
    got, _ = module(x, None, windows, edges)
    value = module.attention.key_value(module.norm(x))[..., 8:]
    torch.testing.assert_close(got, x + module.attention.out(value))


def test_order_of_the_segments_counts_and_order_of_the_tokens_does_not():
    fusion, streams = _build(), _streams(masked=False)
    order = torch.arange(9, -1, -1)
    motion = streams["motion"]
    listed = {**streams, "motion": Tokens(motion.values[:, order], motion.positions[order])}
    backwards = {**streams, "motion": Tokens(motion.values, motion.positions[order])}
    want = fusion(streams).feature
    torch.testing.assert_close(fusion(listed).feature, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fusion(backwards).feature, want, atol=1e-2)


def test_similarity_does_not_depend_on_the_scale_of_features():
    fusion, streams = _build(), _streams(masked=False)
    windows = {}
    for scale in (1e-3, 1.0, 1e3):
        tokens = streams["semantic"]
        windows[scale] = fusion._spatial(Tokens(tokens.values * scale, tokens.positions))[1]
    assert all(torch.equal(a, b) for s in (1e-3, 1e3) for a, b in zip(windows[s], windows[1.0], strict=True))


def test_default_is_the_plans():
    with torch.device("meta"):
        fusion = select.build("fusion", "gasm_cast", widths={"semantic": 768, "motion": 512})
    assert (fusion.similarity, fusion.time_reach, len(fusion.layers), fusion.width) == (0.8, 2, 3, 768 + 512)
    exchanges = {(layer.bottleneck, attention.heads) for layer in fusion.layers for attention in layer.attention.values()}
    assert exchanges == {(256, 8)}
    assert {name: graph.attention.heads for name, graph in fusion.graphs.items()} == {"semantic": 8, "motion": 8}
    assert [tuple(layer.attention) for layer in fusion.layers] == [("semantic_to_motion", "motion_to_semantic")] * 3


def test_the_bottleneck_halves_the_cost_of_crossing():
    """The plan's claim, for its tokens (16 x 14 x 14 of 768, 8 of 512): exchanges of 256 against exchanges of 512."""
    cost = {}
    for bottleneck in (256, 512):
        with torch.device("meta"):
            fusion = select.build("fusion", "gasm_cast", widths={"semantic": 768, "motion": 512}, bottleneck=bottleneck)
            layer = fusion.layers[0]
        positions = {"semantic": grid_positions(16, 14, 14), "motion": grid_positions(8, 1, 1)}
        meeting = layer.meeting(positions)
        values = {n: torch.empty(1, len(p), {"semantic": 768, "motion": 512}[n], device="meta") for n, p in positions.items()}
        at = {n: p.to("meta") for n, p in positions.items()}
        with FlopCounterMode(display=False) as counter:
            layer(values, at, dict.fromkeys(values), meeting, return_attention=True)  # fused kernels are not counted
        cost[bottleneck] = counter.get_total_flops()
    assert cost[256] < 0.5 * cost[512]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"similarity": 1.5}, "similarity in -1..1"),
        ({"time_reach": -1}, "time_reach >= 0"),
        ({"layers": 0}, "layers >= 1"),
        ({"heads": 5}, "heads=5 does not divide width=12"),
        ({"graph_heads": 6}, "heads=6 does not divide width=8"),
        ({"dropout": 1.0}, "dropout is a share"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        _build(**options)
