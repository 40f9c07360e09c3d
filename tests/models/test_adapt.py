"""Adapters, LoRA and stochastic depth: exactness untrained, slow versions, counts, what is trained, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from vidfuse.models import adapt, select
from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import checkpoint_activations, frozen_digest, parameter_table, trainable_state

FRAMES, SIZE = 4, 32
VITS = {
    "clip": {},
    "vit": {},
    "dinov2": {},
    "dinov3": {},
    "videomae": {"variant": "vits16", "depth": 2},
    "timesformer": {"depth": 2},
    "vjepa2": {"depth": 2},
}
"""Every backbone that takes adapters, with options that make it small."""
TIMM = {"clip", "vit", "dinov2", "dinov3"}
LORA = {"rank": 4, "alpha": 8}
SIDES = {"plain": {}, "adapters": {"adapters": {}}, "lora": {"lora": LORA}, "both": {"adapters": {}, "lora": LORA}}


def _recognizer(name, *, frozen=True, options=None, size=None, **spec):
    size = size or (28 if name == "dinov2" else SIZE)
    motion = {"name": name, "frozen": frozen, "weights": None, "options": {**VITS.get(name, {}), **(options or {})}, **spec}
    return build_recognizer(
        classes=5, frames=FRAMES, size=size, motion=motion, fusion={"name": "mean", "options": {"width": 16}}, seed=1
    )


@pytest.fixture(scope="module")
def make():
    """Recognisers with one stream, each built once: drawing their weights is most of the time."""
    built = {}

    def one(name, side="plain"):
        if (name, side) not in built:
            built[name, side] = _recognizer(name, **SIDES[side])
        return copy.deepcopy(built[name, side])

    return one


def _clips(size=SIZE):
    return torch.randint(0, 256, (2, FRAMES, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def _tokens(model, clips):
    """Of the recogniser's one stream, in the recogniser's own mode and with its gradients."""
    return model._tokens("motion", clips).values


def _trained(model):
    """What an added part holds, with values as after some training: nothing is zero, LayerScale neither."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.streams.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
        for name, parameter in model.streams.named_parameters():
            if name.endswith((".gamma", ".gamma_1", ".gamma_2")):
                parameter.fill_(0.5)
    return model


def _loss(model, clips):
    torch.manual_seed(11)
    return F.cross_entropy(model(clips), torch.tensor([0, 3]))


@pytest.fixture(params=[name for name in VITS if name != "clip"])
def name(request):
    """A backbone; clip's blocks are vit's, twice as wide, and it is left to tests that ask for it."""
    return request.param


@pytest.fixture
def clips(name):
    return _clips(28 if name == "dinov2" else SIZE)


def test_every_backbone_that_can_is_tested_here():
    assert adapt._vision_transformers() == sorted(VITS)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, side) for name in VITS for side in ("adapters", "lora", "both") if name != "clip" or side == "both"],
    indirect=["name"],
)
def test_untrained_gives_the_plain_tokens_to_the_bit(make, name, side, clips):
    plain, extended = make(name), make(name, side)
    for mode in (True, False):
        assert torch.equal(_tokens(extended.train(mode), clips), _tokens(plain.train(mode), clips))
    assert not torch.equal(_tokens(_trained(extended), clips), _tokens(plain, clips))
    if side == "both":
        low = extended.bfloat16().eval()
        assert _tokens(low, clips).isfinite().all()


def test_the_base_has_its_names_its_digest_and_no_more_state(make, name):
    plain, extended = make(name), make(name, "both")
    base = plain.streams["motion"].state_dict()
    state = extended.streams["motion"].state_dict()
    inside = {adapt.plain_name(key): value for key, value in state.items()}
    assert set(base) <= set(inside) and all(torch.equal(base[key], inside[key]) for key in base)
    added = {adapt.plain_name(key) for key in state} - set(base)
    assert all(".adapters." in key or ".lora_" in key for key in added)
    before = frozen_digest(plain)
    assert frozen_digest(extended) == before and frozen_digest(_moved_added(extended)) == before
    with torch.no_grad():
        next(p for p in extended.streams.parameters() if not p.requires_grad).view(-1)[0].add_(1)
    assert frozen_digest(extended) != before


