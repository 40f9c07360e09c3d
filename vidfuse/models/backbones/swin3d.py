"""Video Swin: a transformer over the clip that attends inside windows of 8 x 7 x 7 cells, shifted by half in every other block.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width; t, h, w of a grid of cells, W windows of n cells, g heads.
Comes in: normalised clips. Goes out: a token for each cell of the last stage's grid (T / 2, H / 32, W / 32, rounded up), after the last
norm.
Source: Liu et al. 2022, Video Swin Transformer (arXiv:2106.13230), section 3; models and Kinetics-400 weights by torchvision
(`swin3d_t`, `swin3d_s`, `swin3d_b`: 28.2, 49.8 and 88.0 M parameters with the classifier that is left out here, 77.7, 79.5 and 79.4 top-1 at
32 x 224 x 224; BSD-3-Clause).
torchvision's attention hands the weights of its two linear layers to a function and never calls the layers, so that ZeRO-3, which gathers
a layer's weights when it is called, would find them empty: attention is written anew here, with its names and numbers. That includes
how it reads the table of relative positions where a grid is smaller than a window in height or width (clips of 192 pixels or fewer): by the
first entries of the full window's index, as the authors' code does, too, which there are not the distances between the cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.ops import StochasticDepth

from vidfuse.models import weights
from vidfuse.models.checks import check_share
from vidfuse.models.layers import grid_positions, without
from vidfuse.models.parts import Tokens

Variant = Literal["t", "s", "b", "b_in22k"]
PUBLISHED = {
    "t": video.Swin3D_T_Weights.KINETICS400_V1,
    "s": video.Swin3D_S_Weights.KINETICS400_V1,
    "b": video.Swin3D_B_Weights.KINETICS400_V1,
    "b_in22k": video.Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1,
}
BUILDERS = {"t": video.swin3d_t, "s": video.swin3d_s, "b": video.swin3d_b, "b_in22k": video.swin3d_b}
BUILT_WITH = 0.1
"""Stochastic depth of the last block as torchvision's builders set it; they do not take another."""
APART = -100.0
"""Added to the attention between cells that only the cyclic shift has brought into one window."""


