"""DINOv3 over frames: patch and class tokens of a self-supervised image transformer with rotary positions.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: tokens of every frame, after the last norm; the four registers are dropped.
Source: Simeoni et al. 2025, DINOv3 (arXiv:2508.10104), table of the ViT family: S and S+ are 384 wide, B 768, L 1024,
H+ 1280; model and weights by timm (`vit_*_patch16_dinov3.lvd1689m`). The weights are under the DINOv3 License, and gated at
their origin.
"""

from __future__ import annotations

from typing import Literal

import timm
from timm.models.eva import checkpoint_filter_fn

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_share, check_stride, kept_blocks
from vidfuse.models.layers import VIT_BLOCKS, FrameViT

Variant = Literal["vits16", "vits16plus", "vitb16", "vitl16", "vith16plus"]
NAMES = {"vits16": "small", "vits16plus": "small_plus", "vitb16": "base", "vitl16": "large", "vith16plus": "huge_plus"}
LICENCE = (
    "DINOv3 weights are under the DINOv3 License (https://ai.meta.com/resources/models-and-libraries/dinov3-license/), "
    "gated at their origin: accept it there before use and before you pass on a model that holds them"
)


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vits16plus",
    tokens: Literal["all", "class", "patch"] = "all",
    stochastic_depth: float = 0.0,
    frame_stride: int = 1,
    depth: int | None = None,
) -> FrameViT:
    """Build the backbone.

    Args:
        frames: T of a clip; any.
        size: Height and width of a clip, in pixels; a multiple of 16.
        pretrained: Fetch the published weights; the licence is logged.
        variant: Size of the transformer.
        tokens: Which tokens of a frame are given.
        stochastic_depth: Share of frames that skip the last block's branches in training, less in earlier blocks.
        frame_stride: Of so many frames in a row the last is looked at, and stands for all of them.
        depth: Number of blocks kept, from the first. `None`: all.

    Raises:
        ValueError: `size` is no multiple of 16, `stochastic_depth` is no share, `frame_stride` does not divide `frames`, a
            depth beyond the variant's, or the weights cannot be fetched.
    """
    check_patch(size, 16)
    check_share("stochastic_depth", stochastic_depth)
    check_stride(frames, frame_stride)
    blocks = VIT_BLOCKS[variant[3]]
    kept = kept_blocks(depth, blocks)
    name = f"vit_{NAMES[variant]}_patch16_dinov3.lvd1689m"
    vit = timm.create_model(
        name, num_classes=0, global_pool="", img_size=size, dynamic_img_size=False, depth=kept, drop_path_rate=stochastic_depth
    )
    backbone = FrameViT(
        vit, tokens=tokens, adapt=checkpoint_filter_fn, licence=LICENCE, frame_stride=frame_stride, later=range(kept, blocks)
    )
    weights.load(backbone, weights.from_hub(f"timm/{name}") if pretrained else None)
    return backbone