def _moved_added(model):
    with torch.no_grad():
        for part in adapt.added(model.streams["motion"]):
            for parameter in part.parameters():
                parameter.add_(1)
    return model


def test_a_checkpoint_holds_the_added_parameters_and_rebuilds_the_model(make, name, clips):
    model, twin = _trained(make(name, "both")), make(name, "both")
    state = trainable_state(model)
    streams = {key for key in state if key.startswith("streams.")}
    assert streams == {n for n, p in model.named_parameters() if n.startswith("streams.") and p.requires_grad}
    assert all(".adapters." in key or ".lora_" in key for key in streams)
    scales = {k: v for k, v in model.state_dict().items() if k.endswith((".gamma", ".gamma_1", ".gamma_2"))}
    missing, unexpected = twin.load_state_dict({**state, **scales}, strict=False)
    assert not unexpected and not set(missing) & set(state)
    assert torch.equal(twin.eval()(clips), model.eval()(clips))


def test_gradients_reach_all_that_was_added_and_nothing_else(make, name, clips):
    model = _trained(make(name, "both")).train()
    _loss(model, clips).backward()
    for key, parameter in model.streams.named_parameters():
        if ".adapters." in key or ".lora_" in key:
            assert parameter.requires_grad and parameter.grad is not None and parameter.grad.any(), key
        else:
            assert not parameter.requires_grad and parameter.grad is None, key


def test_untrained_gradients_reach_the_ups(make, name, clips):
    """At the first step only what is zero moves: it must not be stuck there."""
    model = make(name, "both").train()
    _loss(model, clips).backward()
    ups = {n: p for n, p in model.streams.named_parameters() if ".up." in n or ".lora_B." in n}
    assert ups and all(p.grad is not None and p.grad.any() for p in ups.values())


def test_checkpointed_is_plain(make, name, clips):
    """Losses and gradients, with LoRA's dropout, which is drawn again in backward; the base's own mode is evaluation."""
    models = [_trained(make(name, "both")).train() for _ in range(2)]
    for model in models:
        _with_dropout(model.streams)
    assert checkpoint_activations(models[1]) == len(models[1].streams["motion"].blocks)
    results = []
    for model in models:
        loss = _loss(model, clips)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(grad, results[1][1][key]) for key, grad in results[0][1].items())


def _with_dropout(module):
    for part in module.modules():
        if hasattr(part, "lora_dropout"):
            part.lora_dropout["default"] = torch.nn.Dropout(0.3)


