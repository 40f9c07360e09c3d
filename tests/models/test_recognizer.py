"""The recogniser: parts put together, frozen streams, seeds, digests, activation checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as F

from vidfuse.models.building import build_recognizer
from vidfuse.models.recognizer import checkpoint_activations, frozen_digest, parameter_table, trainable_state

R3D = {"name": "r3d", "frozen": False, "weights": None, "options": {"stage": "layer2"}}
MEAN = {"name": "mean", "options": {"width": 16}}


def _loss(model, clips):
    torch.manual_seed(11)
    return F.cross_entropy(model(clips), torch.tensor([0, 3]))


def test_logits_are_float32_and_attention_comes_if_asked(make_recognizer, clips):
    model = make_recognizer().eval()
    logits = model(clips)
    assert logits.shape == (2, 5) and logits.dtype == torch.float32
    again, attention = model(clips, return_attention=True)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-5)
    semantic, motion = 4 * (1 + 2 * 2), 2 * 8 * 8  # stem and layer2 halve space, layer2 halves time
    assert {name: tuple(a.shape) for name, a in attention.items()} == {
        "layer0.semantic_to_motion": (2, 4, semantic, motion),
        "layer0.motion_to_semantic": (2, 4, motion, semantic),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_computes_in_the_dtype_that_an_engine_cast_it_to(make_recognizer, clips, dtype):
    model, small = make_recognizer(frames=2, size=16).eval(), clips[:, :2, :, :16, :16]  # CPUs are slow at bf16 convolutions
    want = model(small)
    model.to(dtype)
    got = model(small)
    assert got.dtype == torch.float32
    assert all(n.scale.dtype == torch.float32 for n in model.normalize.values())
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_computes_under_autocast(make_recognizer, clips):
    model = make_recognizer(frames=2, size=16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(model, clips[:, :2, :, :16, :16])
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_frozen_streams_have_no_gradients_and_stay_in_eval(make_recognizer, clips):
    frozen_motion = {**R3D, "frozen": True}
    model = make_recognizer(motion=frozen_motion).train()
    before = {k: v.clone() for k, v in model.streams.state_dict().items()}
    assert model.training and model.fusion.training
    assert not any(m.training for m in model.streams["motion"].modules())
    _loss(model, clips).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.streams.parameters())
    assert all(p.grad is not None for p in [*model.fusion.parameters(), *model.head.parameters()])
    assert all(torch.equal(v, before[k]) for k, v in model.streams.state_dict().items())


def test_frozen_streams_keep_no_activations(make_recognizer, clips):
    model, kept, recording = make_recognizer(), [], {}
    for name, stream in model.streams.items():
        stream.register_forward_hook(lambda *_, name=name: recording.update({name: torch.is_grad_enabled()}))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t):
        _loss(model, clips)
    assert not {p.untyped_storage().data_ptr() for p in model.streams["semantic"].parameters()} & set(kept)
    assert {p.untyped_storage().data_ptr() for p in model.streams["motion"].parameters()} & set(kept)
    assert recording == {"semantic": False, "motion": True}


def test_the_same_seed_is_the_same_model_whatever_was_drawn_before(make_recognizer):
    torch.manual_seed(1)
    first = make_recognizer(fresh=True).state_dict()
    torch.rand(7)
    state = torch.get_rng_state()
    second = make_recognizer(fresh=True).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "building draws from the global generator"
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = make_recognizer(seed=4).state_dict()
    assert not torch.equal(first["head.linear.weight"], other["head.linear.weight"])


def test_parts_draw_on_their_own(make_recognizer):
    both, alone = make_recognizer(fresh=True), make_recognizer(fresh=True, semantic=None, fusion=MEAN)
    motion = both.streams["motion"].state_dict()
    assert all(torch.equal(v, motion[k]) for k, v in alone.streams["motion"].state_dict().items())


def test_checkpointed_is_plain(make_recognizer, clips):
    """Losses, gradients, running statistics and names, with dropout, batch norm and a frozen stream."""
    models = [make_recognizer(head_dropout=0.2) for _ in range(2)]
    assert checkpoint_activations(models[1]) == 4  # stem, layer1, layer2; one exchange; nothing of the frozen stream
    assert checkpoint_activations(models[1]) == 4
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses.append([])
        for _ in range(3):
            loss = _loss(model.train(), clips)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    a, b = (m.state_dict() for m in models)
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_checkpointing_keeps_fewer_activations(make_recognizer, clips):
    def kept(model):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
        ):
            loss = _loss(model, clips)
        del loss
        return sum(sizes.values())

    plain, checkpointed = make_recognizer(), make_recognizer()
    checkpoint_activations(checkpointed)
    assert kept(checkpointed) < kept(plain) / 2


def test_checkpointing_is_for_training_only_and_survives_copies(make_recognizer, clips, monkeypatch):
    model = make_recognizer()
    checkpoint_activations(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.streams["motion"].parameters():
            parameter.zero_()
    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("vidfuse.models.recognizer.checkpoint", lambda *a, **k: calls.append(a) or real(*a, **k))
    with torch.no_grad():
        model.train()(clips)
    model.eval()(clips)
    assert not calls
    model.train()(clips)
    assert len(calls) == 4
    assert not torch.equal(model.eval()(clips), twin.eval()(clips)), "the copy still runs the original's blocks"


def test_table_counts_parts(make_recognizer):
    table = {name: (total, trained) for name, total, trained in parameter_table(make_recognizer())}
    assert list(table) == ["semantic", "motion", "fusion", "head"]
    assert table["semantic"] == (28_683_264, 0)
    assert table["motion"][0] == table["motion"][1] > 1e6
    assert table["head"] == (5 * 64 + 5,) * 2


def test_table_is_whole_where_zero3_left_parameters_empty(make_recognizer):
    model = make_recognizer(semantic=None, fusion=MEAN)
    want = parameter_table(model)
    for parameter in model.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    assert parameter_table(model) == want


def test_full_width_models_build_without_memory():
    with torch.device("meta"):
        model = build_recognizer(
            classes=174,
            frames=16,
            size=224,
            semantic={"name": "dinov3", "weights": "pretrained", "options": {"variant": "vitl16"}},
            motion={"name": "r3d", "weights": "pretrained"},
            fusion={"name": "cross_attention", "options": {"layers": 3}},
        )
    assert all(p.is_meta for p in model.parameters())
    assert {p.name: p.trainable for p in parameter_table(model)}["motion"] == 0, "streams are frozen unless told otherwise"
    assert sum(p.trainable for p in parameter_table(model)) < 20e6
    clips = torch.empty(1, 16, 3, 224, 224, dtype=torch.uint8, device="meta")
    assert model(clips).shape == (1, 174)
    with pytest.raises(ValueError, match="digest of motion"):
        frozen_digest(model)


def test_digest_is_of_the_weights_of_frozen_streams(make_recognizer):
    model = make_recognizer()
    want = frozen_digest(model)
    assert list(want) == ["semantic"] and len(want["semantic"]) == 64
    assert frozen_digest(make_recognizer(fresh=True)) == want
    with torch.no_grad():
        model.head.linear.weight.add_(1)
        assert frozen_digest(model) == want
        next(model.streams["semantic"].parameters()).view(-1)[0].add_(1e-6)
    assert frozen_digest(model) != want
    with pytest.raises(ValueError, match=r"digest of semantic.*bfloat16.*before the engine casts or shards"):
        frozen_digest(model.bfloat16())
    model.float().streams["semantic"].vit.cls_token.ds_numel = 384  # as ZeRO-3 marks what it has taken
    with pytest.raises(ValueError, match=r"digest of semantic\.vit\.cls_token"):
        frozen_digest(model)


def test_trainable_state_rebuilds_the_model(make_recognizer, clips):
    model = make_recognizer(motion={**R3D, "options": {"stage": "layer2", "batch_norm": "frozen"}})
    with torch.no_grad():
        for value in trainable_state(model).values():
            value.mul_(2) if value.is_floating_point() else value.add_(3)
    state = {name: value.clone() for name, value in trainable_state(model).items()}
    assert not any(name.startswith("streams.semantic") for name in state)
    assert "streams.motion.stem.1.running_var" in state and "streams.motion.stem.1.weight" in state
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= set(state)
    twin = make_recognizer(motion={**R3D, "options": {"stage": "layer2", "batch_norm": "frozen"}})
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and all(name.startswith("streams.semantic") for name in missing)
    assert torch.equal(twin.eval()(clips), model.eval()(clips))


def test_constants_of_normalisation_are_not_state_and_survive_materialising(clips):
    with torch.device("meta"):
        model = build_recognizer(classes=2, frames=4, size=32, motion=R3D, fusion=MEAN)
    assert not any("normalize" in name for name in model.state_dict())
    normalize = model.to_empty(device="cpu").normalize["motion"]
    mean = torch.tensor(model.streams["motion"].mean)[:, None, None]
    torch.testing.assert_close(normalize(clips, torch.float32) * 255 * 0 + mean, mean.expand(2, 4, 3, 32, 32))
    assert torch.allclose(-normalize.shift / normalize.scale / 255, mean)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"semantic": None, "motion": None}, "semantic stream, a motion stream or both"),
        ({"motion": {**R3D, "name": "r3dd"}}, r"no 'r3dd' \(did you mean r3d\?\)"),
        ({"motion": {**R3D, "options": {"frames": 3}}}, "'frames' is no option; the recogniser sets it itself"),
        (
            {"motion": {**R3D, "options": {"stage": "layer9"}}},
            "option stage is one of 'layer2', 'layer3', 'layer4', given 'layer9'",
        ),
        ({"fusion": {"name": "mean", "options": {"widths": 3}}}, "'widths' is no option"),
        ({"fusion": {"name": "mean", "options": {"heads": 3}}}, "'heads' is no option; its options are: width:"),
        ({"semantic": None}, "joins two streams"),
        ({"head_dropout": 1.5}, "head_dropout is a share"),
        ({"motion": {**R3D, "weights": "nowhere.safetensors"}}, "nowhere.safetensors does not exist"),
    ],
)
def test_refuses(make_recognizer, change, said):
    with torch.device("meta"), pytest.raises(ValueError, match=said):
        make_recognizer(**change)
