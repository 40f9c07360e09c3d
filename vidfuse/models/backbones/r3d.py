"""R3D-18: a residual network of 3-D convolutions over the clip.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of the output grid.
Comes in: normalised clips. Goes out: a token for each cell of a stage's output grid, at the cell's centre. Time is halved by
layer2, layer3 and layer4: 16 frames are 8, 4 and 2 positions; whoever needs eight takes `segments=8` (sliding windows)
or `stage=layer2`.
Source: Tran et al. 2018 (arXiv:1711.11248), table 1; model and Kinetics-400 weights by torchvision (`r3d_18`, BSD-3-Clause,
33.4 M parameters with the classifier that is left out here, 63.2 top-1 at 16 x 112 x 112).
"""

from __future__ import annotations

from typing import Literal

from torchvision.models.video import R3D_18_Weights, r3d_18

from vidfuse.models.conv3d import VideoResNet, torchvision_resnet

PUBLISHED = R3D_18_Weights.KINETICS400_V1


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    stage: Literal["layer2", "layer3", "layer4"] = "layer4",
    batch_norm: Literal["train", "frozen"] = "train",
    segments: int | None = None,
) -> VideoResNet:
    """Build the backbone.

    Args:
        frames: T of a clip; any. 16 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 112 is what the published weights were trained with.
        pretrained: Fetch the published Kinetics-400 weights.
        stage: Whose output the tokens are: layer2 (128 wide), layer3 (256) or layer4 (512).
        batch_norm: `train` normalises by the batch and updates running statistics, `frozen` does neither.
        segments: Number of positions in time, by as many windows that slide over the clip and overlap by half; it costs about
            twice as much. `None`: those that the stage leaves.

    Raises:
        ValueError: fewer frames than segments, or the weights cannot be fetched.
    """
    return torchvision_resnet(
        r3d_18(),
        PUBLISHED,
        said="r3d_18 (Kinetics-400)",
        pretrained=pretrained,
        stage=stage,
        batch_norm=batch_norm,
        frames=frames,
        segments=segments,
    )
