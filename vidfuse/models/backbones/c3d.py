"""C3D: eight plain 3-D convolutions with pooling between them.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: normalised clips. Goes out: a token, 512 wide, for each cell of a layer's output grid, at the cell's centre. The first
pooling is in space alone, the later ones halve time, too, and drop what does not fill them: 16 frames at 112 pixels are 4 x 14 x 14
cells after conv4b, 2 x 7 x 7 after conv5b and 1 x 4 x 4 after pool5.
Source: Tran et al. 2015 (arXiv:1412.0767), figure 3. Sports-1M weights as MMAction2 publishes them (Apache-2.0; fine-tuned 82.9
top-1 on UCF101 at 16 x 112 x 112; 78.4 M parameters, of which 50.8 M are in the fully connected layers that are left out here).
Parameter names are MMAction2's; those of DavideA/c3d-pytorch and of `c3d-pretrained.pth` are translated. Input is normalised as
MMAction2 does it: RGB less (104, 117, 128), without division. Caffe,
which the authors trained with, reads BGR (DavideA/c3d-pytorch, issues 1 and 4); whether the file was turned is not published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import weights
from vidfuse.models.conv3d import cells_of
from vidfuse.models.layers import without
from vidfuse.models.parts import Tokens

PUBLISHED = "https://download.openmmlab.com/mmaction/recognition/c3d/c3d_sports1m_pretrain_20201016-dcc47ddc.pth"
LAYERS: Mapping[str, tuple[int, int, tuple[int, int, int] | None]] = {
    "conv1a": (3, 64, None),
    "conv2a": (64, 128, (1, 2, 2)),
    "conv3a": (128, 256, (2, 2, 2)),
    "conv3b": (256, 256, None),
    "conv4a": (256, 512, (2, 2, 2)),
    "conv4b": (512, 512, None),
    "conv5a": (512, 512, (2, 2, 2)),
    "conv5b": (512, 512, None),
}
"""Channels in and out of each convolution, and the pooling before it."""
LEAST = {"conv4b": (4, 8), "conv5b": (8, 16), "pool5": (16, 16)}
"""Frames and pixels that leave one cell of each layer's output."""
NUMBERED = ("0", "3", "6", "8", "11", "13", "16", "18")
"""Numbers of the convolutions in `features` of `c3d-pretrained.pth`."""


class Layer(nn.Module):
    """Pooling of what comes in, if any, and a 3 x 3 x 3 convolution."""

    def __init__(self, given: int, width: int, pool: tuple[int, int, int] | None) -> None:
        super().__init__()
        self.pool = nn.Identity() if pool is None else nn.MaxPool3d(pool)
        self.conv = nn.Conv3d(given, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C T H W"]) -> Float[Tensor, "B D t h w"]:
        """The layer's output, not below zero."""
        out: Tensor = self.conv(self.pool(x)).relu_()
        return out


class C3D(nn.Module):
    """Convolutions up to the layer that is asked for.

    Args:
        stage: Last layer; later ones and the fully connected ones are left out.
    """

    mean, std = (104 / 255, 117 / 255, 128 / 255), (1 / 255, 1 / 255, 1 / 255)
    width = 512

    def __init__(self, *, stage: str) -> None:
        super().__init__()
        self.stages = tuple(name for name in (*LAYERS, "pool5") if name <= stage)
        for name in self.stages:
            # Padding as in the ports: 4 x 4 cells of 7 x 7, which is what the 8192 inputs of fc6 are (512 x 4 x 4).
            self.add_module(name, nn.MaxPool3d(2, padding=(0, 1, 1)) if name == "pool5" else Layer(*LAYERS[name]))
        for module in self.modules():
            if isinstance(module, nn.Conv3d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The layers."""
        return tuple(self.get_submodule(name) for name in self.stages)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last layer's output."""
        return cells_of(self.blocks, clip)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of MMAction2's file or of a port's without the fully connected layers and the convolutions that are not here."""
        named = {_mmaction_name(key): value for key, value in state.items()}
        later = tuple(f"{name}." for name in LAYERS if name not in self.stages)
        return without(named, (*later, "fc6.", "fc7.", "fc8.", "classifier.", "cls_head."), said="c3d")


def _mmaction_name(key: str) -> str:
    """Name of a tensor in a recogniser (`backbone.conv1a.conv.weight`) or a port (`conv1.weight`, `features.0.weight`)."""
    key = key.removeprefix("backbone.")
    if (match := re.fullmatch(r"features\.(\d+)\.(weight|bias)", key)) and match[1] in NUMBERED:
        return f"{list(LAYERS)[NUMBERED.index(match[1])]}.conv.{match[2]}"
    if match := re.fullmatch(r"(conv\d)([ab]?)\.(weight|bias)", key):
        return f"{match[1]}{match[2] or 'a'}.conv.{match[3]}"
    return key


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    stage: Literal["conv4b", "conv5b", "pool5"] = "conv5b",
) -> C3D:
    """Build the backbone.

    Args:
        frames: T of a clip; at least 4 for conv4b, 8 for conv5b, 16 for pool5. The published weights were trained with 16.
        size: Height and width of a clip, in pixels; at least 8 for conv4b, 16 for the others. The published weights were trained
            with 112.
        pretrained: Fetch the published Sports-1M weights.
        stage: Whose output the tokens are: conv4b (frames / 4, size / 8), conv5b (frames / 8, size / 16) or pool5
            (frames / 16, size / 32).

    Raises:
        ValueError: a clip of which pooling leaves nothing, or the weights cannot be fetched.
    """
    least = LEAST[stage]
    if frames < least[0] or size < least[1]:
        raise ValueError(
            f"c3d with stage={stage} pools {frames} frames of {size} pixels to nothing: data.frames is {least[0]} or more and "
            f"data.size {least[1]} or more"
        )
    model = C3D(stage=stage)
    weights.load(model, weights.from_url(PUBLISHED, "C3D (Sports-1M)") if pretrained else None)
    return model
