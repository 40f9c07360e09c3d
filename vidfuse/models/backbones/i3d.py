"""I3D-R50: a ResNet-50 whose 2-D convolutions were inflated in time.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: normalised clips. Goes out: a token for each cell of a stage's output grid, at the cell's centre. Time is halved once, after
the first stage: 16 frames are 8 positions; space is H / 16 after `stage4` and H / 32 after `stage5`.
Source: Carreira and Zisserman 2017 (arXiv:1705.07750) on the ResNet-50 of Wang et al. 2018 (arXiv:1711.07971, table 1), in the form
that PySlowFast and PyTorchVideo publish with Kinetics-400 weights (`I3D_8x8_R50`: 28.0 M parameters with the classifier that is left
out here, 73.27 top-1 at 8 frames x stride 8; PyTorchVideo's model zoo). Parameter names are PyTorchVideo's; PySlowFast's are translated.
With `inflate` the weights are those of a ResNet-50 for pictures (torchvision's and timm's names; ImageNet-1k weights of torchvision by
timm, BSD-3-Clause), each filter repeated in time and divided by its length (Carreira and Zisserman, section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import weights
from vidfuse.models.conv3d import BatchNorm3d, FreezableBatchNorm, cells_of
from vidfuse.models.layers import without
from vidfuse.models.parts import Tokens

IMAGENET = "timm/resnet50.tv_in1k"
PUBLISHED = "https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/I3D_8x8_R50.pyth"
STAGES = {"stage2": (1, 3, 64), "stage3": (3, 4, 128), "stage4": (4, 6, 256), "stage5": (5, 3, 512)}
"""Number among `blocks`, residual blocks, inner channels; a block gives four times as many."""
IN_TIME = {"stage2": (3,), "stage3": (3, 1), "stage4": (3, 1), "stage5": (1, 3)}
"""Length in time of the blocks' first convolutions, taken in turn."""

KINDS = {"conv": "conv", "bn": "norm"}
FILES = {False: "of an I3D", True: "of a ResNet-50 for pictures"}


class Stem(nn.Module):
    """Convolution over 5 frames, pooling in space."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 64, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False)
        self.norm = BatchNorm3d(64)
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))

    def forward(self, x: Float[Tensor, "B 3 T H W"]) -> Float[Tensor, "B 64 T h w"]:
        """A quarter of the height and width."""
        pooled: Tensor = self.pool(self.norm(self.conv(x)).relu_())
        return pooled


class Bottleneck(nn.Module):
    """1 x 1 (over `time` frames), 3 x 3, 1 x 1."""

    def __init__(self, given: int, inner: int, *, time: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv3d(given, inner, (time, 1, 1), padding=(time // 2, 0, 0), bias=False)
        self.norm_a = BatchNorm3d(inner)
        self.conv_b = nn.Conv3d(inner, inner, (1, 3, 3), (1, stride, stride), (0, 1, 1), bias=False)
        self.norm_b = BatchNorm3d(inner)
        self.conv_c = nn.Conv3d(inner, 4 * inner, 1, bias=False)
        self.norm_c = BatchNorm3d(4 * inner)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D T h w"]:
        """What is added to the shortcut."""
        x = self.norm_a(self.conv_a(x)).relu_()
        x = self.norm_b(self.conv_b(x)).relu_()
        added: Tensor = self.norm_c(self.conv_c(x))
        return added


class ResBlock(nn.Module):
    """Bottleneck and shortcut; the shortcut is projected where channels change."""

    def __init__(self, given: int, inner: int, *, time: int, stride: int) -> None:
        super().__init__()
        self.branch1_conv = nn.Conv3d(given, 4 * inner, 1, (1, stride, stride), bias=False) if given != 4 * inner else None
        self.branch1_norm = BatchNorm3d(4 * inner) if given != 4 * inner else None
        self.branch2 = Bottleneck(given, inner, time=time, stride=stride)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D T h w"]:
        """The block's output."""
        shortcut = x if self.branch1_conv is None or self.branch1_norm is None else self.branch1_norm(self.branch1_conv(x))
        total: Tensor = (shortcut + self.branch2(x)).relu_()
        return total


class ResStage(nn.Module):
    """Residual blocks of one width."""

    def __init__(self, name: str) -> None:
        super().__init__()
        _, depth, inner = STAGES[name]
        first = name == "stage2"
        self.res_blocks = nn.ModuleList(
            ResBlock(
                (64 if first else 2 * inner) if number == 0 else 4 * inner,
                inner,
                time=IN_TIME[name][number % len(IN_TIME[name])],
                stride=2 if number == 0 and not first else 1,
            )
            for number in range(depth)
        )

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D T h w"]:
        """The stage's output."""
        for block in self.res_blocks:
            x = block(x)
        return x


