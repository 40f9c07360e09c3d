"""Weights files: read safely, loaded strictly, refused in words."""

import hashlib
import logging
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vidfuse.models import select, weights
from vidfuse.models.building import build_recognizer

R3D = {"name": "r3d", "frozen": True, "options": {"stage": "layer2"}}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 2)


@pytest.fixture
def state():
    return {name: torch.rand_like(value) for name, value in Small().state_dict().items()}


@pytest.fixture
def saved(tmp_path):
    def save(content, name="w.safetensors"):
        path = tmp_path / name
        save_file(content, path) if name.endswith("safetensors") else torch.save(content, path)
        return path

    return save


def _loaded(path, **options):
    model = Small()
    weights.load(model, path, **options)
    return model.state_dict()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth", "w.bin"])
def test_every_weight_is_replaced(saved, state, name):
    found = _loaded(saved(state, name))
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_none_is_nothing():
    model = Small()
    before = model.a.weight.clone()
    weights.load(model, None)
    assert torch.equal(model.a.weight, before)


@pytest.mark.parametrize(
    "wrap", [lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}, lambda s: {"model": {"state_dict": s}}]
)
def test_what_training_scripts_wrap_is_unwrapped(saved, state, wrap):
    assert torch.equal(_loaded(saved(wrap(state), "w.pth"))["a.weight"], state["a.weight"])


def test_prefixes_are_renamed(saved, state):
    other = {f"module.{k}".replace("module.b.", "module.last."): v for k, v in state.items()}
    found = _loaded(saved(other), rename={"module.": "", "module.last.": "b."})
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_half_precision_files_become_the_modules_precision(saved, state):
    found = _loaded(saved({k: v.half() for k, v in state.items()}))
    assert found["a.weight"].dtype == torch.float32 and torch.equal(found["a.weight"], state["a.weight"].half().float())


def test_the_hash_is_verified(saved, state):
    path = saved(state)
    right = hashlib.sha256(path.read_bytes()).hexdigest()
    _loaded(path, sha256=right)
    _loaded(f"{path}#sha256={right.upper()}")
    for wrong in ({"source": path, "sha256": "0" * 64}, {"source": f"{path}#sha256={'0' * 64}"}):
        with pytest.raises(ValueError, match=f"has sha256 {right}, stated is 000"):
            weights.load(Small(), **wrong)


def test_what_does_not_fit_is_counted_and_named(saved, state):
    del state["a.bias"]
    state |= {"b.weight": torch.zeros(7, 7), **{f"extra{i}": torch.zeros(1) for i in range(9)}}
    with pytest.raises(ValueError) as caught:
        _loaded(saved(state))
    said = str(caught.value)
    assert "w.safetensors look like another architecture than Small (4 tensors)" in said
    assert "1 missing: a.bias" in said and "9 unexpected: extra0, extra1, extra2, extra3 ..." in said
    assert "1 of another shape: b.weight (7, 7), needed (2, 3)" in said