def test_checkpointing_recomputes_adapted_blocks_and_keeps_little(make, name, clips):
    kept = []
    for checkpointed in (False, True):
        model, sizes = _trained(make(name, "adapters")).train(), {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        if checkpointed:
            checkpoint_activations(model)

        def note(tensor, sizes=sizes, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss = _loss(model, clips)
        kept.append(sum(sizes.values()))
        del loss
    assert kept[1] < kept[0] / 2, kept


def test_copies_have_their_own_adapters(make, name, clips):
    model = _trained(make(name, "both")).eval()
    before = model(clips)
    twin = copy.deepcopy(model)
    _moved_added(twin)
    assert torch.equal(model(clips), before) and not torch.equal(twin(clips), before)


def test_an_adapted_stream_is_in_evaluation_but_for_what_was_added(make, name):
    model = make(name, "both").train()
    _with_dropout(model.streams)
    model.train()
    added = {id(m) for part in adapt.added(model.streams["motion"]) for m in part.modules()}
    modes = {(id(m) in added, m.training) for m in model.streams["motion"].modules()}
    assert modes == {(True, True), (False, False)}
    model.hold(["motion"])
    assert not any(m.training for m in model.streams["motion"].modules())
    model.hold([])
    assert any(m.training for m in model.streams["motion"].modules())
    model.eval()
    assert not any(m.training for m in model.streams["motion"].modules())


def test_a_held_one_runs_without_gradients(make, clips, name):
    model = make(name, "both").train()
    model.hold(["motion"])
    assert not _tokens(model, clips).requires_grad
    model.hold([])
    assert _tokens(model, clips).requires_grad


def test_loras_dropout_acts_in_training_alone(make):
    model, clips = _trained(make("vit", "lora")), _clips()
    _with_dropout(model.streams)
    model.train()
    assert not torch.equal(_tokens(model, clips), _tokens(model, clips))
    model.eval()
    assert torch.equal(_tokens(model, clips), _tokens(model, clips))


# The slow, obvious versions.


def _adapter(part, x):
    hidden = F.gelu(x @ part.down.weight.T + part.down.bias)
    return hidden @ part.up.weight.T + part.up.bias


def _slow_block(name, block, parts, scale, x, rest, kwargs):
    """A block of the plain backbone with adapters of weights `parts`, written out."""

    def after(y):
        return y + _adapter(parts["attn" if name in TIMM else "attention"], y)

    def beside(y):
        return scale * _adapter(parts["mlp"], y)

    if name == "dinov3":
        x = x + block.gamma_1 * after(block.attn(block.norm1(x), **kwargs))
        y = block.norm2(x)
        return x + block.gamma_2 * (block.mlp(y) + beside(y))
    if name in TIMM:
        x = x + block.ls1(after(block.attn(block.norm1(x))))
        y = block.norm2(x)
        return x + block.ls2(block.mlp(y) + beside(y))
    if name == "vjepa2":
        x = x + after(block.attention(block.norm1(x))[0])
        y = block.norm2(x)
        return x + block.mlp(y) + beside(y), None
    assert name == "videomae"
    x = x + after(block.attention(block.layernorm_before(x)))
    y = block.layernorm_after(x)
    return (
        x
        + F.gelu(y @ block.intermediate.dense.weight.T + block.intermediate.dense.bias) @ block.output.dense.weight.T
        + (block.output.dense.bias + beside(y))
    )


@pytest.mark.parametrize("name", [n for n in VITS if n != "timesformer"], indirect=True)
def test_adapters_are_the_written_out_ones(make, name, clips):
    extended, plain = _trained(make(name, "adapters")).eval(), make(name).eval()
    with torch.no_grad():
        for key, parameter in plain.streams.named_parameters():
            parameter.copy_(extended.streams.state_dict()[key])
    for block, other in zip(plain.streams["motion"].blocks, extended.streams["motion"].blocks, strict=True):

        def slow(x, *rest, block=block, other=other, **kwargs):
            return _slow_block(name, block, dict(other.adapters), 0.5, x, rest, kwargs)

        block.forward = slow
    with torch.no_grad():
        torch.testing.assert_close(_tokens(extended, clips), _tokens(plain, clips), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["divided", "joint", "space_only"])
def test_timesformers_adapters_are_where_they_are_said_to_be(attention):
    """Its block is long, so each part is looked at by itself, on what the block really gives it."""
    spec = {"options": {"attention": attention, "depth": 1}, "adapters": {"scale": 0.25}}
    model = _trained(_recognizer("timesformer", **spec)).eval()
    plain = _recognizer("timesformer", options=spec["options"]).eval()
    block, bare = model.streams["motion"].blocks[0], plain.streams["motion"].blocks[0]
    names = ["attention", *(["temporal_attention"] if attention == "divided" else [])]
    assert set(block.adapters) == {*names, "mlp"}
    seen = {}
    for part in (*names, "intermediate", "output"):
        getattr(block, part).register_forward_hook(lambda _m, given, out, part=part: seen.update({part: (given, out)}))
    normed = []
    block.layernorm_after.register_forward_hook(lambda _m, _given, out: normed.append(out))
    with torch.no_grad():
        model(_clips())
        for part in names:
            given, out = seen[part]
            want = getattr(bare, part)(*given)[0]
            torch.testing.assert_close(out[0], want + _adapter(block.adapters[part], want), rtol=1e-4, atol=1e-5)
        mlp = bare.output(bare.intermediate(normed[0]))
        want = mlp + 0.25 * _adapter(block.adapters["mlp"], normed[0])
        torch.testing.assert_close(seen["output"][1], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "videomae"], indirect=True)
def test_who_calls_a_blocks_parts_one_by_one_calls_its_adapters(make, name):
    """As a model does that has its streams exchange between attention and feed-forward part."""
    block, x = _trained(make(name, "both")).eval().streams["motion"].blocks[0], torch.randn(2, 5, 384)
    with torch.no_grad():
        if name == "vit":
            y = x + block.attn(block.norm1(x))
            y = y + block.mlp(block.norm2(y))
        else:
            y = x + block.attention(block.layernorm_before(x))
            y = block.output(block.intermediate(block.layernorm_after(y)), y)
        torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize(("placement", "there"), [("attention", {"attn"}), ("mlp", {"mlp"}), ("both", {"attn", "mlp"})])
def test_placements(placement, there):
    model = _recognizer("vit", adapters={"placement": placement, "ratio": 0.5})
    blocks = model.streams["motion"].blocks
    assert all(set(block.adapters) == there for block in blocks)
    assert blocks[0].adapters[min(there)].down.weight.shape == (192, 384)


def test_loras_updates_are_those_of_merged_weights(make, name, clips):
    model, merged = _trained(make(name, "lora")).eval(), make(name).eval()
    state = model.streams["motion"].state_dict()
    own = merged.streams["motion"].state_dict()
    with torch.no_grad():
        for key in own:
            stem = key.removesuffix("weight")
            own[key].copy_(state.get(key, state.get(f"{stem}base_layer.weight", state.get(_base(key)))))
            if f"{stem}lora_A.default.weight" in state:
                own[key].add_(state[f"{stem}lora_B.default.weight"] @ state[f"{stem}lora_A.default.weight"] * 2)  # 8 / 4
        torch.testing.assert_close(_tokens(merged, clips), _tokens(model, clips), rtol=1e-3, atol=1e-4)


def _base(key):
    stem, _, leaf = key.rpartition(".")
    return f"{stem}.base_layer.{leaf}"


def test_lora_is_in_the_attentions_unless_told_otherwise():
    default = _recognizer("vit", lora={"rank": 4})
    wrapped = {n for n, m in default.streams["motion"].vit.blocks[0].named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {"attn.qkv", "attn.proj"}
    told = _recognizer("vit", lora={"rank": 4, "targets": ("qkv", "mlp.fc1")}, adapters={})
    wrapped = {n for n, m in told.streams["motion"].vit.blocks[0].named_modules() if hasattr(m, "lora_A")}
    assert wrapped == {"attn.qkv", "mlp.fc1"}, "adapters themselves are not updated"
    assert not any(hasattr(m, "lora_A") for m in told.streams["motion"].vit.patch_embed.modules())


@pytest.mark.parametrize("kind", ["adapters", "lora"])
def test_only_the_last_blocks_are_given_any(kind):
    model = _recognizer("vit", trained_blocks=3, **{kind: {}})
    blocks = model.streams["motion"].blocks
    assert [bool(adapt.added(block)) for block in blocks] == [False] * 9 + [True] * 3


def test_the_base_draws_as_before_and_seeds_of_what_is_added_are_its_own(make):
    first, again = _recognizer("vit", adapters={}), _recognizer("vit", adapters={})
    other = _recognizer("vit", adapters={}, lora={})
    down = "vit.blocks.3.adapters.mlp.down.weight"
    state = first.streams["motion"].state_dict()
    assert torch.equal(state[down], again.streams["motion"].state_dict()[down])
    assert torch.equal(state["vit.norm.weight"], other.streams["motion"].state_dict()["vit.norm.weight"])
    assert torch.equal(first.head.linear.weight, make("vit").head.linear.weight)


# Counts.


def _meta(motion, semantic=None, *, frames=16, size=224, classes=174, fusion=None):
    with torch.device("meta"):
        return build_recognizer(
            classes=classes, frames=frames, size=size, motion=motion, semantic=semantic, fusion=fusion or {"name": "mean"}
        )


def _one(width, bottleneck):
    return width * bottleneck + bottleneck + bottleneck * width + width


def test_cast_has_142_million_in_the_adapters_of_its_two_streams():
    """By the structure of its published code, whose adapters of ratio 0.25 count 14,201,856; the rest of 44.8 M is the exchange."""
    spec = {"variant": "vitb16"}
    model = _meta(
        {"name": "videomae", "options": spec, "adapters": {}},
        {"name": "clip", "options": spec, "adapters": {}},
        fusion={"name": "concat"},
    )
    table = {part.name: part.trainable for part in parameter_table(model)}
    assert table["semantic"] == table["motion"] == 12 * 2 * _one(768, 192)
    assert table["semantic"] + table["motion"] == 14_201_856


def test_aim_has_11_million_trained():
    """AIM's ViT-B on Kinetics-400: three adapters a block (its paper, table 2); as many are in divided attention's blocks here."""
    model = _meta({"name": "timesformer", "adapters": {}}, frames=8, classes=400)
    table = {part.name: part.trainable for part in parameter_table(model)}
    assert table["motion"] == 12 * 3 * _one(768, 192)
    assert round((table["motion"] + 400 * 769) / 1e6) == 11


@pytest.mark.parametrize(
    ("name", "options", "lora", "want"),
    [
        ("vit", {"variant": "vitb16"}, {"rank": 8}, 12 * 8 * ((768 + 3 * 768) + 2 * 768)),
        ("videomae", {}, {"rank": 8, "targets": ("query", "value")}, 12 * 8 * 2 * 2 * 768),
        ("vjepa2", {"variant": "vitl16"}, {"rank": 16, "targets": ("fc1",)}, 24 * 16 * (1024 + 4096)),
    ],
)
def test_lora_has_rank_times_in_and_out(name, options, lora, want):
    model = _meta({"name": name, "options": options, "lora": lora})
    assert {part.name: part.trainable for part in parameter_table(model)}["motion"] == want


@pytest.mark.parametrize("name", VITS, indirect=True)
def test_the_dry_run_counts_and_runs_without_memory(name):
    frames, size = (8, 224)
    options = {k: v for k, v in VITS[name].items() if k == "variant"}
    model = _meta({"name": name, "options": options, **SIDES["both"]}, frames=frames, size=size)
    assert all(p.is_meta for p in model.parameters())
    part = parameter_table(model)[0]
    assert part.name == "motion" and 0 < part.trainable < 0.2 * part.total
    assert model(torch.empty(1, frames, 3, size, size, dtype=torch.uint8, device="meta")).shape == (1, 174)


# What is refused.


@pytest.mark.parametrize("backbone", ["r3d", "i3d", "mvit", "swin3d", "resnet2d", "tiny_motion"])
@pytest.mark.parametrize("kind", ["adapters", "lora"])
def test_what_is_no_vision_transformer_is_told_which_are(backbone, kind):
    said = rf"which {backbone} is not; backbones that are: clip, dinov2, dinov3, timesformer, videomae, vit, vjepa2$"
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        _recognizer(backbone, **{kind: {}})


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"adapters": {}, "frozen": False}, "adapters is for a frozen stream, and the motion stream is trained itself"),
        ({"adapters": {"ratio": 0.001}}, "ratio=0.001 of a width of 384 is a bottleneck of none; give 0.0026 or more"),
        (
            {"lora": {"targets": ("qkv", "query")}},
            r"lora: vit has no linear layer 'query' in its blocks; there are: attn.qkv, attn.proj, mlp.fc1, mlp.fc2",
        ),
        ({"adapters": {}, "trained_blocks": 13}, "the motion stream has 12 blocks; trained_blocks 13 is too many"),
        ({"options": {"stochastic_depth": 0.1}}, "stochastic_depth acts on a stream that is trained itself, and the motion"),
    ],
)
def test_what_does_not_go_together_is_refused(spec, said):
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        _recognizer("vit", **spec)


