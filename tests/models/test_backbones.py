"""The contract of `backbones/`, over every file in it."""

import copy
import functools

import pytest
import torch

from tests.support import CLIPS, clip_for, few_blocks
from vidfuse.models import select
from vidfuse.models.layers import Normalize
from vidfuse.models.parts import Backbone
from vidfuse.models.recognizer import LinearHead, Recognizer, checkpoint_activations

NAMES = select.names("backbones")


@functools.cache
def _taken(name):
    taken = clip_for(name)
    assert taken, f"{name} takes none of {CLIPS}; add what it takes"
    return taken


@functools.cache
def _built(name):
    frames, size = _taken(name)
    torch.manual_seed(0)
    return select.build("backbones", name, frames=frames, size=size, **few_blocks(name))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def backbone(name):
    return copy.deepcopy(_built(name))


@pytest.fixture
def clip(name):
    frames, size = _taken(name)
    return torch.randn(2, frames, 3, size, size, generator=torch.Generator().manual_seed(1))


def _loss(tokens):
    weights = torch.randn(tokens.values.shape, generator=torch.Generator().manual_seed(2))
    return (tokens.values * weights).mean()


def test_the_folder_holds_what_the_issue_names():
    assert {"dinov2", "dinov3", "r3d"} <= set(NAMES)


def test_a_clip_it_does_not_take_is_refused_in_words(name):
    for frames, size in CLIPS[: CLIPS.index(_taken(name))]:
        with torch.device("meta"), pytest.raises(ValueError, match=r"(frames|size).*\d"):
            select.build("backbones", name, frames=frames, size=size)


def test_says_what_it_is_and_gives_tokens_with_places(backbone, clip):
    assert isinstance(backbone, Backbone)
    assert len(backbone.mean) == len(backbone.std) == 3 and all(s > 0 for s in backbone.std)
    assert backbone.blocks and all(isinstance(b, torch.nn.Module) for b in backbone.blocks)
    own = set(map(id, backbone.modules()))
    assert all(id(b) in own for b in backbone.blocks)
    backbone.eval()
    with torch.no_grad():
        tokens, again, alone = backbone(clip), backbone(clip), backbone(clip[:1])
    assert tokens.values.shape == (2, tokens.positions.shape[0], backbone.width)
    assert tokens.positions.shape[1] == 3 and tokens.positions.dtype == torch.float32
    assert tokens.positions.min() >= 0 and tokens.positions.max() <= 1
    assert tokens.mask is None or (tokens.mask.dtype == torch.bool and tokens.mask.shape == tokens.values.shape[:2])
    assert torch.equal(tokens.values, again.values), "not deterministic in eval"
    torch.testing.assert_close(alone.values, tokens.values[:1], rtol=1e-3, atol=1e-4)


def test_checkpointed_is_plain_and_gradients_reach_every_parameter(backbone, clip):
    plain = _wrapped(backbone)
    checkpointed = copy.deepcopy(plain)
    assert checkpoint_activations(checkpointed) == len(backbone.blocks)
    losses = []
    for model in (plain, checkpointed):
        model.train()
        torch.manual_seed(5)
        loss = _loss(model.streams["motion"](clip))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    for (name, a), (other, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        assert name == other
        if name.startswith("streams.") and a.requires_grad:
            assert a.grad is not None and a.grad.isfinite().all() and a.grad.any(), f"no gradient reaches {name}"
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)
    for (name, a), b in zip(plain.state_dict().items(), checkpointed.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} was changed twice by recomputation"


def test_works_when_an_engine_casts_its_parameters(name):
    """DeepSpeed casts parameters alone: buffers, such as running statistics, stay float32."""
    backbone, frames, size = _smallest(name)
    for parameter in backbone.parameters():
        parameter.data = parameter.data.bfloat16()
    for training in (True, False):
        tokens = backbone.train(training)(torch.randn(2, frames, 3, size, size).bfloat16())
        assert tokens.values.dtype == torch.bfloat16 and tokens.positions.dtype == torch.float32


def _smallest(name):
    """CPUs are slow at bf16 convolutions."""
    frames, size = clip_for(name, ((1, 28), (1, 32), (2, 32), (8, 16), *CLIPS))
    return select.build("backbones", name, frames=frames, size=size, **few_blocks(name)), frames, size


def test_modules_that_own_parameters_are_called(backbone, clip):
    """ZeRO-3 gathers a module's own parameters when the module is called; reached past its call they are empty."""
    called = set()
    for name, module in backbone.named_modules():
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
    with torch.no_grad():
        backbone.eval()(clip[:1])
    owners = {name.rpartition(".")[0] for name, _ in backbone.named_parameters()}
    assert owners <= called, f"never called: {sorted(owners - called)}"


def test_state_goes_round(backbone, clip):
    torch.manual_seed(9)
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    state = backbone.state_dict()
    other.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True)
    with torch.no_grad():
        assert torch.equal(backbone.eval()(clip[:1]).values, other.eval()(clip[:1]).values)


def test_builds_without_memory(name):
    frames, size = _taken(name)
    with torch.device("meta"):
        model = select.build("backbones", name, frames=frames, size=size)
        tokens = model.eval()(torch.empty(2, frames, 3, size, size))
    assert all(p.is_meta for p in model.parameters())
    assert tokens.values.shape[-1] == model.width
    assert tokens.positions.device.type == "cpu"


def test_every_option_is_documented(name):
    import importlib

    doc = importlib.import_module(f"vidfuse.models.backbones.{name}").build.__doc__
    assert all(f"{option}: " in doc for option in select.options("backbones", name))


def test_normalisation_is_that_of_the_backbone_and_stays_exact(backbone):
    normalize = Normalize(backbone.mean, backbone.std).bfloat16()
    clip = torch.randint(0, 256, (1, 1, 3, 2, 2), dtype=torch.uint8)
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
    torch.testing.assert_close(normalize(clip, torch.float32) * std, clip / 255 - mean, rtol=0, atol=1e-6)
    assert normalize(clip, torch.bfloat16).dtype == torch.bfloat16


def _wrapped(backbone):
    fusion = select.build("fusion", "mean", widths={"motion": backbone.width}, width=None)
    return Recognizer({"motion": backbone}, fusion, LinearHead(backbone.width, 3))
