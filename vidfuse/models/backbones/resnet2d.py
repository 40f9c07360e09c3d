"""ResNet-18, 34 or 50 over frames: the convolutions of pictures, one frame at a time.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; h, w of the output grid.
Comes in: normalised clips. Goes out: tokens of every frame: the cells of a stage's output grid, row by row, or their average, which is
what a recurrent network over frames reads.
Source: He et al. 2016 (arXiv:1512.03385), table 1; model by timm, ImageNet-1k weights of torchvision by timm (`resnet*.tv_in1k`,
BSD-3-Clause; 11.7, 21.8 and 25.6 M parameters with the classifier that is left out here). Like torchvision's, the 50 has its strides in
the 3 x 3 convolutions. Stages have torchvision's names; the stem's tensors are in `stem`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import timm
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import weights
from vidfuse.models.conv3d import FreezableBatchNorm, with_own_batch_norm
from vidfuse.models.layers import frame_positions, without
from vidfuse.models.parts import Tokens

STAGES = ("layer1", "layer2", "layer3", "layer4")
STEM = ("conv1", "bn1", "act1", "maxpool")


class ResNet2d(FreezableBatchNorm):
    """Stages of a timm residual network, under its own names, up to the one that is asked for, applied to each frame.

    Args:
        network: timm's model.
        stage: Last stage; later ones and the classifier are left out.
        pool: `none` gives a token for each cell of a frame's grid, `average` one token a frame.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        pool: Literal["none", "average"],
        batch_norm: Literal["train", "frozen"],
    ) -> None:
        super().__init__()
        timm_model = cast(Any, network)
        self.mean: tuple[float, float, float] = tuple(timm_model.pretrained_cfg["mean"])
        self.std: tuple[float, float, float] = tuple(timm_model.pretrained_cfg["std"])
        self.width: int = next(info["num_chs"] for info in timm_model.feature_info if info["module"] == stage)
        self.pool = pool
        self.stages = tuple(name for name in STAGES if name <= stage)
        self.stem = with_own_batch_norm(nn.Sequential(OrderedDict((name, network.get_submodule(name)) for name in STEM)))
        for name in self.stages:
            self.add_module(name, with_own_batch_norm(network.get_submodule(name)))
        self.set_batch_norm(batch_norm)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Stem and stages."""
        return (self.stem, *(self.get_submodule(name) for name in self.stages))

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """Tokens frame by frame."""
        frames = clip.shape[1]
        x = rearrange(clip, "B T C H W -> (B T) C H W")
        for block in self.blocks:
            x = block(x)
        if self.pool == "average":
            values = rearrange(reduce(x, "F D h w -> F D", "mean"), "(B T) D -> B T D", T=frames)
            return Tokens(values, frame_positions(frames, 1, 1, tokens="class"))
        values = rearrange(x, "(B T) D h w -> B (T h w) D", T=frames)
        height, width = x.shape[2:]
        return Tokens(values, frame_positions(frames, height, width, tokens="patch"))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of timm's or torchvision's file without the classifier and the stages that are not here."""
        named = {f"stem.{key}" if key.startswith(STEM) else key: value for key, value in state.items()}
        later = tuple(f"{name}." for name in (*STAGES, "fc") if name not in self.stages)
        return without(named, later, said="resnet2d")


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Literal["resnet18", "resnet34", "resnet50"] = "resnet18",
    stage: Literal["layer3", "layer4"] = "layer4",
    pool: Literal["none", "average"] = "none",
    batch_norm: Literal["train", "frozen"] = "train",
) -> ResNet2d:
    """Build the backbone.

    Args:
        frames: T of a clip; any.
        size: Height and width of a clip, in pixels; any. 224 is what the published weights were trained with.
        pretrained: Fetch the published ImageNet-1k weights.
        variant: Depth of the network.
        stage: Whose output the tokens are: layer3 (256 wide, 1024 of resnet50; H / 16) or layer4 (512, 2048; H / 32).
        pool: `none` gives a token for each cell of a frame's grid, `average` one token a frame.
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.

    Raises:
        ValueError: the weights cannot be fetched.
    """
    name = f"{variant}.tv_in1k"
    network = timm.create_model(name, num_classes=0, zero_init_last=False)
    backbone = ResNet2d(network, stage=stage, pool=pool, batch_norm=batch_norm)
    weights.load(backbone, weights.from_hub(f"timm/{name}") if pretrained else None)
    return backbone