# Stochastic depth.


def _rates(name, rate):
    """Of each block's two branches (three, of divided attention), as its modules have them."""
    with torch.device("meta"):
        frames, size = FRAMES, 28 if name == "dinov2" else SIZE
        stream = select.build("backbones", name, frames=frames, size=size, **{**VITS[name], "stochastic_depth": rate})
    found = []
    for block in stream.blocks:
        parts = [m for m in block.modules() if type(m).__name__ in ("DropPath", "StochasticDepth")]
        found.append({getattr(m, "drop_prob", getattr(m, "p", None)) for m in parts} or {0.0})
    return [pytest.approx(rates.pop()) for rates in found if len(rates) == 1]


@pytest.mark.parametrize("name", VITS, indirect=True)
def test_stochastic_depth_grows_from_nothing_to_what_is_asked_for(name):
    blocks = 12 if name in TIMM else 2
    assert _rates(name, 0.3) == [0.3 * i / (blocks - 1) for i in range(blocks)]
    assert _rates(name, 0.0) == [0.0] * blocks
    with pytest.raises(ValueError, match="stochastic_depth is a share of at least 0 and below 1, given 1"):
        _rates(name, 1.0)


@pytest.fixture
def deep(name):
    return _recognizer(name, frozen=False, options={"stochastic_depth": 0.7})


