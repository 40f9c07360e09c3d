"""The contract of `fusion/`, over every file in it."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch

from vidfuse.models import select
from vidfuse.models.layers import grid_positions
from vidfuse.models.parts import Fusion, Tokens
from vidfuse.models.recognizer import LinearHead, Recognizer, checkpoint_activations

NAMES = select.names("fusion")
WIDTHS = {"semantic": 24, "motion": 16}


@pytest.fixture(params=NAMES)
def fusion(request):
    """With parameters moved from where they start: a branch that starts at zero would hide whatever is behind it."""
    torch.manual_seed(0)
    fusion = _build(request.param)
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return fusion


def _build(name):
    """The fusion of both streams, or of motion if it says that it takes one (which it finds among those of a call)."""
    try:
        return select.build("fusion", name, widths=WIDTHS)
    except ValueError as error:
        assert "takes one stream, given semantic and motion" in str(error)
        return select.build("fusion", name, widths={"motion": WIDTHS["motion"]})


def _streams(seed=1, *, masked=True):
    """Tokens of a clip have something in common, as a backbone's have: cosine similarities are around 0.8."""
    draw = torch.Generator().manual_seed(seed)
    grids = {"semantic": (3, 2, 2), "motion": (2, 1, 2)}
    streams = {}
    for name, grid in grids.items():
        positions = grid_positions(*grid)
        common = 2 * torch.randn(2, 1, WIDTHS[name], generator=draw)
        values = common + torch.randn(2, len(positions), WIDTHS[name], generator=draw)
        mask = torch.ones(2, len(positions), dtype=torch.bool)
        mask[0, -1] = mask[1, 1] = mask[1, -1] = False
        streams[name] = Tokens(values, positions, mask if masked else None)
    return streams


def _with(streams, change):
    return {name: change(tokens) for name, tokens in streams.items()}


def test_the_folder_holds_what_the_issue_names():
    assert {"mean", "concat", "cross_attention"} <= set(NAMES)


@pytest.mark.parametrize("masked", [True, False])
def test_gives_a_feature_and_attention_if_asked(fusion, masked):
    assert isinstance(fusion, Fusion)
    fusion.eval()
    streams = _streams(masked=masked)
    plain, again, asked = fusion(streams), fusion(streams), fusion(streams, return_attention=True)
    assert plain.feature.shape == (2, fusion.width) and not plain.attention
    assert torch.equal(plain.feature, again.feature), "not deterministic in eval"
    torch.testing.assert_close(plain.feature, asked.feature, rtol=1e-5, atol=1e-6)
    for name, weights in asked.attention.items():
        queries, keys = name.split(".")[-1].split("_to_")
        assert weights.shape[::2] == (2, streams[queries].values.shape[1])
        total = weights.sum(dim=-1)
        looking = total > 0
        torch.testing.assert_close(total, looking.float())
        assert looking.any() and (masked or looking.all()), "only where nothing real is to be seen may a query see nothing"
        if masked:
            assert not weights.masked_select(~streams[keys].mask[:, None, None]).any(), "padding is looked at"


