"""Exchanges between the blocks of two streams (`placement=blocks`): against plain streams, a slow version, and themselves."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from vidfuse.models import lockstep, select
from vidfuse.models.building import build_recognizer
from vidfuse.models.exchange import StochasticDepth
from vidfuse.models.layers import grid_positions
from vidfuse.models.parts import Interleaved, Stepwise
from vidfuse.models.recognizer import checkpoint_activations, frozen_digest, parameter_table, trainable_state
from vidfuse.presets import get
from vidfuse.train.model import model_of
from vidfuse.train.optim import parameter_groups

VIT = {"name": "vit", "options": {"depth": 2, "frame_stride": 2}}
MAE = {"name": "videomae", "options": {"variant": "vits16", "depth": 2}}
STREAMS = {
    "vit": (VIT, MAE),
    "clip": ({"name": "clip", "options": {"depth": 2, "variant": "vitb32"}}, MAE),
    "dinov2": ({"name": "dinov2", "options": {"depth": 2, "variant": "vits14reg"}}, MAE),
    "dinov3": ({"name": "dinov3", "options": {"depth": 2}}, MAE),
    "vjepa2": (VIT, {"name": "vjepa2", "options": {"depth": 2}}),
}
SIZES = {"dinov2": 112}
"""Pixels that both streams' patches tile, where that is not 32."""


@pytest.fixture
def make(make_recognizer):
    """A recogniser whose streams run in step; `moved` moves its exchanges from where they start."""

    def build(streams="vit", *, moved=True, frames=4, size=None, semantic=None, motion=None, fresh=False, **options):
        a, b = STREAMS[streams]
        model = make_recognizer(
            fresh=fresh,
            frames=frames,
            size=size or SIZES.get(streams, 32),
            semantic=_changed(a, semantic),
            motion=_changed(b, motion),
            fusion={
                "name": "bcast",
                "options": {"placement": "blocks", "bottleneck": 12, "heads": 3, "dropout": 0.0, **options},
            },
        )
        draw = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.fusion.parameters() if moved else ():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
        return model

    return build


def _changed(stream, changes):
    changes = dict(changes or {})
    given = {"frozen": True, "weights": None} | {key: changes.pop(key) for key in ("frozen", "adapters") if key in changes}
    return {**stream, **given, "options": {**stream["options"], **changes}}