def test_stochastic_depth_acts_in_training_of_a_stream_that_is_not_held(deep, name, clips, make):
    plain = make(name).eval()
    assert list(deep.state_dict()) == list(plain.state_dict())
    assert torch.equal(_tokens(deep.eval(), clips), _tokens(plain, clips))
    deep.train()
    torch.manual_seed(0)
    first, other = _tokens(deep, clips), _tokens(deep, clips)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    assert torch.equal(_tokens(deep, clips), first)
    deep.hold(["motion"])
    assert torch.equal(_tokens(deep, clips), _tokens(plain, clips))


def test_stochastic_depth_draws_the_same_again_under_checkpointing(deep, clips):
    models = [deep.train(), copy.deepcopy(deep).train()]
    checkpoint_activations(models[1])
    grads = []
    for model in models:
        _loss(model, clips).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grad, grads[1][key]) for key, grad in grads[0].items())
    torch.manual_seed(12)  # other draws give other gradients
    deep.zero_grad()
    F.cross_entropy(deep(clips), torch.tensor([0, 3])).backward()
    assert any(not torch.equal(p.grad, grads[1][n]) for n, p in deep.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["videomae"], indirect=True)
def test_videomaes_branches_are_dropped_a_clip_at_a_time_and_scaled(name):
    """The library has no such thing for it: in the last block a clip's branch is nothing, or is divided by the share kept."""
    stream = select.build("backbones", name, frames=FRAMES, size=SIZE, **VITS[name], stochastic_depth=0.5)
    block, x = stream.blocks[-1].train(), torch.randn(64, 8, 384)
    with torch.no_grad():
        attention = block.attention(x)
        plain = block.eval().attention(x)
        block.train()
        mlp = block.output(block.intermediate(x), x) - x
        plain_mlp = block.eval().output(block.intermediate(x), x) - x
    for got, want in ((attention, plain), (mlp, plain_mlp)):
        dropped = (got.abs() < 1e-6).flatten(1).all(1)
        assert 16 < dropped.sum() < 48
        torch.testing.assert_close(got[~dropped], 2 * want[~dropped], rtol=1e-4, atol=1e-5)
