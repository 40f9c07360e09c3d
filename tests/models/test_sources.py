"""Backbones held to their sources: parameter counts and numbers of the libraries' own forwards."""

import copy

import pytest
import timm
import torch
from einops import rearrange
from torchvision.models.video import R3D_18_Weights, r3d_18

from vidfuse.models import select


def _meta(name, size=224, **options):
    with torch.device("meta"):
        return select.build("backbones", name, frames=16, size=size, **options)


def _millions(model):
    return sum(p.numel() for p in model.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "variant", "published", "width"),
    [
        # DINOv3, arXiv:2508.10104, the distilled ViT family: S 21 M, S+ 29 M, B 86 M, L 300 M; timm's cards: 28.7, 85.6.
        ("dinov3", "vits16", 21.6, 384),
        ("dinov3", "vits16plus", 28.7, 384),
        ("dinov3", "vitb16", 85.6, 768),
        ("dinov3", "vitl16", 303.1, 1024),
        # DINOv2's model card: S 21 M, B 86 M, L 300 M, without position embeddings; timm's cards: 22.1, 86.6, 304.4.
        ("dinov2", "vits14", 22.1, 384),
        ("dinov2", "vits14reg", 22.1, 384),
        ("dinov2", "vitb14", 86.6, 768),
        ("dinov2", "vitl14", 304.4, 1024),
    ],
)
def test_transformers_have_the_published_size(name, variant, published, width):
    model = _meta(name, variant=variant)
    assert _millions(model) == pytest.approx(published, abs=0.06)
    assert model.width == width


def test_r3d_has_the_published_size():
    classifier = 400 * 512 + 400
    published = R3D_18_Weights.KINETICS400_V1.meta["num_params"]
    assert published == 33_371_472
    assert sum(p.numel() for p in _meta("r3d").parameters()) == published - classifier


@pytest.mark.parametrize(
    ("name", "size", "variant"), [("dinov2", 70, "vits14"), ("dinov2", 70, "vits14reg"), ("dinov3", 64, "vits16plus")]
)
def test_transformer_tokens_are_timms_own(name, size, variant):
    torch.manual_seed(0)
    model = select.build("backbones", name, frames=2, size=size, variant=variant).eval()
    with torch.no_grad():  # published layer scales are not 1e-5; with that a block would hardly show
        for key, parameter in model.named_parameters():
            if "gamma" in key or "norm" in key or "token" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    clip = torch.randn(1, 2, 3, size, size)
    reference = copy.deepcopy(model.vit)
    if name == "dinov2":  # timm resamples the published grid when a model of another size takes its weights
        kept = timm.create_model(reference.pretrained_cfg["architecture"], img_size=size, num_classes=0)
        from timm.models.vision_transformer import checkpoint_filter_fn

        kept.load_state_dict(checkpoint_filter_fn(reference.state_dict(), kept))
        reference = kept.eval()
    with torch.no_grad():
        theirs = reference.forward_features(clip[0])
        ours = {"all": model(clip)}
        for part in ("class", "patch"):
            model.tokens = part
            ours[part] = model(clip)
    prefix = model.vit.num_prefix_tokens
    want = {"class": theirs[:, :1], "patch": theirs[:, prefix:]}
    want["all"] = torch.cat((want["class"], want["patch"]), dim=1)
    for part, tokens in ours.items():
        assert (rearrange(tokens.values, "1 (t n) d -> t n d", t=2) - want[part]).abs().max() <= 1e-5
        assert tokens.positions.shape[0] == tokens.values.shape[1]


def test_transformer_positions_are_frames_and_patch_centres():
    model = _meta("dinov3", size=32)
    positions = model(torch.empty(1, 4, 3, 32, 32, device="meta")).positions
    frame = positions[5:10]  # the second of four frames
    assert torch.equal(frame[:, 0], torch.full((5,), 1.5 / 4))
    assert frame[:, 1:].tolist() == [[0.5, 0.5], [0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = r3d_18(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network


@pytest.mark.parametrize(("stage", "times"), [("layer2", 8), ("layer3", 4), ("layer4", 2)])
def test_r3d_tokens_are_torchvisions_stages(network, stage, times):
    model = select.build("backbones", "r3d", frames=16, size=32, stage=stage).eval()
    model.load_state_dict(model.published_state(network.state_dict()))
    clip = torch.randn(1, 16, 3, 32, 32)
    seen = []
    handle = getattr(network, stage).register_forward_hook(lambda _module, _args, out: seen.append(out))
    with torch.no_grad():
        network(rearrange(clip, "B T C H W -> B C T H W"))
        tokens = model(clip)
    handle.remove()
    assert seen[0].shape[2] == times
    assert torch.equal(tokens.values, seen[0].flatten(2).mT)
    moments = tokens.positions[:, 0].unique()
    assert torch.allclose(moments, (torch.arange(times) + 0.5) / times)
    assert not any(key.startswith("layer4") for key in model.state_dict()) or stage == "layer4"


def test_r3d_segments_are_windows_that_went_through_alone(network):
    build = {"frames": 16, "size": 32, "stage": "layer4"}
    model = select.build("backbones", "r3d", **build, segments=8).eval()
    plain = select.build("backbones", "r3d", **build).eval()
    for each in (model, plain):
        each.load_state_dict(each.published_state(network.state_dict()))
    clip = torch.randn(2, 16, 3, 32, 32)
    with torch.no_grad():
        tokens = model(clip)
        starts = [0, 2, 3, 5, 7, 9, 10, 12]  # i * 12 / 7, to the nearest
        alone = [
            plain(clip[:, start : start + 4]).values for start in starts
        ]  # of 4 frames one position is left, of 2 x 2 cells
    want = torch.cat([rearrange(a, "B (t c) D -> B t c D", c=4).mean(1) for a in alone], dim=1)
    assert tokens.values.shape == (2, 8 * 4, 512)
    torch.testing.assert_close(tokens.values, want, rtol=1e-5, atol=1e-5)
    assert torch.allclose(tokens.positions[::4, 0], torch.tensor([(s + 2) / 16 for s in starts]))
    assert tokens.positions[:4, 1:].tolist() == [[0.25, 0.25], [0.25, 0.75], [0.75, 0.25], [0.75, 0.75]]


def test_more_segments_than_frames():
    with pytest.raises(ValueError, match="a clip of 4 frames has 1 to 4 segments, given 8"):
        select.build("backbones", "r3d", frames=4, size=32, segments=8)


def test_r3d_with_frozen_batch_norm_keeps_its_statistics():
    model = select.build("backbones", "r3d", frames=4, size=32, stage="layer2", batch_norm="frozen").train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    model(torch.randn(2, 4, 3, 32, 32)).values.sum().backward()
    assert before and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm3d)]
    assert norms and not any(n.training or n.weight.requires_grad for n in norms)
    assert model.stem[0].weight.grad is not None


@pytest.mark.parametrize(
    ("name", "size", "near"), [("dinov2", 112 + 4, "112 and 126"), ("dinov3", 100, "96 and 112"), ("dinov3", 9, "16")]
)
def test_a_size_the_patches_do_not_tile_names_the_nearest(name, size, near):
    with pytest.raises(ValueError, match=f"size {size} is not tiled.*{near}"):
        _meta(name, size=size)
