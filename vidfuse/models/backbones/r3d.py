"""R3D-18: a residual network of 3-D convolutions over the clip.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: normalised clips. Goes out: a token for each cell of a stage's output grid, at the cell's centre. Time is halved by
layer2, layer3 and layer4: 16 frames are 8, 4 and 2 positions; whoever needs eight takes `stage=layer2`.
Source: Tran et al. 2018 (arXiv:1711.11248), table 1; model and Kinetics-400 weights by torchvision (`r3d_18`, BSD-3-Clause,
33.4 M parameters with the classifier that is left out here, 63.2 top-1 at 16 x 112 x 112).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.video import R3D_18_Weights, VideoResNet, r3d_18

from vidfuse.models import weights
from vidfuse.models.layers import FreezableBatchNorm, cells_of, with_own_batch_norm, without
from vidfuse.models.parts import Tokens

PUBLISHED = R3D_18_Weights.KINETICS400_V1
WIDTHS = {"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512}


class R3D(FreezableBatchNorm):
    """Stages of a torchvision video residual network, under its own parameter names, up to the one that is asked for.

    Args:
        network: torchvision's model.
        stage: Last stage; later ones and the classifier are left out.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
    """

    def __init__(self, network: VideoResNet, *, stage: str, batch_norm: Literal["train", "frozen"]) -> None:
        super().__init__()
        transform = PUBLISHED.transforms()
        self.mean: tuple[float, float, float] = tuple(transform.mean)
        self.std: tuple[float, float, float] = tuple(transform.std)
        self.width = WIDTHS[stage]
        self.stages = ("stem", *(name for name in WIDTHS if name <= stage))
        for name in self.stages:
            self.add_module(name, with_own_batch_norm(network.get_submodule(name)))
        self.set_batch_norm(batch_norm)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Stem and stages."""
        return tuple(self.get_submodule(name) for name in self.stages)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last stage's output."""
        return cells_of(self.blocks, clip)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of torchvision's file without the classifier and the stages that are not here."""
        later = tuple(f"{name}." for name in (*WIDTHS, "fc") if name not in self.stages)
        return without(state, later, said="r3d")


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    stage: Literal["layer2", "layer3", "layer4"] = "layer4",
    batch_norm: Literal["train", "frozen"] = "train",
) -> R3D:
    """Build the backbone.

    Args:
        frames: T of a clip; any. 16 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 112 is what the published weights were trained with.
        pretrained: Fetch the published Kinetics-400 weights.
        stage: Whose output the tokens are: layer2 (128 wide), layer3 (256) or layer4 (512).
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.

    Raises:
        ValueError: the weights cannot be fetched.
    """
    with weights.fetching("r3d_18 (Kinetics-400)", file=PUBLISHED.url):
        network = r3d_18(weights=PUBLISHED if pretrained else None)
    return R3D(network, stage=stage, batch_norm=batch_norm)
