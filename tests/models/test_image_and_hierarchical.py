"""CLIP, ViT, ResNet, MViT and Video Swin held to their sources: sizes, operations, files, numbers of the libraries' own forwards."""

import copy
import functools

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from einops import rearrange
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import video
from torchvision.ops import StochasticDepth

from vidfuse.models import hubs, select, weights

MVIT = {"v2s": video.MViT_V2_S_Weights.KINETICS400_V1, "v1b": video.MViT_V1_B_Weights.KINETICS400_V1}
SWIN = {
    "t": video.Swin3D_T_Weights.KINETICS400_V1,
    "s": video.Swin3D_S_Weights.KINETICS400_V1,
    "b": video.Swin3D_B_Weights.KINETICS400_V1,
    "b_in22k": video.Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1,
}
RESNET = {
    "resnet18": tv.ResNet18_Weights.IMAGENET1K_V1,
    "resnet34": tv.ResNet34_Weights.IMAGENET1K_V1,
    "resnet50": tv.ResNet50_Weights.IMAGENET1K_V1,
}
VIT = {"vitb16": tv.ViT_B_16_Weights.IMAGENET1K_V1, "vitl16": tv.ViT_L_16_Weights.IMAGENET1K_V1}
TORCHVISIONS = [
    *(("vit", variant, published, 1) for variant, published in VIT.items()),
    *(("resnet2d", variant, published, 1) for variant, published in RESNET.items()),
    *(("mvit", variant, published, 16) for variant, published in MVIT.items()),
    *(("swin3d", variant, published, 16) for variant, published in SWIN.items()),
]
"""Backbone, variant, its weights at torchvision (meta: `num_params`, and `_ops` in billions of multiply-adds), frames of `_ops`."""
BUILDERS = {
    ("mvit", "v2s"): video.mvit_v2_s,
    ("mvit", "v1b"): video.mvit_v1_b,
    ("swin3d", "t"): video.swin3d_t,
    ("swin3d", "s"): video.swin3d_s,
    ("swin3d", "b"): video.swin3d_b,
    ("swin3d", "b_in22k"): video.swin3d_b,
}


def _fresh(name, frames=16, size=224, **options):
    with torch.device("meta"):
        return select.build("backbones", name, frames=frames, size=size, **options).eval()


_meta = functools.cache(_fresh)
"""Built once, for tests that change nothing in it."""


def _parameters(model):
    return sum(p.numel() for p in model.parameters())


def _operations(model, frames, size=224):
    with torch.device("meta"), FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.empty(1, frames, 3, size, size))
    return counted.get_total_flops() / 1e9