def test_nothing_is_replaced_when_something_does_not_fit(saved, state):
    model = Small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state["b.weight"] = torch.zeros(7, 7)
    with pytest.raises(ValueError):
        weights.load(model, saved(state))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_damaged_files_are_named(tmp_path, saved, state, name):
    path = saved(state, name)
    for content in (path.read_bytes()[: path.stat().st_size // 2], b"", b"not weights"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            _loaded(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return (type(ran).touch, (ran,))

    path = tmp_path / "w.pt"
    for write in (lambda: torch.save({"a": Attack()}, path), lambda: path.write_bytes(pickle.dumps(Attack()))):
        write()
        with pytest.raises(ValueError, match=r"w\.pt cannot be read"):
            _loaded(path)
    assert not ran.exists()


def test_other_content_endings_and_missing_files_are_named(tmp_path, saved):
    with pytest.raises(ValueError, match="holds no mapping of names to tensors"):
        _loaded(saved([1, 2], "w.pt"))
    with pytest.raises(ValueError, match=r"nothere\.pt does not exist; give"):
        _loaded(tmp_path / "nothere.pt")
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match=r"ends in '\.h5'; \.safetensors, \.pt, \.pth, \.pyth, \.bin are read"):
        _loaded(tmp_path / "w.h5")


def _recognizer(weights_file, stream="motion", **spec):
    part = {stream: {**R3D, **spec, "weights": str(weights_file)}}
    return build_recognizer(classes=2, frames=2, size=112, fusion={"name": "mean"}, **part)


def test_torchvisions_file_loads_into_r3d(saved):
    from torchvision.models.video import r3d_18

    theirs = {k: torch.rand_like(v.float()).to(v.dtype) for k, v in r3d_18(weights=None).state_dict().items()}
    path = saved(theirs, "r3d_18.pth")
    model = _recognizer(path)
    assert torch.equal(model.streams["motion"].layer2[0].conv1[0].weight, theirs["layer2.0.conv1.0.weight"])
    del theirs["layer1.0.conv1.0.weight"]
    with torch.device("meta"), pytest.raises(ValueError, match=r"1 missing: layer1\.0\.conv1\.0\.weight"):
        _recognizer(saved(theirs, "r3d_18.pth"))


@pytest.mark.parametrize(
    ("name", "variant", "wrong"),
    [("dinov2", "vits14", "vits14reg"), ("dinov2", "vits14reg", "vitb14"), ("dinov3", "vits16plus", "vits16")],
)
def test_timms_file_loads_into_its_transformer_and_into_no_other(saved, name, variant, wrong):
    import timm

    with torch.device("meta"):
        architecture = select.build("backbones", name, frames=1, size=112, variant=variant).vit.pretrained_cfg["architecture"]
    theirs = {k: torch.rand_like(v) for k, v in timm.create_model(architecture, num_classes=0).state_dict().items()}
    path = saved(theirs)
    model = _recognizer(path, "semantic", name=name, options={"variant": variant}).streams["semantic"]
    assert all(torch.equal(model.state_dict()[f"vit.{k}"], v) for k, v in theirs.items())
    own = saved(model.state_dict(), "own.safetensors")
    weights.load(model, own)
    for other, options in ((name, {"variant": wrong}), ("r3d", {})):
        with torch.device("meta"), pytest.raises(ValueError, match=r"w\.safetensors look like another architecture"):
            _recognizer(path, "semantic", name=other, options=options)


def test_dinov3s_licence_is_told(saved, caplog):
    model = select.build("backbones", "dinov3", frames=1, size=32)
    with caplog.at_level(logging.WARNING):
        weights.load(model, saved(model.state_dict()))
    assert "DINOv3 License" in caplog.text


def test_a_file_in_the_hubs_cache_needs_no_network(monkeypatch, saved):
    import huggingface_hub

    model = select.build("backbones", "dinov2", frames=1, size=28)
    path = saved({k.removeprefix("vit."): torch.rand_like(v) for k, v in model.state_dict().items()})
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(path))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", None)
    fetched = select.build("backbones", "dinov2", frames=1, size=28, pretrained=True)
    assert not torch.equal(fetched.vit.cls_token, model.vit.cls_token)


@pytest.mark.parametrize("held", ["model.safetensors", "pytorch_model.bin"])
def test_of_a_hubs_repository_the_file_that_it_has_is_taken(monkeypatch, held):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def metadata(url):
        if not url.endswith(f"some/repository/resolve/main/{held}"):
            raise EntryNotFoundError(f"404 {url}")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, file, revision: f"/cache/{repository}/{file}")
    assert str(weights.from_hub("some/repository").fetch()) == f"/cache/some/repository/{held}"
    with pytest.raises(ValueError, match=r"other\.safetensors of https://huggingface\.co/some/repository"):
        weights.from_hub("some/repository", "other.safetensors").fetch()
