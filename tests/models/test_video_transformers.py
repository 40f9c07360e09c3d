"""Video transformers held to their sources: sizes and operations of the papers, numbers of the library's own forward."""

import logging

import pytest
import torch
import transformers as hf
from einops import rearrange
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from vidfuse.models import select, weights

FRAMES, SIZE = 4, 48


def _build(name, frames=FRAMES, size=SIZE, **options):
    torch.manual_seed(3)
    return select.build("backbones", name, frames=frames, size=size, **options).eval()


def _meta(name, frames=2, size=32, **options):
    with torch.device("meta"):
        return _build(name, frames, size, **options)


def _count(model):
    return sum(p.numel() for p in model.parameters())


def _giga_multiply_adds(name, frames, size, **options):
    model = _meta(name, frames, size, **options)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(torch.empty(1, frames, 3, size, size, device="meta"))
    return counted.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("variant", "depth", "width", "published"), [("vits16", 12, 384, 22), ("vitb16", 12, 768, 87), ("vitl16", 24, 1024, 305)]
)
def test_videomae_has_the_published_size(variant, depth, width, published):
    """VideoMAE, arXiv:2203.12602, table 6: 22, 87 and 305 million parameters, how rounded is not said.

    With a norm and a classifier of 400 classes they are 22.0, 86.5 and 304.3, here as in the authors' code (keys have no bias).
    """
    model = _meta("videomae", variant=variant, checkpoint="kinetics")
    block = 4 * width * width + 3 * width + 8 * width * width + 5 * width + 4 * width
    assert _count(model) == depth * block + 2 * 3 * 16 * 16 * width + width
    assert (_count(model) + 2 * width + 400 * (width + 1)) / 1e6 == pytest.approx(published, abs=0.8)
    assert model.width == width


@pytest.mark.parametrize(("variant", "published"), [("vits16", 57), ("vitb16", 180), ("vitl16", 597)])
def test_videomae_has_the_published_operations(variant, published):
    """VideoMAE, arXiv:2203.12602, table 6: GFLOPs (multiply-adds) of a view of 16 x 224 x 224."""
    assert _giga_multiply_adds("videomae", 16, 224, variant=variant) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("attention", "published"), [("divided", 121.4), ("joint", 85.9), ("space_only", 85.9)])
def test_timesformer_has_the_published_size(attention, published):
    """TimeSformer, arXiv:2102.05095, table 1; its numbers are those with the 174 classes of Something-Something V2."""
    model = _meta("timesformer", 8, 224, attention=attention)
    assert round((_count(model) + 174 * (768 + 1)) / 1e6, 1) == published


def test_timesformer_has_the_published_operations():
    """TimeSformer, arXiv:2102.05095, table 2: 0.59 TFLOPs (multiply-adds) for 3 views of 8 x 224 x 224."""
    assert 3 * _giga_multiply_adds("timesformer", 8, 224) == pytest.approx(590, rel=0.02)


@pytest.mark.parametrize(
    ("variant", "published", "shape"),
    [
        ("vitl16", 300, (24, 1024, 4096)),
        ("vith16", 600, (32, 1280, 5120)),
        ("vitg16", 1000, (40, 1408, 6144)),
        ("vitg16_384", 1000, (40, 1408, 6144)),
    ],
)
def test_vjepa2_has_the_published_size(variant, published, shape):
    """The table of checkpoints in V-JEPA 2's repository: 300M, 600M, 1B; it states no operations.

    Depth, width and hidden width are those of the ViT family (arXiv:2106.04560, table 2; g as there), which give the exact count.
    """
    depth, width, hidden = shape
    model = _meta("vjepa2", variant=variant)
    block = 4 * width * (width + 1) + (2 * width + 1) * hidden + width + 4 * width
    assert _count(model) == depth * block + 2 * 3 * 16 * 16 * width + width + 2 * width
    assert round(_count(model) / 1e6, -2) == published