def _stirred(model):
    """Norms, tables and tokens as far from their start as after training, so that an error in one shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if any(part in name for part in ("norm", "bn", "downsample.1", "rel", "pos", "token")):
                tensor.add_(torch.randn_like(tensor) * 0.3)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.normal_(0, 0.1)
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    return model


def _hooked(network, part, clip):
    seen = []
    handle = network.get_submodule(part).register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        network(clip)
    handle.remove()
    return seen[0]


def _apart(ours, theirs):
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    return (ours - theirs).abs().max().item()


@pytest.mark.parametrize(("name", "variant", "published", "frames"), TORCHVISIONS)
def test_size_and_operations_are_those_that_torchvision_publishes(name, variant, published, frames):
    model = _meta(name, frames, variant=variant)
    classifier = len(published.meta["categories"]) * (model.width + 1)
    assert _parameters(model) == published.meta["num_params"] - classifier
    assert _operations(model, frames) / 2 == pytest.approx(published.meta["_ops"], rel=0.02)


@pytest.mark.parametrize(
    ("variant", "size", "millions", "operations", "projected"),
    [
        # OpenCLIP, docs/model_profile.csv: image_mparams (with the projection, without a bias), image_gflops (two a multiply-add).
        ("vitb32", 224, 87.85, 8.82, 512),
        ("vitb16", 224, 86.19, 35.13, 512),
        ("vitl14", 224, 303.97, 162.03, 768),
        ("vitl14_336", 336, 304.29, 381.92, 768),
    ],
)
def test_clip_has_the_published_size_and_operations(variant, size, millions, operations, projected):
    model = _meta("clip", 1, size, variant=variant)
    assert (_parameters(model) + projected * model.width) / 1e6 == pytest.approx(millions, abs=0.01)
    assert _operations(model, 1, size) == pytest.approx(operations, rel=0.02)


def test_the_small_vit_has_the_published_size_and_operations():
    """DeiT-S has the same transformer: 22 M parameters with 1000 classes, 4.6 GFLOPs (Liu et al. 2021, arXiv:2103.14030, table 1)."""
    model = _meta("vit", 1, variant="vits16")
    assert model.width == 384
    assert (_parameters(model) + 1000 * 385) / 1e6 == pytest.approx(22, abs=0.5)
    assert _operations(model, 1) / 2 == pytest.approx(4.6, rel=0.02)


def _openais_file(layers, width, patch, grid, projected):
    """Image tower of OpenAI's file, from the paper's table 20 and the names of its code."""
    torch.manual_seed(0)

    def norm(name):
        return {f"{name}.weight": 1 + 0.3 * torch.randn(width), f"{name}.bias": 0.3 * torch.randn(width)}

    def linear(name, given, out):
        return {f"{name}weight": torch.randn(out, given) * given**-0.5, f"{name}bias": torch.randn(out) * 0.1}

    state = {
        "visual.class_embedding": torch.randn(width),
        "visual.positional_embedding": torch.randn(grid * grid + 1, width),
        "visual.conv1.weight": torch.randn(width, 3, patch, patch) * 0.03,
        "visual.proj": torch.randn(width, projected),
        "transformer.resblocks.0.ln_1.weight": torch.ones(512),  # of the text tower
        **norm("visual.ln_pre"),
        **norm("visual.ln_post"),
    }
    for i in range(layers):
        block = f"visual.transformer.resblocks.{i}"
        state |= norm(f"{block}.ln_1") | norm(f"{block}.ln_2") | linear(f"{block}.attn.in_proj_", width, 3 * width)
        state |= linear(f"{block}.attn.out_proj.", width, width)
        state |= linear(f"{block}.mlp.c_fc.", width, 4 * width) | linear(f"{block}.mlp.c_proj.", 4 * width, width)
    return state


def _openais_forward(state, images, layers, heads):
    """Section 2.4 of the CLIP paper over the file's tensors: norm before the blocks, GELU as `x * sigmoid(1.702 x)`."""

    def get(name):
        return state[f"visual.{name}"]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], get(f"{name}.weight"), get(f"{name}.bias"), 1e-5)

    patches = F.conv2d(images, get("conv1.weight"), stride=get("conv1.weight").shape[-1]).flatten(2).mT
    x = torch.cat((get("class_embedding").expand(len(images), 1, -1), patches), dim=1) + get("positional_embedding")
    x = norm(x, "ln_pre")
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        qkv = F.linear(norm(x, f"{block}.ln_1"), get(f"{block}.attn.in_proj_weight"), get(f"{block}.attn.in_proj_bias"))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=heads)
        read = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        x = x + F.linear(
            rearrange(read, "b h n d -> b n (h d)"), get(f"{block}.attn.out_proj.weight"), get(f"{block}.attn.out_proj.bias")
        )
        inner = F.linear(norm(x, f"{block}.ln_2"), get(f"{block}.mlp.c_fc.weight"), get(f"{block}.mlp.c_fc.bias"))
        x = x + F.linear(
            inner * torch.sigmoid(1.702 * inner), get(f"{block}.mlp.c_proj.weight"), get(f"{block}.mlp.c_proj.bias")
        )
    return norm(x, "ln_post")


def test_openais_file_gives_openais_numbers(tmp_path):
    state = _openais_file(layers=12, width=768, patch=32, grid=7, projected=512)
    torch.save(state, tmp_path / "ViT-B-32.pt")
    model = select.build("backbones", "clip", frames=1, size=224, variant="vitb32").eval()
    weights.load(model, tmp_path / "ViT-B-32.pt")
    clip = torch.randn(1, 1, 3, 224, 224)
    with torch.no_grad():
        theirs = _openais_forward(state, clip[0], layers=12, heads=12)
        assert _apart(model(clip).values, theirs) <= 1e-5


@pytest.mark.parametrize(("name", "variant", "size"), [("clip", "vitb32", 96), ("vit", "vits16", 64)])
def test_tokens_of_frames_are_timms_own(name, variant, size, tmp_path):
    """A file of timm's, classifier included, in a model of timm's for that size and in ours."""
    architecture = _meta(name, 1, size, variant=variant).vit.pretrained_cfg["architecture"]
    published = _stirred(timm.create_model(architecture, num_classes=7))
    torch.save(published.state_dict(), tmp_path / "timm.pth")
    theirs = timm.create_model(architecture, num_classes=7, img_size=size).eval()
    theirs.load_state_dict(checkpoint_filter_fn(published.state_dict(), theirs))
    model = select.build("backbones", name, frames=2, size=size, variant=variant).eval()
    weights.load(model, tmp_path / "timm.pth")
    clip = torch.randn(1, 2, 3, size, size)
    with torch.no_grad():
        want = theirs.forward_features(clip[0])
        for part, kept in (("all", slice(None)), ("class", slice(1)), ("patch", slice(1, None))):
            model.tokens = part
            tokens = model(clip)
            assert _apart(rearrange(tokens.values, "1 (t n) D -> t n D", t=2), want[:, kept]) <= 1e-5
            assert tokens.positions.shape[0] == tokens.values.shape[1]


