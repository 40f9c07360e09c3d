"""Element-wise, gated and recurrent fusion against their equations, written out."""

import math

import pytest
import torch
from torch import nn

from vidfuse.models import select
from vidfuse.models.layers import frame_positions, grid_positions
from vidfuse.models.parts import Tokens

WIDTHS = {"semantic": 5, "motion": 7}


def _means(streams):
    """Mean of the real tokens, clip by clip."""
    return {
        name: [sum(v for v, real in zip(s.values[c], s.mask[c], strict=True) if real) / int(s.mask[c].sum()) for c in range(2)]
        for name, s in streams.items()
    }


def _streams():
    draw = torch.Generator().manual_seed(1)
    return {
        n: Tokens(
            torch.randn(2, k, d, generator=draw), grid_positions(k, 1, 1), torch.tensor([[1] * (k - 1) + [0], [1] * k]) > 0
        )
        for n, k, d in (("semantic", 3, 5), ("motion", 4, 7))
    }


@pytest.mark.parametrize("operation", ["sum", "product"])
@torch.no_grad()
def test_elementwise_is_its_operation(operation):
    fusion, streams = select.build("fusion", "elementwise", widths=WIDTHS, width=6, operation=operation), _streams()
    means = _means(streams)
    for clip, got in enumerate(fusion(streams).feature):
        s, m = (fusion.project[name](means[name][clip]) for name in ("semantic", "motion"))
        want = [float(a) + float(b) if operation == "sum" else float(a) * float(b) for a, b in zip(s, m, strict=True)]
        torch.testing.assert_close(got, torch.tensor(want))


@pytest.mark.parametrize("order", [("semantic", "motion"), ("motion", "semantic")])
@torch.no_grad()
def test_gated_is_the_published_unit(order):
    """Arevalo et al. 2017, equations 1-4: hv, ht, z, h."""
    torch.manual_seed(0)
    fusion = select.build("fusion", "gated", widths={n: WIDTHS[n] for n in order}, width=6)
    streams = _streams()
    means = _means(streams)
    assert not [name for name, _ in fusion.named_parameters() if "bias" in name]
    for clip, got in enumerate(fusion(streams).feature):
        v, t = means["semantic"][clip].tolist(), means["motion"][clip].tolist()
        for i in range(6):
            hv = math.tanh(sum(w * x for w, x in zip(fusion.hidden["semantic"].weight[i].tolist(), v, strict=True)))
            ht = math.tanh(sum(w * x for w, x in zip(fusion.hidden["motion"].weight[i].tolist(), t, strict=True)))
            z = 1 / (1 + math.exp(-sum(w * x for w, x in zip(fusion.gate.weight[i].tolist(), v + t, strict=True))))
            assert float(got[i]) == pytest.approx(z * hv + (1 - z) * ht, abs=1e-6)


@pytest.mark.parametrize(("name", "options"), [("elementwise", {"width": 0}), ("gated", {"width": 0})])
def test_no_width_is_refused(name, options):
    with pytest.raises(ValueError, match="width >= 1"):
        select.build("fusion", name, widths=WIDTHS, **options)


def _rnn(**options):
    torch.manual_seed(0)
    fusion = select.build("fusion", "temporal_rnn", widths={"motion": 6}, **{"hidden": 4, "attention_width": 3, **options})
    for parameter in fusion.parameters():
        nn.init.normal_(parameter, std=0.5)
    return fusion.eval()


def _frames(*, masked=True):
    """Three frames of a class token and two patches; in the first clip a frame has one real token and one has none."""
    values = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 0], [1] * 9]) > 0
    return Tokens(values, frame_positions(3, 1, 2), mask if masked else None)


