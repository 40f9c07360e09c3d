"""CLIP's image tower over frames: patch and class tokens of a transformer trained to match pictures with their captions.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width.
Comes in: normalised clips. Goes out: tokens of every frame, after the last norm (CLIP itself reads the class token alone); the
projection to the captions' space is left out.
Source: Radford et al. 2021, CLIP (arXiv:2103.00020), table 20: ViT-B is 768 wide, L 1024; weights of OpenAI (code MIT; timm's copies
say Apache-2.0) by timm. They were trained with `x * sigmoid(1.702 x)` for GELU, so that timm's `vit_*_clip_quickgelu_*.openai` are
taken and not `vit_*_clip_*.openai`, the same files in a model with another activation. Position embeddings stay as published and
are resampled to the clip's grid as timm does, so that one file fits every size.
"""

from __future__ import annotations

from typing import Literal

import timm
from timm.models.vision_transformer import checkpoint_filter_fn

from vidfuse.models import weights
from vidfuse.models.checks import check_patch, check_share, check_stride, kept_blocks
from vidfuse.models.layers import VIT_BLOCKS, FrameViT

Variant = Literal["vitb32", "vitb16", "vitl14", "vitl14_336"]
NAMES = {
    "vitb32": ("vit_base_patch32_clip", 224),
    "vitb16": ("vit_base_patch16_clip", 224),
    "vitl14": ("vit_large_patch14_clip", 224),
    "vitl14_336": ("vit_large_patch14_clip", 336),
}
"""timm's name, size of the published position embeddings."""


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "vitb16",
    tokens: Literal["all", "class", "patch"] = "all",
    stochastic_depth: float = 0.0,
    frame_stride: int = 1,
    depth: int | None = None,
) -> FrameViT:
    """Build the backbone.

    Args:
        frames: T of a clip; any.
        size: Height and width of a clip, in pixels; a multiple of the patch, which is 32, 16 or 14.
        pretrained: Fetch the published weights.
        variant: Size of the transformer and of its patches; `vitl14_336` was trained on after that at 336 pixels.
        tokens: Which tokens of a frame are given.
        stochastic_depth: Share of frames that skip the last block's branches in training, less in earlier blocks.
        frame_stride: Of so many frames in a row the last is looked at, and stands for all of them.
        depth: Number of blocks kept, from the first. `None`: all.

    Raises:
        ValueError: `size` is no multiple of the patch, `stochastic_depth` is no share, `frame_stride` does not divide `frames`,
            a depth beyond the variant's, or the weights cannot be fetched.
    """
    check_patch(size, int(variant[4:6]))
    check_share("stochastic_depth", stochastic_depth)
    check_stride(frames, frame_stride)
    blocks = VIT_BLOCKS[variant[3]]
    kept = kept_blocks(depth, blocks)
    name, trained_at = NAMES[variant]
    vit = timm.create_model(
        f"{name}_quickgelu_{trained_at}.openai",
        num_classes=0,
        global_pool="",
        dynamic_img_size=True,
        depth=kept,
        drop_path_rate=stochastic_depth,
    )
    backbone = FrameViT(vit, tokens=tokens, adapt=checkpoint_filter_fn, frame_stride=frame_stride, later=range(kept, blocks))
    weights.load(backbone, weights.from_hub(f"timm/{name}_{trained_at}.openai") if pretrained else None)
    return backbone