@pytest.fixture(scope="module", params=RESNET)
def resnet(request):
    torch.manual_seed(0)
    return request.param, _stirred(getattr(tv, request.param)(weights=None)).eval()


@pytest.mark.parametrize(("stage", "cells"), [("layer3", 4), ("layer4", 2)])
def test_resnet_tokens_are_torchvisions_stages(resnet, stage, cells, tmp_path):
    variant, network = resnet
    torch.save(network.state_dict(), tmp_path / "resnet.pth")
    model = select.build("backbones", "resnet2d", frames=3, size=64, variant=variant, stage=stage).eval()
    weights.load(model, tmp_path / "resnet.pth")
    clip = torch.randn(2, 3, 3, 64, 64)
    theirs = _hooked(network, stage, clip.flatten(0, 1))
    with torch.no_grad():
        tokens = model(clip)
        model.pool = "average"
        averaged = model(clip)
    assert _apart(rearrange(tokens.values, "b (t h w) D -> (b t) D h w", t=3, h=cells), theirs) <= 1e-5
    assert _apart(averaged.values.flatten(0, 1), theirs.mean(dim=(2, 3))) <= 1e-5
    assert model.width == theirs.shape[1]
    assert torch.allclose(averaged.positions, torch.tensor([[1 / 6, 0.5, 0.5], [0.5, 0.5, 0.5], [5 / 6, 0.5, 0.5]]))
    assert torch.allclose(tokens.positions[cells**2], torch.tensor([0.5, 0.5 / cells, 0.5 / cells]))


def test_resnet_trains_as_torchvisions_and_frozen_keeps_its_statistics():
    torch.manual_seed(0)
    network = _stirred(tv.resnet18(weights=None)).train()
    model, frozen = (
        select.build("backbones", "resnet2d", frames=2, size=32, batch_norm=mode).train() for mode in ("train", "frozen")
    )
    for part in (model, frozen):
        part.load_state_dict(part.published_state(copy.deepcopy(network.state_dict())))
    before = {k: v.clone() for k, v in frozen.state_dict().items() if "running" in k or "tracked" in k}
    clip = torch.randn(4, 2, 3, 32, 32)
    theirs = _hooked(network, "layer4", clip.flatten(0, 1))
    assert _apart(model(clip).values.flatten(0, 1), theirs.flatten(1)) <= 1e-4
    after = model.published_state(network.state_dict())
    assert all(torch.allclose(after[k], v, rtol=1e-4, atol=1e-6) for k, v in model.state_dict().items())
    assert any((after[k] - v).abs().max() > 0.01 for k, v in before.items())
    frozen(clip).values.sum().backward()
    assert before and all(torch.equal(v, frozen.state_dict()[k]) for k, v in before.items())
    assert frozen.stem.conv1.weight.grad is not None and not frozen.stem.bn1.weight.requires_grad


def test_a_schedule_finds_resnets_stages_by_name():
    model = _meta("resnet2d", stage="layer4")
    assert [name for name, _ in model.named_children()] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert list(model.blocks) == list(model.children())
    assert not any("layer4" in name for name in _meta("resnet2d", stage="layer3").state_dict())


def _of_torchvision(name, variant, **options):
    torch.manual_seed(0)
    return _stirred(BUILDERS[name, variant](weights=None, num_classes=4, **options)).eval()


def test_mvit_v1_tokens_are_torchvisions():
    network = _of_torchvision("mvit", "v1b")
    model = select.build("backbones", "mvit", frames=16, size=224, variant="v1b").eval()
    model.load_state_dict(model.published_state(network.state_dict()))
    clip = torch.randn(1, 16, 3, 224, 224)
    theirs = _hooked(network, "norm", clip.transpose(1, 2))
    with torch.no_grad():
        tokens = model(clip)
    assert _apart(tokens.values, theirs) <= 1e-5
    assert tokens.values.shape == (1, 1 + 8 * 7 * 7, 768)


