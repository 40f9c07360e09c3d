"""A supervised vision transformer over frames: what DINO and CLIP are held against.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: tokens of every frame, after the last norm; the classifier is left out.
Source: Dosovitskiy et al. 2021 (arXiv:2010.11929), table 1, and Touvron et al. 2021 (arXiv:2012.12877), table 1, for S; weights of
Steiner et al. 2022 (arXiv:2106.10270), trained on the labels of ImageNet-21k, by timm (`vit_*_patch16_224.augreg_in21k`, Apache-2.0).
S is 384 wide, B 768, L 1024. Position embeddings stay as published (14 x 14) and are resampled to the clip's grid as timm does, so
that one file fits every size.
"""

from __future__ import annotations

from typing import Literal

import timm
from timm.models.vision_transformer import checkpoint_filter_fn

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_share, check_stride, kept_blocks
from vidfuse.models.layers import VIT_BLOCKS, FrameViT

Variant = Literal["vits16", "vitb16", "vitl16"]
NAMES = {"vits16": "small", "vitb16": "base", "vitl16": "large"}


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vits16",
    tokens: Literal["all", "class", "patch"] = "all",
    stochastic_depth: float = 0.0,
    frame_stride: int = 1,
    depth: int | None = None,
) -> FrameViT:
    """Build the backbone.

    Args:
        frames: T of a clip; any.
        size: Height and width of a clip, in pixels; a multiple of 16.
        pretrained: Fetch the published ImageNet-21k weights.
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
    name = f"vit_{NAMES[variant]}_patch16_224.augreg_in21k"
    vit = timm.create_model(
        name, num_classes=0, global_pool="", dynamic_img_size=True, depth=kept, drop_path_rate=stochastic_depth
    )
    backbone = FrameViT(vit, tokens=tokens, adapt=checkpoint_filter_fn, frame_stride=frame_stride, later=range(kept, blocks))
    weights.load(backbone, weights.from_hub(f"timm/{name}") if pretrained else None)
    return backbone