def test_checkpointed_is_plain_and_gradients_reach_every_parameter(fusion):
    plain = Recognizer({}, fusion, LinearHead(fusion.width, 3))
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    losses = []
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(5)  # dropout is on: recomputation has to draw the same
        loss = model.head(model.fusion(_streams()).feature).square().sum()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, a), (other, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert name == other
        assert a.grad is not None and a.grad.isfinite().all() and a.grad.any(), f"no gradient reaches {name}"
        assert torch.equal(a.grad, b.grad)


def test_modules_that_own_parameters_are_called(fusion):
    """ZeRO-3 gathers a module's own parameters when the module is called; reached past its call they are empty."""
    called = set()
    for name, module in fusion.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
    fusion(_streams())
    owners = {name.rpartition(".")[0] for name, _ in fusion.named_parameters()}
    assert owners <= called, f"never called: {sorted(owners - called)}"


def test_state_goes_round(fusion):
    other = copy.deepcopy(fusion)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.load_state_dict(fusion.state_dict(), strict=True)
    assert torch.equal(other.eval()(_streams()).feature, fusion.eval()(_streams()).feature)


@pytest.mark.parametrize("rubbish", [0.0, 1e4, float("nan"), float("inf")])
def test_what_is_masked_changes_nothing(fusion, rubbish):
    streams = _streams()
    spoilt = _with(streams, lambda t: replace(t, values=t.values.masked_fill(~t.mask[..., None], rubbish)))
    want, got = (fusion.eval()(s, return_attention=True) for s in (streams, spoilt))
    assert torch.equal(got.feature, want.feature)
    real = {name: tokens.mask for name, tokens in streams.items()}
    for name, weights in want.attention.items():
        rows = real[name.split(".")[-1].split("_to_")[0]]
        assert torch.equal(got.attention[name].movedim(2, 1)[rows], weights.movedim(2, 1)[rows])


def test_permuting_tokens_changes_nothing(fusion):
    """Padded or not: a stream is a set of tokens with places."""
    streams = _streams()

    def permute(tokens):
        order = torch.randperm(len(tokens.positions), generator=torch.Generator().manual_seed(7))
        return Tokens(tokens.values[:, order], tokens.positions[order], tokens.mask[:, order])

    torch.testing.assert_close(fusion.eval()(_with(streams, permute)).feature, fusion(streams).feature, rtol=1e-5, atol=1e-6)


def test_masked_is_left_out(fusion):
    streams = _with(_streams(), lambda t: replace(t, mask=torch.arange(len(t.positions)).expand(2, -1) < 2))
    short = _with(streams, lambda t: Tokens(t.values[:, :2], t.positions[:2]))
    torch.testing.assert_close(fusion.eval()(streams).feature, fusion(short).feature, rtol=1e-5, atol=1e-6)


def test_a_clip_without_a_real_token_is_a_number(fusion):
    streams = _streams()
    streams["motion"].mask[0] = False
    fused = [fusion.train()(streams, return_attention=asked).feature for asked in (False, True)]
    sum(f.sum() for f in fused).backward()
    assert all(f.isfinite().all() for f in fused)
    assert all(p.grad.isfinite().all() for p in fusion.parameters() if p.grad is not None)


def test_works_when_an_engine_casts_it(fusion):
    fused = fusion.bfloat16().eval()(_with(_streams(), lambda t: replace(t, values=t.values.bfloat16())), return_attention=True)
    assert fused.feature.dtype == torch.bfloat16
    assert all(w.dtype == torch.float32 for w in fused.attention.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masked", [True, False])
def test_builds_and_runs_without_memory(name, masked):
    streams = _with(_streams(masked=masked), lambda t: replace(t, values=t.values.to("meta")))
    streams = _with(streams, lambda t: replace(t, mask=None if t.mask is None else t.mask.to("meta")))
    with torch.device("meta"):
        fusion = _build(name)
        feature = fusion(streams).feature
    assert feature.is_meta and feature.shape == (2, fusion.width)


@pytest.mark.parametrize("name", NAMES)
def test_one_stream_works_or_says_that_two_are_needed(name):
    try:
        fusion = select.build("fusion", name, widths={"motion": 16})
    except ValueError as error:
        assert "two streams" in str(error) and "given motion" in str(error)
    else:
        assert fusion({"motion": _streams()["motion"]}).feature.shape == (2, fusion.width)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_documented(name):
    doc = importlib.import_module(f"vidfuse.models.fusion.{name}").build.__doc__
    assert all(f"{option}: " in doc for option in select.options("fusion", name))


def test_mean_without_projection_is_the_plain_mean():
    streams = {name: Tokens(torch.randn(2, n, 6), grid_positions(n, 1, 1)) for name, n in (("semantic", 4), ("motion", 3))}
    fusion = select.build("fusion", "mean", widths={"semantic": 6, "motion": 6}, width=None)
    assert not list(fusion.parameters())
    want = (streams["semantic"].values.mean(1) + streams["motion"].values.mean(1)) / 2
    torch.testing.assert_close(fusion(streams).feature, want)
    with pytest.raises(ValueError, match=r"semantic 24, motion 16.*give it a width"):
        select.build("fusion", "mean", widths=WIDTHS, width=None)