def _lstm(lstm, sequence, suffix):
    """Hochreiter and Schmidhuber's cell with a forget gate, as `nn.LSTM` documents it: states in the order of the sequence."""
    w_in, w_state = getattr(lstm, f"weight_ih_l0{suffix}"), getattr(lstm, f"weight_hh_l0{suffix}")
    bias = getattr(lstm, f"bias_ih_l0{suffix}") + getattr(lstm, f"bias_hh_l0{suffix}")
    h = c = torch.zeros(lstm.hidden_size)
    states = []
    for x in sequence:
        i, f, g, o = (w_in @ x + w_state @ h + bias).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return states


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@torch.no_grad()
def test_temporal_rnn_is_the_loop(masked, attention, bidirectional):
    fusion, tokens = _rnn(attention=attention, bidirectional=bidirectional), _frames(masked=masked)
    fused = fusion({"motion": tokens}, return_attention=True)
    assert fusion.width == 4 * (1 + bidirectional) and set(fused.attention) == (
        {"time.motion_to_motion"} if attention else set()
    )
    for clip in range(2):
        real = [[i for i in range(3 * t, 3 * t + 3) if not masked or tokens.mask[clip, i]] for t in range(3)]
        frames = [sum(tokens.values[clip, i] for i in members) / len(members) for members in real if members]
        states = _lstm(fusion.lstm, frames, "")
        if bidirectional:
            back = _lstm(fusion.lstm, frames[::-1], "_reverse")[::-1]
            states = [torch.cat(pair) for pair in zip(states, back, strict=True)]
        reads = states
        if attention:
            reads, reader = [], fusion.attention
            rows = iter(members for members in real if members)
            for state in states:
                query = reader.query(state)
                exps = [math.exp(float(query @ reader.key(other)) / math.sqrt(3)) for other in states]
                reads.append(sum(e / sum(exps) * reader.value(other) for e, other in zip(exps, states, strict=True)))
                want = torch.zeros(9)
                for e, members in zip(exps, (m for m in real if m), strict=True):
                    want[members] = e / sum(exps) / len(members)
                for i in next(rows):
                    torch.testing.assert_close(fused.attention["time.motion_to_motion"][clip, 0, i], want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fused.feature[clip], sum(reads) / len(reads), rtol=1e-4, atol=1e-5)


def test_order_comes_from_positions():
    fusion, tokens = _rnn(), _frames()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    want = fusion({"motion": tokens}).feature
    listed = Tokens(tokens.values[:, order], tokens.positions[order], tokens.mask[:, order])
    torch.testing.assert_close(fusion({"motion": listed}).feature, want, rtol=1e-5, atol=1e-6)
    backwards = tokens.positions.clone()
    backwards[:, 0] = 1 - backwards[:, 0]
    other = fusion({"motion": Tokens(tokens.values, backwards, tokens.mask)}).feature
    assert not torch.allclose(other[1], want[1], atol=1e-3)


def test_temporal_rnns_default_is_the_plans():
    with torch.device("meta"):
        fusion = select.build("fusion", "temporal_rnn", widths={"motion": 512})
    lstm, attention = fusion.lstm, fusion.attention
    assert (lstm.hidden_size, lstm.num_layers, lstm.bidirectional, fusion.drop.p, fusion.width) == (256, 1, True, 0.3, 512)
    assert [m.out_features for m in (attention.query, attention.key, attention.value)] == [256, 256, 512]
    gates = 4 * (512 * 256 + 256 * 256 + 2 * 256)
    heads = 2 * (512 * 256 + 256) + 512 * 512 + 512
    assert sum(p.numel() for p in fusion.parameters()) == 2 * gates + heads


@pytest.mark.parametrize(
    ("widths", "options", "said"),
    [
        (WIDTHS, {}, "takes one stream, given semantic and motion"),
        ({"motion": 6}, {"hidden": 0}, "hidden >= 1"),
        ({"motion": 6}, {"attention_width": 0}, "attention_width >= 1"),
        ({"motion": 6}, {"dropout": 1.0}, "dropout is a share"),
    ],
)
def test_temporal_rnn_refuses(widths, options, said):
    with pytest.raises(ValueError, match=said):
        select.build("fusion", "temporal_rnn", widths=widths, **options)