@pytest.mark.parametrize(("frames", "size"), [(2, 224), (16, 64), (2, 112), (6, 48)])
def test_mvit_v2_tokens_are_torchvisions(frames, size):
    """At the published size in space, in time, and at others: there, torchvision's network resamples its tables to the grid."""
    network = _of_torchvision("mvit", "v2s")
    model = select.build("backbones", "mvit", frames=frames, size=size).eval()
    model.load_state_dict(model.published_state(network.state_dict()))
    network.pos_encoding.temporal_size, network.pos_encoding.spatial_size = frames // 2, (size // 4, size // 4)
    clip = torch.randn(1, frames, 3, size, size)
    want = _hooked(network, "norm", clip.transpose(1, 2))
    with torch.no_grad():
        for part, kept in (("all", slice(None)), ("class", slice(1)), ("patch", slice(1, None))):
            model.tokens = part
            tokens = model(clip)
            assert _apart(tokens.values, want[:, kept]) <= 1e-5
            assert tokens.positions.shape[0] == tokens.values.shape[1]


def test_mvit_takes_odd_clips_and_places_its_tokens():
    tokens = select.build("backbones", "mvit", frames=3, size=60).eval()(torch.randn(1, 3, 3, 60, 60))
    assert tokens.values.shape == (1, 1 + 2 * 2 * 2, 768) and tokens.values.isfinite().all()
    assert tokens.positions[0].tolist() == [0.5, 0.5, 0.5] and tokens.positions[2].tolist() == [0.25, 0.25, 0.75]


def test_mvit_v1_takes_its_own_clip_alone():
    with pytest.raises(ValueError, match=r"frames=16, size=224; given frames=16, size=112.*variant=v2s"):
        _meta("mvit", 16, 112, variant="v1b")


@pytest.mark.parametrize(
    ("frames", "size"),
    [
        (32, 56),  # two whole windows in each axis: all eight parts of a shifted window are cells of the clip
        (20, 64),  # ten cells in time, 16 in space: windows shifted in all axes, padded in all
        (4, 224),  # the published size in space: 56 and 28 are whole windows
        (2, 112),  # one cell in time; 7 cells, then 4, are one window
        (3, 50),  # frames and pixels that patches do not tile, odd grids to merge
    ],
)
def test_swin_tokens_are_torchvisions(frames, size):
    network = _of_torchvision("swin3d", "t")
    model = select.build("backbones", "swin3d", frames=frames, size=size).eval()
    model.load_state_dict(model.published_state(network.state_dict()))
    clip = torch.randn(2 if size < 224 else 1, frames, 3, size, size)
    theirs = _hooked(network, "norm", clip.transpose(1, 2))
    with torch.no_grad():
        tokens = model(clip)
    assert _apart(tokens.values, theirs.flatten(1, 3)) <= 1e-5
    assert tokens.positions.shape[0] == tokens.values.shape[1]


def test_swins_gradients_are_torchvisions():
    network = _of_torchvision("swin3d", "t").train()
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    model = select.build("backbones", "swin3d", frames=18, size=32).train()
    model.load_state_dict(model.published_state(network.state_dict()))
    clip, weight = torch.randn(1, 18, 3, 32, 32), torch.randn(1, 9, 768)
    (model(clip).values * weight).sum().backward()
    seen = []
    network.norm.register_forward_hook(lambda _module, _args, out: seen.append(out))
    network(clip.transpose(1, 2))
    (seen[0].flatten(1, 3) * weight).sum().backward()
    ours, theirs = dict(model.named_parameters()), dict(network.named_parameters())
    assert set(theirs) - set(ours) == {"head.weight", "head.bias"}
    for name, parameter in ours.items():
        scale = theirs[name].grad.abs().max()
        assert (parameter.grad - theirs[name].grad).abs().max() <= 1e-4 * scale, name


def _never_called(model, *clip):
    called = set()
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    model(*clip)
    for handle in handles:
        handle.remove()
    return {name.rpartition(".")[0] for name, _ in model.named_parameters()} - called


@pytest.mark.parametrize(("name", "variant", "published", "frames"), TORCHVISIONS)
def test_zero3_can_gather_every_variant(name, variant, published, frames):
    model = _meta(name, frames, variant=variant)
    assert not _never_called(model, torch.empty(1, frames, 3, 224, 224, device="meta"))


def test_torchvisions_swin_is_what_zero3_cannot_gather():
    """Why attention is written anew; once this fails, torchvision's own will do."""
    with torch.device("meta"):
        network = video.swin3d_t(weights=None)
    missed = _never_called(network, torch.empty(1, 3, 2, 32, 32, device="meta"))
    assert missed == {
        f"features.{s}.{b}.attn.{p}" for s, n in ((0, 2), (2, 2), (4, 6), (6, 2)) for b in range(n) for p in ("qkv", "proj")
    }