class WindowAttention(ShiftedWindowAttention3d):
    """torchvision's attention inside shifted windows, by calls of its layers."""

    def forward(self, x: Float[Tensor, "B t h w D"]) -> Float[Tensor, "B t h w D"]:
        """What each cell reads from the cells of its window."""
        grid = tuple(x.shape[1:4])
        window = tuple(min(n, own) for n, own in zip(grid, self.window_size, strict=True))
        shift = tuple(0 if n <= own else s for n, own, s in zip(grid, self.window_size, self.shift_size, strict=True))
        x = F.pad(x, (0, 0, *(side for n, w in zip(grid[::-1], window[::-1], strict=True) for side in (0, -n % w))))
        padded = tuple(x.shape[1:4])
        x = torch.roll(x, tuple(-s for s in shift), dims=(1, 2, 3))
        x = self._inside(_windows(x, window), self._bias(padded, window, shift).to(x.dtype))
        x = torch.roll(_grid(x, padded, window), shift, dims=(1, 2, 3))
        return x[:, : grid[0], : grid[1], : grid[2]].contiguous()

    def _inside(self, x: Float[Tensor, "B W n D"], bias: Float[Tensor, "V g n n"]) -> Float[Tensor, "B W n D"]:
        q, k, v = rearrange(self.qkv(x), "B W n (three g d) -> three (B W) g n d", three=3, g=self.num_heads)
        if bias.shape[0] > 1:
            bias = repeat(bias, "W g n m -> (B W) g n m", B=x.shape[0])
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        result: Tensor = self.proj(rearrange(read, "(B W) g n d -> B W n (g d)", B=x.shape[0]))
        return result

    def _bias(self, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Float[Tensor, "V g n n"]:
        """What is added to the attention: of each window where cells are shifted, else of all windows alike."""
        bias: Tensor = self.get_relative_position_bias(list(window))
        if not any(shift):
            return bias
        region = _windows(_regions(grid, window, shift, bias.device)[None, ..., None], window)[0, ..., 0]
        apart = region[:, None, :, None] != region[:, None, None, :]
        return bias + torch.where(apart, APART, 0.0).to(bias.dtype)


def _windows(x: Float[Tensor, "B t h w D"], window: Sequence[int]) -> Float[Tensor, "B W n D"]:
    a, b, c = window
    return rearrange(x, "B (t a) (h b) (w c) D -> B (t h w) (a b c) D", a=a, b=b, c=c)


def _grid(x: Float[Tensor, "B W n D"], grid: Sequence[int], window: Sequence[int]) -> Float[Tensor, "B t h w D"]:
    (a, b, c), (t, h, _) = window, (n // w for n, w in zip(grid, window, strict=True))
    return rearrange(x, "B (t h w) (a b c) D -> B (t a) (h b) (w c) D", a=a, b=b, c=c, t=t, h=h)


def _regions(grid: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device) -> Float[Tensor, "t h w"]:
    """A number for each part of the shifted grid; cells of a window with different ones are not neighbours in the clip."""
    axes = [torch.arange(n, device=device) for n in grid]
    parts = [
        (a >= n - w).float() + (a >= n - s) if s else a * 0.0 for a, n, w, s in zip(axes, grid, window, shift, strict=True)
    ]
    t, h, w = parts
    return t[:, None, None] * 9 + h[:, None] * 3 + w


class Swin3D(nn.Module):
    """torchvision's network under its own parameter names, without the classifier.

    Args:
        network: torchvision's model with blocks of `WindowAttention`.
        mean: Mean of each channel of its input, for values 0..1.
        std: Standard deviation of each channel of its input, for values 0..1.
    """

    def __init__(self, network: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        parts = cast(Any, network)
        self.patch_embed: nn.Module = parts.patch_embed
        self.features: nn.Sequential = parts.features
        self.norm: nn.LayerNorm = parts.norm
        self.width: int = parts.num_features
        self.mean, self.std = tuple(mean), tuple(std)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Blocks and the mergings of cells between stages."""
        stages = ((part if isinstance(part, nn.Sequential) else (part,)) for part in self.features)
        return tuple(block for stage in stages for block in stage)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last stage's grid, time slowest."""
        x = self.patch_embed(rearrange(clip, "B T C H W -> B C T H W"))
        for block in self.blocks:
            x = block(x)
        t, h, w = x.shape[1:4]
        return Tokens(rearrange(self.norm(x), "B t h w D -> B (t h w) D"), grid_positions(t, h, w))

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of torchvision's file without the classifier."""
        return without(state, ("head.",), said="swin3d")


def _block(*args: Any, **kwargs: Any) -> nn.Module:
    return SwinTransformerBlock(*args, **{**kwargs, "attn_layer": WindowAttention})


def build(
    *,
    frames: int,
    size: int,
    pretrained: bool = False,
    variant: Variant = "t",
    stochastic_depth: float = 0.0,
) -> Swin3D:
    """Build the backbone.

    Args:
        frames: T of a clip; any, an odd one is padded. 32 is what the published weights were trained with.
        size: Height and width of a clip, in pixels; any. 224 is what the published weights were trained with.
        pretrained: Fetch the published Kinetics-400 weights.
        variant: Size of the transformer: `t` and `s` are 768 wide at the end, `b` 1024; the weights of `b_in22k` come from ImageNet-22k.
        stochastic_depth: Share of clips that skip the last block's branches in training, less in earlier blocks; 0.1 is torchvision's.

    Raises:
        ValueError: `stochastic_depth` is no share, or the weights cannot be fetched.
    """
    check_share("stochastic_depth", stochastic_depth)
    published = PUBLISHED[variant]
    network = BUILDERS[variant](block=_block)
    for module in network.modules():
        if isinstance(module, StochasticDepth):
            module.p *= stochastic_depth / BUILT_WITH
    transform = published.transforms()
    backbone = Swin3D(network, mean=transform.mean, std=transform.std)
    file = weights.from_url(published.url, f"swin3d {variant} (Kinetics-400)", hashed=True)
    weights.load(backbone, file if pretrained else None)
    return backbone
