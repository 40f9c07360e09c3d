"""Networks for pictures as networks for clips: held to torchvision's own on a still clip."""

import pytest
import torch
from torchvision.models import googlenet, resnet50

from vidfuse.models import select, weights


def _random(network):
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            torch.nn.init.normal_(module.bias, 0, 0.1, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return _random(resnet50(weights=None))


@pytest.fixture
def file(resnet, tmp_path):
    torch.save(resnet.state_dict(), tmp_path / "resnet50.pth")
    return tmp_path / "resnet50.pth"


def _middle(tokens, channels):
    """The cells of the position in the middle of time, whose neighbours are clips' and not padding."""
    cells = tokens.values.reshape(1, -1, int((tokens.positions[:, 0] == tokens.positions[0, 0]).sum()), channels)
    return cells[:, cells.shape[1] // 2]


@pytest.mark.parametrize(("stage", "frames", "layers"), [("stage4", 34, 3), ("stage5", 40, 4)])
def test_on_a_still_clip_an_inflated_i3d_is_torchvisions_resnet(resnet, file, stage, frames, layers):
    """Padding in time reaches 2 frames of the stem, 3 of stage2, then (halved) 2, 3 and 1 of the later stages: 9 of 20 positions."""
    model = select.build("backbones", "i3d", frames=frames, size=64, stage=stage, inflate=True).eval()
    weights.load(model, file)
    picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(picture))))
        for number in range(layers):
            x = getattr(resnet, f"layer{number + 1}")(x)
        found = _middle(model(picture[:, None].expand(-1, frames, -1, -1, -1)), model.width)
    want = x.flatten(2).mT
    assert want.std() > 0.01
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()


def test_filters_keep_their_sum_and_pictures_their_normalisation(resnet, file):
    model = select.build("backbones", "i3d", frames=8, size=64, inflate=True)
    weights.load(model, file)
    stem = model.blocks[0].conv.weight
    assert stem.shape == (64, 3, 5, 7, 7)
    torch.testing.assert_close(stem.sum(2), resnet.conv1.weight)
    assert model.mean == (0.485, 0.456, 0.406) and model.std == (0.229, 0.224, 0.225)
    assert select.build("backbones", "i3d", frames=8, size=64).mean == (0.45, 0.45, 0.45)


def test_timms_resnet50_has_the_same_names(resnet):
    import timm

    with torch.device("meta"):
        theirs = timm.create_model("resnet50.tv_in1k").state_dict()
        model = select.build("backbones", "i3d", frames=8, size=64, inflate=True)
        weights.check(model, model.published_state(theirs), said="file")
    assert {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in resnet.state_dict().items()}


def test_a_file_of_before_batches_were_counted_is_taken(resnet, tmp_path):
    old = {k: v for k, v in resnet.state_dict().items() if "num_batches" not in k}
    torch.save(old, tmp_path / "old.pth")
    weights.load(select.build("backbones", "i3d", frames=8, size=64, inflate=True), tmp_path / "old.pth")


def test_inflation_is_on_request_and_strict(resnet, file, tmp_path):
    with torch.device("meta"):
        plain = select.build("backbones", "i3d", frames=8, size=64)
        inflating = select.build("backbones", "i3d", frames=8, size=64, inflate=True)
        with pytest.raises(
            ValueError, match="the file is of a ResNet-50 for pictures; for this file give the option inflate=true"
        ):
            weights.load(plain, file)
        with pytest.raises(ValueError, match="the file is of an I3D; for this file give the option inflate=false"):
            inflating.published_state(plain.state_dict())
    state = resnet.state_dict()
    del state["layer3.5.bn2.running_var"]
    state["layer1.0.conv2.weight"] = torch.zeros(64, 64, 5, 5)
    torch.save(state, tmp_path / "x.pth")
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"1 missing: .*norm_b\.running_var; 1 of another shape: .*conv_b"),
    ):
        weights.load(inflating, tmp_path / "x.pth")


def test_an_inflated_inception_is_torchvisions_on_a_still_clip(tmp_path):
    """torchvision pads its first convolution by 3 on both sides; TensorFlow, and I3D, by 2 and 3."""
    torch.manual_seed(0)
    network = _random(googlenet(weights=None, aux_logits=True, init_weights=False))
    torch.save(network.state_dict(), tmp_path / "googlenet.pth")
    model = select.build("backbones", "inception_i3d", frames=96, size=64, stage="Mixed_4f", inflate=True).eval()
    weights.load(model, tmp_path / "googlenet.pth")
    whole = select.build("backbones", "inception_i3d", frames=96, size=64, inflate=True)
    weights.load(whole, tmp_path / "googlenet.pth")
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    network.conv1.conv.padding = (0, 0)
    with torch.no_grad():
        x = network.maxpool1(network.conv1(torch.nn.functional.pad(picture, (2, 3, 2, 3))))
        x = network.maxpool2(network.conv3(network.conv2(x)))
        x = network.maxpool3(network.inception3b(network.inception3a(x)))
        for letter in "abcde":
            x = getattr(network, f"inception4{letter}")(x)
        found = _middle(model(picture[:, None].expand(-1, 96, -1, -1, -1)), 832)
    want = x.flatten(2).mT
    assert want.std() > 0.01
    assert (found - want).abs().max() <= 1e-4 * want.abs().max()
    with torch.device("meta"), pytest.raises(ValueError, match="give the option inflate=true"):
        weights.load(select.build("backbones", "inception_i3d", frames=16, size=64), tmp_path / "googlenet.pth")