@pytest.mark.parametrize(("name", "last"), [("mvit", 0.2), ("swin3d", 0.1)])
def test_stochastic_depth_grows_to_what_is_asked_for(name, last):
    """As torchvision's builders set it by themselves, and in proportion."""
    variant = {"mvit": "v2s", "swin3d": "t"}[name]

    def shares(model):
        return [m.p for m in model.modules() if isinstance(m, StochasticDepth)]

    with torch.device("meta"):
        theirs = shares(BUILDERS[name, variant](weights=None))
    assert max(theirs) == pytest.approx(last)
    assert shares(_meta(name, stochastic_depth=last)) == pytest.approx(theirs)
    assert shares(_meta(name, stochastic_depth=last / 2)) == pytest.approx([p / 2 for p in theirs])
    assert not any(shares(_meta(name)))
    with pytest.raises(ValueError, match=r"stochastic_depth is a share.*given 1"):
        _meta(name, stochastic_depth=1.0)


@pytest.mark.parametrize(("name", "variant"), BUILDERS)
def test_torchvisions_file_fits_every_variant_and_no_other(name, variant):
    with torch.device("meta"):
        state = BUILDERS[name, variant](weights=None).state_dict()
    for other_name, other in BUILDERS:
        model = _meta(other_name, variant=other)
        fits = BUILDERS[other_name, other] is BUILDERS[name, variant]
        if fits:
            weights.check(model, model.published_state(state), said="file")
        else:
            with pytest.raises(ValueError, match="file look like another architecture"):
                weights.check(model, model.published_state(state), said="file")


@pytest.mark.parametrize(("name", "variant"), BUILDERS)
def test_published_weights_of_videos_are_torchvisions(name, variant, monkeypatch, tmp_path):
    with torch.device("meta"):
        state = BUILDERS[name, variant](weights=None).state_dict()
    torch.save({key: torch.zeros(1).expand(value.shape) for key, value in state.items()}, tmp_path / "file.pth")
    published = (MVIT if name == "mvit" else SWIN)[variant]

    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hubs, "_answer", unreachable)
    missing = weights.loaded(_fresh(name, pretrained=True, variant=variant)).missing
    with pytest.raises(ValueError, match=r"no route to host.*give weights=<its path>") as caught:
        missing.ask()
    assert published.url in str(caught.value)
    assert published.url.rpartition("-")[2] == f"{missing.digest}.pth"
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    (tmp_path / "file.pth").rename(tmp_path / "hub/checkpoints" / published.url.rpartition("/")[2])
    assert weights.loaded(_fresh(name, pretrained=True, variant=variant)).missing is None


@pytest.mark.parametrize(
    ("name", "variant", "model"),
    [
        ("clip", "vitb32", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("clip", "vitb16", "vit_base_patch16_clip_quickgelu_224.openai"),
        ("clip", "vitl14", "vit_large_patch14_clip_quickgelu_224.openai"),
        ("clip", "vitl14_336", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("vit", "vits16", "vit_small_patch16_224.augreg_in21k"),
        ("vit", "vitb16", "vit_base_patch16_224.augreg_in21k"),
        ("vit", "vitl16", "vit_large_patch16_224.augreg_in21k"),
        ("resnet2d", "resnet18", "resnet18.tv_in1k"),
        ("resnet2d", "resnet34", "resnet34.tv_in1k"),
        ("resnet2d", "resnet50", "resnet50.tv_in1k"),
    ],
)
def test_published_weights_of_pictures_are_where_timm_has_them(name, variant, model, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    file = tmp_path / "model.safetensors"
    file.touch()

    def cached(repository, _file, revision):
        asked.append(repository)
        return str(file)

    with torch.device("meta"):
        state = timm.create_model(model, num_classes=1).state_dict()
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(weights, "load_file", lambda _path: state)
    size = 336 if "336" in variant else 224
    built = _fresh(name, 1, size, variant=variant, pretrained=True)
    published = timm.get_pretrained_cfg(model)
    assert asked == [published.hf_hub_id] and published.hf_hub_id.startswith("timm/")
    assert (built.mean, built.std) == (published.mean, published.std)


@pytest.mark.parametrize(("name", "variant", "published"), [row[:3] for row in TORCHVISIONS if row[0] in ("mvit", "swin3d")])
def test_videos_are_normalised_as_torchvision_does(name, variant, published):
    model, transform = _meta(name, variant=variant), published.transforms()
    assert (model.mean, model.std) == (tuple(transform.mean), tuple(transform.std))