def _noisy(reference):
    """Norms that are ones, and biases and embeddings that are zeros, would hide that they are not loaded."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return reference.eval()


def _videomae(kind, depth=2):
    config = hf.VideoMAEConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        num_hidden_layers=depth,
        num_frames=FRAMES,
        image_size=SIZE,
        use_mean_pooling=kind == "VideoMAEForVideoClassification",
        decoder_num_hidden_layers=1,
        attn_implementation="eager",
    )
    return _noisy(getattr(hf, kind)(config))


def _timesformer(attention, frames=FRAMES, size=SIZE):
    config = hf.TimesformerConfig(num_hidden_layers=2, num_frames=frames, image_size=size, attention_type=attention)
    return _noisy(hf.TimesformerForVideoClassification(config))


def _vjepa2(kind):
    config = hf.VJEPA2Config(
        num_hidden_layers=2,
        pred_num_hidden_layers=1,
        num_pooler_layers=1,
        frames_per_clip=FRAMES,
        crop_size=SIZE,
        attn_implementation="eager",
    )
    return _noisy(getattr(hf, kind)(config))


CASES = {
    "videomae pretraining": (
        lambda: _videomae("VideoMAEForPreTraining"),
        "videomae",
        {"variant": "vits16"},
    ),
    "videomae classifier": (
        lambda: _videomae("VideoMAEForVideoClassification"),
        "videomae",
        {"variant": "vits16", "checkpoint": "kinetics"},
    ),
    "videomae bare": (lambda: _videomae("VideoMAEForPreTraining").videomae, "videomae", {"variant": "vits16"}),
    "timesformer divided": (lambda: _timesformer("divided_space_time"), "timesformer", {"attention": "divided"}),
    "timesformer joint": (lambda: _timesformer("joint_space_time"), "timesformer", {"attention": "joint"}),
    "timesformer space": (lambda: _timesformer("space_only"), "timesformer", {"attention": "space_only"}),
    "vjepa2 predictor": (lambda: _vjepa2("VJEPA2Model"), "vjepa2", {}),
    "vjepa2 classifier": (lambda: _vjepa2("VJEPA2ForVideoClassification"), "vjepa2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_the_library_writes_loads_strictly_and_gives_its_numbers(case, tmp_path, caplog):
    make, name, options = CASES[case]
    reference = make()
    reference.save_pretrained(tmp_path)
    model = _build(name, depth=2, **options)
    with caplog.at_level(logging.INFO):
        weights.load(model, tmp_path / "model.safetensors")
    assert ("are not used" in caplog.text) == (case != "videomae bare")
    assert ("CC-BY-NC 4.0" in caplog.text) == (name != "vjepa2")
    clip = torch.randn(2, FRAMES, 3, SIZE, SIZE)
    base = getattr(reference, reference.base_model_prefix, reference)
    with torch.no_grad():
        expected = base(clip).last_hidden_state
        tokens = model(clip).values
    expected = rearrange(expected, "(B T) n D -> B (T n) D", B=2)
    assert expected.std() > 0.1
    assert (tokens - expected).abs().max() <= 1e-5


def test_files_of_videomae_have_the_names_of_the_hub(tmp_path):
    """The biases of the hub's files are named as by the library before its version 5; that it still writes them shows here."""
    _videomae("VideoMAEForPreTraining").save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "videomae.encoder.layer.0.attention.attention.q_bias" in file.keys()  # noqa: SIM118


def test_fewer_blocks_are_the_first_of_the_file(tmp_path):
    reference = _videomae("VideoMAEForVideoClassification", depth=12)
    reference.save_pretrained(tmp_path)
    model = _build("videomae", variant="vits16", checkpoint="kinetics", depth=3)
    weights.load(model, tmp_path / "model.safetensors")
    assert len(model.blocks) == 3
    clip = torch.randn(1, FRAMES, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = reference.videomae(clip, output_hidden_states=True).hidden_states[3]
        assert (model(clip).values - expected).abs().max() <= 1e-5


def test_own_weights_load_again(tmp_path):
    for name in ("videomae", "timesformer", "vjepa2"):
        model, other = (_build(name, depth=1) for _ in range(2))
        _noisy(model)
        torch.save(model.state_dict(), tmp_path / "w.pt")
        weights.load(other, tmp_path / "w.pt")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "checkpoint", "fitting"),
    [
        ("VideoMAEForPreTraining", "ssv2", "checkpoint=pretrain"),
        ("VideoMAEForVideoClassification", "pretrain", "checkpoint=kinetics or ssv2"),
    ],
)
def test_a_videomae_of_the_other_training_is_told(kind, checkpoint, fitting, tmp_path):
    _videomae(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=fitting):
        weights.load(_build("videomae", variant="vits16", checkpoint=checkpoint, depth=2), tmp_path / "model.safetensors")


def test_a_file_of_another_variant_or_attention_is_refused(tmp_path):
    _videomae("VideoMAEForPreTraining").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        weights.load(_build("videomae", variant="vitb16", depth=2), tmp_path / "model.safetensors")
    _timesformer("divided_space_time").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: timesformer\.encoder\.layer\.0\.temporal_"):
        weights.load(_build("timesformer", attention="joint", depth=2), tmp_path / "model.safetensors")


