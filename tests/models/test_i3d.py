"""I3D-R50 held to its source: size, operations, names of the published files, numbers of a reference written from the table."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from vidfuse.models import select, weights

TABLE = {  # stage: (PyTorchVideo's number, blocks, inner width, length in time of the first convolutions, stride in space)
    2: (1, 3, 64, (3, 3, 3), 1),
    3: (3, 4, 128, (3, 1, 3, 1), 2),
    4: (4, 6, 256, (3, 1, 3, 1, 3, 1), 2),
    5: (5, 3, 512, (1, 3, 1), 2),
}


def _norm(state, name, width):
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"{name}.{part}"] = torch.rand(width) + 0.5 if part in ("weight", "running_var") else torch.randn(width) * 0.1
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def published(style):
    """A file's state, classifier included, with the names of PyTorchVideo or of PySlowFast, from the table alone."""
    torch.manual_seed(0)
    slow = style == "pyslowfast"
    state = {"s1.pathway0_stem.conv.weight" if slow else "blocks.0.conv.weight": torch.randn(64, 3, 5, 7, 7) * 0.05}
    _norm(state, "s1.pathway0_stem.bn" if slow else "blocks.0.norm", 64)
    given = 64
    for stage, (number, depth, inner, times, _) in TABLE.items():
        for i in range(depth):
            block = f"s{stage}.pathway0_res{i}" if slow else f"blocks.{number}.res_blocks.{i}"
            if i == 0:
                conv, norm = ("branch1", "branch1_bn") if slow else ("branch1_conv", "branch1_norm")
                state[f"{block}.{conv}.weight"] = torch.randn(4 * inner, given, 1, 1, 1) * given**-0.5
                _norm(state, f"{block}.{norm}", 4 * inner)
            shapes = {"a": (inner, given, times[i], 1, 1), "b": (inner, inner, 1, 3, 3), "c": (4 * inner, inner, 1, 1, 1)}
            for letter, shape in shapes.items():
                conv, norm = (letter, f"{letter}_bn") if slow else (f"conv_{letter}", f"norm_{letter}")
                fan = shape[1] * shape[2] * shape[3] * shape[4]
                state[f"{block}.branch2.{conv}.weight"] = torch.randn(shape) * fan**-0.5
                _norm(state, f"{block}.branch2.{norm}", shape[0])
            given = 4 * inner
    head = "head.projection" if slow else "blocks.6.proj"
    return state | {f"{head}.weight": torch.zeros(400, 2048), f"{head}.bias": torch.zeros(400)}


def reference(state, x):
    """Outputs of the stages, by functions over the file's tensors (PyTorchVideo's names)."""

    def norm(x, name):
        mean, var, scale, shift = (state[f"{name}.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, scale, shift, eps=1e-5)

    x = F.relu(norm(F.conv3d(x, state["blocks.0.conv.weight"], stride=(1, 2, 2), padding=(2, 3, 3)), "blocks.0.norm"))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    outputs = {}
    for stage, (number, depth, _, times, step) in TABLE.items():
        for i in range(depth):
            block, stride = f"blocks.{number}.res_blocks.{i}", (1, step, step) if i == 0 else 1
            inside = F.conv3d(x, state[f"{block}.branch2.conv_a.weight"], padding=(times[i] // 2, 0, 0))
            inside = F.relu(norm(inside, f"{block}.branch2.norm_a"))
            inside = F.conv3d(inside, state[f"{block}.branch2.conv_b.weight"], stride=stride, padding=(0, 1, 1))
            inside = F.relu(norm(inside, f"{block}.branch2.norm_b"))
            inside = norm(F.conv3d(inside, state[f"{block}.branch2.conv_c.weight"]), f"{block}.branch2.norm_c")
            if i == 0:
                x = norm(F.conv3d(x, state[f"{block}.branch1_conv.weight"], stride=stride), f"{block}.branch1_norm")
            x = F.relu(x + inside)
        outputs[stage] = x
        if stage == 2:
            x = F.max_pool3d(x, (2, 1, 1), (2, 1, 1))
    return outputs


def test_it_has_the_published_size_and_operations():
    """PyTorchVideo's model zoo, I3D R50 8x8: 28.04 M parameters, 28.6 GFLOPs (multiply-adds) at 8 x 224 x 224."""
    with torch.device("meta"):
        model = select.build("backbones", "i3d", frames=8, size=224).eval()
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            tokens = model(torch.empty(1, 8, 3, 224, 224))
    classifier = 2048 * 400 + 400
    assert (sum(p.numel() for p in model.parameters()) + classifier) / 1e6 == pytest.approx(28.04, abs=0.01)
    assert counted.get_total_flops() / 2 / 1e9 == pytest.approx(28.6, rel=0.02)
    assert tokens.values.shape == (1, 4 * 7 * 7, 2048) and model.width == 2048


@pytest.mark.parametrize("style", ["pytorchvideo", "pyslowfast"])
@pytest.mark.parametrize("stage", [4, 5])
def test_a_published_file_loads_strictly_and_gives_the_references_numbers(style, stage, tmp_path):
    file = tmp_path / "I3D_8x8_R50.pyth"
    torch.save({"model_state": published(style)}, file)
    model = select.build("backbones", "i3d", frames=8, size=64, stage=f"stage{stage}").eval()
    weights.load(model, file)
    clip = torch.randn(2, 8, 3, 64, 64)
    with torch.no_grad():
        tokens = model(clip)
        expected = reference(published("pytorchvideo"), clip.transpose(1, 2))[stage]
    assert expected.shape[2] == 4 and expected.std() > 0.01
    difference = (tokens.values - expected.flatten(2).mT).abs().max() / expected.abs().max()
    assert difference <= 1e-5
    assert torch.allclose(tokens.positions[:, 0].unique(), (torch.arange(4) + 0.5) / 4)


def test_a_file_that_lacks_a_block_is_refused(tmp_path):
    state = {k: v for k, v in published("pyslowfast").items() if "s4.pathway0_res5" not in k}
    torch.save(state, tmp_path / "x.pyth")
    with pytest.raises(ValueError, match=r"missing: blocks\.4\.res_blocks\.5"):
        weights.load(select.build("backbones", "i3d", frames=8, size=64), tmp_path / "x.pyth")


def test_frozen_batch_norm_keeps_its_statistics_and_one_frame_is_refused():
    model = select.build("backbones", "i3d", frames=2, size=32, stage="stage4", batch_norm="frozen").train()
    before = {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "tracked" in k}
    model(torch.randn(2, 2, 3, 32, 32)).values.sum().backward()
    assert before and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    with pytest.raises(ValueError, match="2 or more, given 1"):
        select.build("backbones", "i3d", frames=1, size=32)
