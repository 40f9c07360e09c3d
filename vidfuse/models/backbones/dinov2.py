"""DINOv2 over frames: patch and class tokens of a self-supervised image transformer.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: tokens of every frame, after the last norm; registers are dropped.
Source: Oquab et al. 2023, DINOv2 (arXiv:2304.07193), registers of Darcet et al. 2023 (arXiv:2309.16588); model and weights
by timm (`vit_*_patch14[_reg4]_dinov2.lvd142m`), Apache-2.0. S is 384 wide, B 768, L 1024, g 1536. Position embeddings stay
as published (37 x 37) and are resampled to the clip's grid as timm does, so that one file fits every size.
"""

from __future__ import annotations

from typing import Literal

import timm
from timm.models.vision_transformer import checkpoint_filter_fn

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_share, check_stride, kept_blocks
from vidfuse.models.layers import VIT_BLOCKS, FrameViT

Variant = Literal["vits14", "vits14reg", "vitb14", "vitb14reg", "vitl14", "vitl14reg", "vitg14", "vitg14reg"]
SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vits14",
    tokens: Literal["all", "class", "patch"] = "all",
    stochastic_depth: float = 0.0,
    frame_stride: int = 1,
    depth: int | None = None,
) -> FrameViT:
    """Build the backbone.

    Args:
        frames: T of a clip; any.
        size: Height and width of a clip, in pixels; a multiple of 14.
        pretrained: Fetch the published weights.
        variant: Size of the transformer, with `reg` for four register tokens.
        tokens: Which tokens of a frame are given.
        stochastic_depth: Share of frames that skip the last block's branches in training, less in earlier blocks.
        frame_stride: Of so many frames in a row the last is looked at, and stands for all of them.
        depth: Number of blocks kept, from the first. `None`: all.

    Raises:
        ValueError: `size` is no multiple of 14, `stochastic_depth` is no share, `frame_stride` does not divide `frames`, a
            depth beyond the variant's, or the weights cannot be fetched.
    """
    check_patch(size, 14)
    check_share("stochastic_depth", stochastic_depth)
    check_stride(frames, frame_stride)
    blocks = VIT_BLOCKS[variant[3]]
    kept = kept_blocks(depth, blocks)
    name = f"vit_{SIZES[variant[3]]}_patch14_{'reg4_' if variant.endswith('reg') else ''}dinov2.lvd142m"
    vit = timm.create_model(
        name, num_classes=0, global_pool="", dynamic_img_size=True, depth=kept, drop_path_rate=stochastic_depth
    )
    backbone = FrameViT(vit, tokens=tokens, adapt=checkpoint_filter_fn, frame_stride=frame_stride, later=range(kept, blocks))
    weights.load(backbone, weights.from_hub(f"timm/{name}") if pretrained else None)
    return backbone