class I3D(FreezableBatchNorm):
    """Stem and stages up to the one that is asked for.

    Args:
        stage: Last stage; later ones and the classifier are left out.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
        inflate: Whether files are those of a ResNet-50 for pictures, and pictures' normalisation is that of ImageNet.
    """

    def __init__(self, *, stage: str, batch_norm: Literal["train", "frozen"], inflate: bool = False) -> None:
        super().__init__()
        self.inflate = inflate
        self.mean = (0.485, 0.456, 0.406) if inflate else (0.45, 0.45, 0.45)
        self.std = (0.229, 0.224, 0.225) if inflate else (0.225, 0.225, 0.225)
        names = [name for name in STAGES if name <= stage]
        self.width = 4 * STAGES[stage][2]
        stages = [ResStage(name) for name in names]
        self.blocks = nn.ModuleList([Stem(), stages[0], nn.MaxPool3d((2, 1, 1)), *stages[1:]])
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.set_batch_norm(batch_norm)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last stage's output."""
        return cells_of(self.blocks, clip)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of PyTorchVideo's or PySlowFast's file without the classifier and the stages that are not here.

        With `inflate`, that of torchvision's or timm's ResNet-50.

        Raises:
            ValueError: the file is of a ResNet-50 and inflation was not asked for, or the other way round.
        """
        flat = "conv1.weight" in state and state["conv1.weight"].ndim == 4
        if flat != self.inflate:
            raise ValueError(f"i3d: the file is {FILES[flat]}; for this file give the option inflate={str(flat).lower()}")
        name = _resnet_name if flat else _pytorchvideo_name
        named = {name(key): value for key, value in state.items()}
        later = ("blocks.6.", *(f"blocks.{number}." for number, _, _ in STAGES.values() if number >= len(self.blocks)))
        return without(weights.inflated(self, named) if flat else named, later, said="i3d")


def _pytorchvideo_name(key: str) -> str:
    """PySlowFast's name of a tensor (`s3.pathway0_res1.branch2.a_bn.weight`) as PyTorchVideo's; others as they are."""
    if match := re.fullmatch(r"s1\.pathway0_stem\.(conv|bn)\.(\w+)", key):
        return f"blocks.0.{'norm' if match[1] == 'bn' else 'conv'}.{match[2]}"
    if match := re.fullmatch(r"s([2-5])\.pathway0_res(\d+)\.branch1(_bn)?\.(\w+)", key):
        return f"{_block(match[1], match[2])}.branch1_{'norm' if match[3] else 'conv'}.{match[4]}"
    if match := re.fullmatch(r"s([2-5])\.pathway0_res(\d+)\.branch2\.([abc])(_bn)?\.(\w+)", key):
        return f"{_block(match[1], match[2])}.branch2.{'norm' if match[4] else 'conv'}_{match[3]}.{match[5]}"
    return re.sub(r"^head\.projection\.", "blocks.6.proj.", key)


def _resnet_name(key: str) -> str:
    """Name of a tensor of torchvision's ResNet-50 (`layer1.0.downsample.1.bias`) as PyTorchVideo has it in I3D."""
    if match := re.fullmatch(r"(conv|bn)1\.(\w+)", key):
        return f"blocks.0.{KINDS[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.(conv|bn)([1-3])\.(\w+)", key):
        block = _block(str(int(match[1]) + 1), match[2])
        return f"{block}.branch2.{KINDS[match[3]]}_{'abc'[int(match[4]) - 1]}.{match[5]}"
    if match := re.fullmatch(r"layer([1-4])\.(\d+)\.downsample\.([01])\.(\w+)", key):
        return f"{_block(str(int(match[1]) + 1), match[2])}.branch1_{('conv', 'norm')[int(match[3])]}.{match[4]}"
    return re.sub(r"^fc\.", "blocks.6.proj.", key)


def _block(stage: str, number: str) -> str:
    return f"blocks.{STAGES[f'stage{stage}'][0]}.res_blocks.{number}"


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    stage: Literal["stage4", "stage5"] = "stage5",
    batch_norm: Literal["train", "frozen"] = "train",
    inflate: bool = False,
) -> I3D:
    """Build the backbone.

    Args:
        frames: T of a clip, 2 at least. 8 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 224 is what the published weights were trained with.
        pretrained: Fetch the published Kinetics-400 weights; with `inflate`, those of ImageNet-1k.
        stage: Whose output the tokens are: stage4 (1024 wide) or stage5 (2048).
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.
        inflate: Whether the weights are those of a ResNet-50 for pictures, inflated in time: files are then torchvision's or timm's
            `resnet50`, and pictures are normalised as for ImageNet.

    Raises:
        ValueError: a clip of one frame, or the weights cannot be fetched.
    """
    if frames < 2:
        raise ValueError(f"i3d halves time once: data.frames is 2 or more, given {frames}")
    model = I3D(stage=stage, batch_norm=batch_norm, inflate=inflate)
    file = weights.from_hub(IMAGENET) if inflate else weights.from_url(PUBLISHED, "I3D_8x8_R50 (Kinetics-400)")
    weights.load(model, file if pretrained else None)
    return model