@pytest.mark.parametrize(("frames", "size"), [(3, SIZE), (16, SIZE), (FRAMES, 32), (6, 80)])
def test_timesformers_positions_are_resampled_as_the_library_does_at_inference(frames, size, tmp_path):
    reference = _timesformer("divided_space_time")
    reference.save_pretrained(tmp_path)
    model = _build("timesformer", frames, size, depth=2)
    weights.load(model, tmp_path / "model.safetensors")
    clip = torch.randn(1, frames, 3, size, size)
    with torch.no_grad():
        expected = reference.timesformer.embeddings(clip)
        assert (model.timesformer.embeddings(clip) - expected).abs().max() <= 1e-5
        assert model(clip).values.shape == (1, 1 + frames * (size // 16) ** 2, 768)


@pytest.mark.parametrize(
    ("name", "options", "time"),
    [
        ("videomae", {}, 0.75),
        ("vjepa2", {}, 0.75),
        ("timesformer", {"attention": "divided"}, 0.625),
        ("timesformer", {"attention": "joint"}, 0.625),
        ("timesformer", {"attention": "space_only"}, 0.625),
    ],
)
def test_the_token_of_a_patch_has_its_place(name, options, time):
    """Other pixels in one patch change one token of what the first block is given: the one at the patch."""
    model = _build(name, depth=1, **options)
    given = []
    model.blocks[0].register_forward_pre_hook(lambda _module, args: given.append(rearrange(args[0], "b n D -> (b n) D")))
    clip = torch.randn(1, FRAMES, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens = model(clip)
        clip[:, 2, :, 16:32, 32:48] += 1
        model(clip)
    changed = (given[0] != given[1]).any(dim=-1).nonzero()
    assert len(changed) == 1
    torch.testing.assert_close(tokens.positions[changed[0, 0]], torch.tensor([time, 0.5, 5 / 6]))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("videomae", {"checkpoint": "kinetics", "variant": "vits16"}),
        ("timesformer", {"attention": "joint"}),
        ("timesformer", {"attention": "space_only"}),
    ],
)
def test_gradients_reach_every_parameter_also_with_other_options(name, options):
    model = _build(name, depth=2, **options).train()
    values = model(torch.randn(1, FRAMES, 3, SIZE, SIZE)).values
    (values * torch.randn_like(values)).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_videomaes_positions_are_where_its_weights_are_and_in_no_file():
    model = _build("videomae", variant="vits16", depth=1)
    assert "videomae.embeddings.position_embeddings" in dict(model.named_buffers())
    assert not [key for key in model.state_dict() if "position" in key]


@pytest.mark.parametrize(
    ("name", "options", "repository"),
    [
        ("videomae", {}, "MCG-NJU/videomae-base"),
        ("videomae", {"variant": "vits16", "checkpoint": "ssv2"}, "MCG-NJU/videomae-small-finetuned-ssv2"),
        ("timesformer", {}, "facebook/timesformer-base-finetuned-k400"),
        ("timesformer", {"checkpoint": "ssv2"}, "facebook/timesformer-base-finetuned-ssv2"),
        ("vjepa2", {}, "facebook/vjepa2-vitl-fpc64-256"),
        ("vjepa2", {"variant": "vitg16_384"}, "facebook/vjepa2-vitg-fpc64-384"),
    ],
)
def test_pretrained_loads_the_hubs_file(name, options, repository, monkeypatch, tmp_path):
    asked = []
    kept = _meta(name, FRAMES, SIZE, depth=1, **options).state_dict()
    torch.save({key: torch.zeros(1).expand(value.shape) for key, value in kept.items()}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(weights, "from_hub", lambda repository: asked.append(repository) or tmp_path / "pytorch_model.bin")
    model = _build(name, depth=1, pretrained=True, **options)
    assert asked == [repository]
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("videomae", {"frames": 5}, "5 frames are not tiled by tubelets of 2 frames; nearest that are: 4 and 6"),
        ("vjepa2", {"frames": 1}, "1 frames are not tiled by tubelets of 2 frames; nearest that are: 2"),
        ("timesformer", {"frames": 0}, "1 frame or more, given 0"),
        ("videomae", {"size": 50}, "size 50 is not tiled by patches of 16 x 16 pixels; nearest that are: 48 and 64"),
        ("timesformer", {"size": 50}, "nearest that are: 48 and 64"),
        ("vjepa2", {"size": 50}, "nearest that are: 48 and 64"),
        ("videomae", {"depth": 13}, "1 to 12 of this variant, or null for all; given 13"),
        ("timesformer", {"depth": 0}, "1 to 12 of this variant, or null for all; given 0"),
        ("vjepa2", {"variant": "vith16", "depth": 33}, "1 to 32 of this variant"),
        (
            "videomae",
            {"variant": "vits16", "pretrained": True},
            "vits16 has no published pretrain weights; there are: vits16 kin",
        ),
        ("timesformer", {"attention": "joint", "pretrained": True}, "attention=divided alone, given attention=joint"),
    ],
)
def test_what_cannot_be_is_told(name, options, said):
    with pytest.raises(ValueError, match=said):
        _meta(name, **{"depth": 1, **options})