def _clips(model=None, size=32, frames=4, count=2):
    return torch.randint(0, 256, (count, frames, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _loss(model, clips):
    torch.manual_seed(11)
    return F.cross_entropy(model(clips), torch.arange(len(clips)) % 5)


def _tokens(model, clips):
    """What the streams give in step, and one after the other."""
    inputs = {name: model.normalize[name](clips, torch.float32) for name in model.streams}
    in_step, _ = lockstep.run_in_step(model.streams, inputs, model.fusion.exchanges, run=lambda step, *a: step(*a))
    return in_step, {name: stream(inputs[name]) for name, stream in model.streams.items()}


@pytest.mark.parametrize("streams", STREAMS)
@torch.no_grad()
def test_untrained_it_is_the_plain_streams(make, streams):
    model = make(streams, moved=False).eval()
    assert isinstance(model.fusion, Interleaved) and all(isinstance(s, Stepwise) for s in model.streams.values())
    in_step, plain = _tokens(model, _clips(size=SIZES.get(streams, 32)))
    for name, tokens in plain.items():
        assert torch.equal(in_step[name].values, tokens.values), name
        assert torch.equal(in_step[name].positions, tokens.positions), name
    moved, _ = _tokens(make(streams).eval(), _clips(size=SIZES.get(streams, 32)))
    assert all((moved[n].values - t.values).abs().max() > 1e-2 for n, t in plain.items()), "exchanges that do nothing"


# The slow version: both halves of a block written out, the second after the exchange.


def _first_half(block, x):
    if hasattr(block, "layernorm_before"):
        return x + block.attention(block.layernorm_before(x))
    return x + block.attn(block.norm1(x))


def _second_half(block, x):
    if hasattr(block, "layernorm_after"):
        return block.output(block.intermediate(block.layernorm_after(x)), x)
    return x + block.mlp(block.norm2(x))


def _slow(model, clips, every, pairs):
    """Tokens of a `vit` with frame_stride=2 and of `videomae`; clip by clip, patches of a clip put together by hand."""
    image, video = model.streams["semantic"], model.streams["motion"]
    result = {"semantic": [], "motion": []}
    for clip in clips:
        frames = model.normalize["semantic"](clip[None, 1::2], torch.float32)[0]  # every second frame, the second of two
        s = image.vit.norm_pre(image.vit._pos_embed(image.vit.patch_embed(frames)))
        m = video.videomae.embeddings(model.normalize["motion"](clip[None], torch.float32), None)
        side = clip.shape[-1] // 16
        positions = dict.fromkeys(("semantic", "motion"), grid_positions(len(frames), side, side))
        blocks = {"semantic": list(image.blocks), "motion": list(video.blocks)}
        exchanges = iter(model.fusion.layers)
        for pair in range(1, pairs + 1):
            group = {n: [b.pop(0) for _ in range(len(b) // (pairs - pair + 1))] for n, b in blocks.items()}
            for block in group["semantic"][:-1]:
                s = _second_half(block, _first_half(block, s))
            for block in group["motion"][:-1]:
                m = _second_half(block, _first_half(block, m))
            s, m = _first_half(group["semantic"][-1], s), _first_half(group["motion"][-1], m)
            layer = next(exchanges, None) if pair % every == 0 else None
            if layer is None:  # left out only where nothing would come of it
                assert pair % every or (pair, image.tokens) == (pairs, "class")
            else:
                patches = {"semantic": torch.cat([frame[1:] for frame in s])[None], "motion": m}
                after, _ = layer(patches, positions, dict.fromkeys(patches), layer.meeting(positions))
                by_frame = after["semantic"][0].split(side**2)
                s = torch.stack([torch.cat([frame[:1], new]) for frame, new in zip(s, by_frame, strict=True)])
                m = after["motion"]
            s, m = _second_half(group["semantic"][-1], s), _second_half(group["motion"][-1], m)
        assert next(exchanges, None) is None
        s = image.vit.norm(s)
        kept = {"all": s, "class": s[:, :1], "patch": s[:, 1:]}[image.tokens]
        result["semantic"].append(torch.cat(list(kept)))
        result["motion"].append(video.videomae.layernorm(m)[0])
    return {name: torch.stack(values) for name, values in result.items()}


@pytest.mark.parametrize("direction", ["both", "semantic_to_motion", "motion_to_semantic"])
@pytest.mark.parametrize(
    ("depths", "every", "tokens"),
    [
        ((2, 2), 1, "all"),
        ((2, 2), 1, "class"),
        ((4, 4), 2, "patch"),
        ((3, 3), 2, "all"),
        ((2, 4), 1, "all"),
        ((4, 2), 1, "class"),
    ],
)
@torch.no_grad()
def test_is_the_slow_version(make, depths, every, tokens, direction):
    model = make(
        semantic={"depth": depths[0], "tokens": tokens}, motion={"depth": depths[1]}, every=every, direction=direction
    ).eval()
    in_step, _ = _tokens(model, _clips())
    slow = _slow(model, _clips(), every, min(depths))
    for name, values in slow.items():
        torch.testing.assert_close(in_step[name].values, values, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_grids_meet_cell_by_cell(make):
    """CLIP sees every second frame of VideoMAE's, as published: one frame for each tubelet."""
    model = make(size=64)
    in_step, _ = _tokens(make(semantic={"tokens": "patch"}), _clips())
    assert torch.equal(in_step["semantic"].positions, in_step["motion"].positions)
    asked = model.eval()(_clips(size=64), return_attention=True)[1]
    assert list(asked) == [f"layer{i}.{name}" for i in range(2) for name in ("semantic_to_motion", "motion_to_semantic")]
    time, space = asked["layer0.semantic_to_motion"][0, 0], asked["layer0.motion_to_semantic"][0, 0]
    assert (time > 0).sum(dim=-1).eq(2).all(), "each patch looks at its own place in both tubelets"
    assert (space > 0).sum(dim=-1).eq(16).all(), "each tubelet looks at all patches of its own frame"
    for weights in asked.values():
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


@pytest.mark.parametrize("streams", STREAMS)
def test_gradients_reach_every_exchange_and_no_frozen_parameter(make, streams):
    model = make(streams).train()
    assert not any(m.training for m in model.streams.modules() if m is not model.streams)
    _loss(model, _clips(size=SIZES.get(streams, 32))).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.streams.parameters())
    for name, parameter in [*model.fusion.named_parameters(), *model.head.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.any(), f"no gradient reaches {name}"


@pytest.mark.parametrize(
    ("direction", "readers"),
    [
        ("both", [["motion", "semantic"], ["motion"]]),
        ("semantic_to_motion", [["semantic"]]),
        ("motion_to_semantic", [["motion"], ["motion"]]),
    ],
)
def test_a_reader_whose_reading_would_be_lost_is_not_built(make, direction, readers):
    """Of a stream that ends in its class tokens, patches' last reading goes nowhere."""
    model = make(semantic={"tokens": "class"}, direction=direction).train()
    assert [sorted(layer.up) for layer in model.fusion.layers] == readers
    _loss(model, _clips()).backward()
    unreached = [n for n, p in model.fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unreached


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_is_plain(make, trained, every):
    """Losses and gradients over some steps, with dropout and stochastic depth; frozen streams' blocks are computed again, too."""
    options = {"dropout": 0.1, "stochastic_depth": 0.5, "every": every}
    plain = make(semantic={"frozen": not trained}, **options)
    checkpointed = copy.deepcopy(plain)
    assert checkpoint_activations(checkpointed) == checkpoint_activations(checkpointed) == {1: 2, 2: 3}[every]
    curves = []
    for model in (plain, checkpointed):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        curves.append([])
        for _ in range(3):
            loss = _loss(model.train(), _clips())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves[-1].append(loss.item())
    assert curves[0] == curves[1] and len(set(curves[0])) == 3
    for (name, a), (other, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad), name


@pytest.mark.parametrize("streams", ["vit", "dinov3", "vjepa2"])
def test_adapters_in_the_blocks_are_trained(make, streams):
    """They sit where the exchange does: after the attention, and in the half that follows."""
    adapted = {"adapters": {"ratio": 0.05}}
    plain = make(streams, semantic={**adapted, "tokens": "class"}, motion=adapted, dropout=0.1)
    with torch.no_grad():
        without = make(streams, semantic={"tokens": "class"}, dropout=0.1).eval()
        assert torch.equal(plain.eval()(_clips()), without(_clips())), "untrained adapters change something"
        draw = torch.Generator().manual_seed(6)
        for parameter in plain.streams.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        assert not torch.equal(plain(_clips()), without(_clips()))
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    losses = [_loss(model.train(), _clips()) for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert any(name.startswith("streams.semantic") for name in trained)
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (a.grad is not None) == (name in trained), name
        assert a.grad is None or (a.grad.any() and torch.equal(a.grad, b.grad)), name


def test_checkpointing_keeps_fewer_activations(make):
    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            loss = _loss(model.train(), _clips(size=64))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        del loss
        return sum(size for at, size in sizes.items() if at not in parameters)

    plain = make(size=64)
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed)
    assert kept(checkpointed) < kept(plain) / 4


def test_computed_again_in_training_only(make, monkeypatch):
    model, calls = make(), []
    checkpoint_activations(model)
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("vidfuse.models.recognizer.checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    with torch.no_grad():
        model.train()(_clips())
    model.eval()(_clips())
    assert not calls
    model.train()(_clips())
    assert len(calls) == 2


def test_a_trained_stream_is_trained(make):
    model = make(semantic={"frozen": False}).train()
    _loss(model, _clips()).backward()
    assert all(p.grad is not None for p in model.streams["semantic"].parameters())
    assert all(p.grad is None for p in model.streams["motion"].parameters())


@pytest.mark.parametrize("streams", STREAMS)
def test_modules_that_own_parameters_are_called(make, streams):
    """ZeRO-3 gathers a module's own parameters when the module is called; reached past its call they are empty."""
    model, running = make(streams), []
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: running.append(module))
    called = set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: called.add(id(running.pop())))
    with torch.no_grad():
        model.eval()(_clips(size=SIZES.get(streams, 32)))
    names = {name: module for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    assert not running and not [name for name, module in names.items() if id(module) not in called]


def test_streams_have_the_state_of_plain_ones(make, make_recognizer):
    model = make(fresh=True)
    late = make_recognizer(
        fresh=True,
        semantic=_changed(VIT, None),
        motion=_changed(MAE, None),
        fusion={"name": "bcast", "options": {"bottleneck": 12, "heads": 3}},
    )
    assert frozen_digest(model) == frozen_digest(late), "names or values of the streams differ"
    state = trainable_state(model)
    assert set(state) == {n for n, p in model.named_parameters() if p.requires_grad}
    twin = make(moved=False)
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("streams.") for name in missing)
    assert torch.equal(twin.eval()(_clips()), model.eval()(_clips()))


@pytest.mark.parametrize("name", ["clip", "dinov2", "dinov3", "vit"])
def test_a_whole_file_fits_a_transformer_of_fewer_blocks(name):
    size, options = {"dinov2": 28}.get(name, 32), {"clip": {"variant": "vitb32"}}.get(name, {})
    whole = select.build("backbones", name, frames=1, size=size, **options)
    short = select.build("backbones", name, frames=1, size=size, depth=2, **options)
    published = {key.removeprefix("vit."): value for key, value in whole.state_dict().items()}
    short.load_state_dict(short.published_state(published), strict=True)
    assert len(whole.blocks) == 12 and [len(short.blocks), len(short.vit.blocks)] == [2, 2]
    for key, value in short.state_dict().items():
        assert torch.equal(value, whole.state_dict()[key])


@torch.no_grad()
def test_a_frame_stands_for_those_of_its_stride():
    every, second = (select.build("backbones", "vit", frames=n, size=32, depth=1, frame_stride=s) for n, s in ((2, 1), (4, 2)))
    every.load_state_dict(second.state_dict())
    clip = torch.randn(2, 4, 3, 32, 32)
    tokens, want = second.eval()(clip), every.eval()(clip[:, [1, 3]])
    assert torch.equal(tokens.values, want.values) and torch.equal(tokens.positions, want.positions)


def test_runs_in_several_threads_at_once(make):
    """A service may: where an exchange hooks in is of its own thread."""
    model, clips, got = make().eval(), [_clips() + i for i in range(4)], {}

    def run(i):
        with torch.no_grad():
            got[i] = [model(clips[i]) for _ in range(8)]

    want = [model(c).detach() for c in clips]
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(logits, want[i]) for i in range(4) for logits in got[i])
    assert not [m for m in model.streams.modules() if m._forward_hooks], "hooks are left behind"


@pytest.mark.parametrize("cast", [False, True])
def test_computes_in_bfloat16(make, cast):
    """Parameters cast, buffers not, as DeepSpeed does; and autocast."""
    model = make()
    want = model.eval()(_clips()).detach()
    if cast:
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    checkpoint_activations(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        loss = _loss(model.train(), _clips())
    loss.backward()
    assert all(p.grad is not None for p in model.fusion.parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=not cast):
        torch.testing.assert_close(model.eval()(_clips()), want, rtol=0.1, atol=0.1)


def test_the_preset_is_the_published_size():
    """Exchanges have the published block's parameters without its tables of positions (see test_bcast), 12 of them in 12 pairs of
    blocks; the last one's reading by CLIP's patches is lost and not built. Two adapters a block, down to a quarter."""
    with torch.device("meta"):
        model = model_of(get("ssv2_cast"))
        assert model(torch.empty(1, 16, 3, 224, 224, dtype=torch.uint8)).shape == (1, 174)
    d, low = 768, 384
    shared = 2 * (d * low + low + 2 * low)
    reader = (low * low + low) + (low * 2 * low + 2 * low) + (low * low + low) + (low * d + d)
    table = {part.name: part.trainable for part in parameter_table(model)}
    norms, head = 2 * 2 * d, 174 * 2 * d + 174
    adapters = 12 * 2 * (d * (d // 4) + d // 4 + (d // 4) * d + d)
    assert table == {
        "semantic": adapters,
        "motion": adapters,
        "fusion": 12 * (shared + 2 * reader) - reader + norms,
        "head": head,
    }
    assert len(model.fusion.exchanges) == 12 and list(model.fusion.exchanges) == list(range(1, 13))
    rates = [layer.drop[1].rate for layer in model.fusion.layers]
    assert rates[0] == 0 and rates == sorted(rates) and rates[-1] == pytest.approx(0.3)


def test_stochastic_depth_leaves_out_whole_clips():
    torch.manual_seed(0)
    branch = torch.ones(4000, 2, 3)
    drop = StochasticDepth(0.3)
    out = drop.train()(branch)
    assert torch.equal(drop.eval()(branch), branch)
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.7]) and (out == out[:, :1, :1]).all()
    assert (out[:, 0, 0] == 0).float().mean() == pytest.approx(0.3, abs=0.03)  # four deviations of 4000 draws


def test_layer_decay_counts_pairs(make):
    model = make(semantic={"depth": 4, "frozen": False}, motion={"depth": 2})
    groups = parameter_groups(model, layer_decay=0.5)
    share = {id(p): group.share for group, parameters in groups.items() for p in parameters}
    assert [{share[id(p)] for p in layer.parameters()} for layer in model.fusion.layers] == [{0.25}, {0.5}]
    assert {share[id(p)] for p in model.head.parameters()} == {1.0}


def test_pairs_are_of_equal_relative_depth():
    assert lockstep.paired({"a": 2, "b": 4}) == [{"a": range(1), "b": range(2)}, {"a": range(1, 2), "b": range(2, 4)}]
    assert lockstep.paired({"a": 3, "b": 3})[2] == {"a": range(2, 3), "b": range(2, 3)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"semantic": {"depth": 3}}, r"one number is a multiple of the other, given 3 \(semantic\) and 2 \(motion\)"),
        ({"every": 3}, "every=3 leaves no exchange that counts in 2 pairs"),
        (
            {"every": 2, "direction": "semantic_to_motion", "semantic": {"tokens": "class"}},
            "every=2 leaves no exchange that counts",
        ),
        ({"every": 0}, "every >= 1 and heads >= 1 are needed, given layers=1, every=0"),
        ({"layers": 2}, "layers is of placement=late, given layers=2"),
        ({"placement": "late", "every": 2}, "every is of placement=blocks, given every=2"),
        ({"stochastic_depth": 1.0}, "stochastic_depth is a share"),
        ({"semantic": {"frame_stride": 3}}, "frame_stride=3 does not divide 4 frames; those that do: 1, 2, 4"),
        ({"semantic": {"depth": 13}}, "1 to 12 of this variant"),
    ],
)
def test_refuses(make, change, said):
    with pytest.raises(ValueError, match=said):
        make(**change)


def test_says_which_backbones_can(make_recognizer):
    with pytest.raises(ValueError, match=r"motion \(VideoResNet\) cannot; backbones that can: (.*)\. placement=late") as error:
        make_recognizer(semantic=_changed(VIT, None), fusion={"name": "bcast", "options": {"placement": "blocks"}})
    listed = str(error.value).partition("can: ")[2].partition(".")[0].split(", ")
    assert listed == ["clip", "dinov2", "dinov3", "videomae", "vit", "vjepa2"]
    with pytest.raises(ValueError, match="none given cannot"):
        select.build("fusion", "bcast", widths={"semantic": 24, "motion": 24}, placement="blocks")
    with pytest.raises(ValueError, match="joins two streams"):
        build_recognizer(classes=3, frames=4, size=32, motion=MAE, fusion={"name": "bcast", "options": {"placement": "blocks"}})


def test_a_stream_cannot_wait(make):
    model = make(semantic={"frozen": False})
    model.hold([])
    with pytest.raises(ValueError, match="semantic cannot wait for a later epoch"):
        model.hold(["semantic"])
