"""What the convolutional video networks share: batch norm that can be frozen, tokens of their cells, torchvision's residual networks.

Axes: B clips, T frames, C channels, H height, W width, N tokens, D width of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vidfuse.models import weights
from vidfuse.models.layers import grid_positions, without
from vidfuse.models.parts import Tokens


class _OwnBatchNorm(_BatchNorm):
    """Batch norm in the precision of its running statistics, whatever an engine casts its parameters to.

    DeepSpeed casts parameters and leaves buffers in float32 (running statistics of bfloat16 would not move by a tenth of a
    difference); torch's own batch norm refuses that mixture.
    """

    def forward(self, input: Float[Tensor, "B C ..."]) -> Float[Tensor, "B C ..."]:
        """The input normalised, in its own dtype."""
        self._check_input_dim(input)
        mean, var = self.running_mean, self.running_var
        assert mean is not None and self.momentum is not None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(input, mean, var, weight, bias, self.training, self.momentum, self.eps)


class BatchNorm2d(_OwnBatchNorm, nn.BatchNorm2d):
    """`nn.BatchNorm2d` in the precision of its running statistics."""


class BatchNorm3d(_OwnBatchNorm, nn.BatchNorm3d):
    """`nn.BatchNorm3d` in the precision of its running statistics."""


OWN_BATCH_NORM: Mapping[type[nn.Module], type[_OwnBatchNorm]] = {nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
"""What `with_own_batch_norm` puts in the place of torch's."""


def with_own_batch_norm(module: nn.Module) -> nn.Module:
    """`module` with every batch norm of torch inside replaced by ours, under the same names, with the same tensors."""
    for name, child in module.named_children():
        if own_type := OWN_BATCH_NORM.get(type(child)):
            norm = cast(_BatchNorm, child)
            own = own_type(norm.num_features, norm.eps, norm.momentum).train(norm.training)
            own._parameters, own._buffers = norm._parameters, norm._buffers
            module.add_module(name, own)
        else:
            with_own_batch_norm(child)
    return module


class FreezableBatchNorm(nn.Module):
    """A network whose batch norm may be frozen: statistics and affine parameters stay as they are, also in training mode."""

    batch_norm: Literal["train", "frozen"] = "train"

    def set_batch_norm(self, mode: Literal["train", "frozen"]) -> None:
        """Choose; called once the network's parts are there."""
        self.batch_norm = mode
        if mode == "frozen":
            for norm in self._norms():
                norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> FreezableBatchNorm:
        """Set training mode, except for batch norm that is frozen."""
        super().train(mode)
        if self.batch_norm == "frozen":
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, _BatchNorm)]


def sliding_windows(frames: int, segments: int) -> tuple[slice, ...]:
    """`segments` windows at equal distances from the first frame to the last, each twice as long as a segment's share.

    Raises:
        ValueError: fewer frames than segments, or no segment.
    """
    if not 1 <= segments <= frames:
        raise ValueError(f"a clip of {frames} frames has 1 to {frames} segments, given {segments}")
    length = min(-(-2 * frames // segments), frames)
    starts = [round(i * (frames - length) / max(segments - 1, 1)) for i in range(segments)]
    return tuple(slice(start, start + length) for start in starts)


def cells_of(blocks: Iterable[nn.Module], clip: Float[Tensor, "B T C H W"]) -> Tokens:
    """Blocks of 3-D convolutions in order; a token at the centre of each cell of what the last one gives, time slowest."""
    x = rearrange(clip, "B T C H W -> B C T H W")
    for block in blocks:
        x = block(x)
    t, h, w = x.shape[2:]
    return Tokens(rearrange(x, "B D t h w -> B (t h w) D"), grid_positions(t, h, w))


class VideoResNet(FreezableBatchNorm):
    """Stages of a torchvision video residual network, under its own parameter names, up to the one that is asked for.

    Args:
        network: torchvision's model.
        stage: Last stage; later ones and the classifier are left out.
        batch_norm: `frozen` keeps running statistics and affine parameters as they are, also in training mode.
        mean: Mean of each channel of its input, for values 0..1.
        std: Standard deviation of each channel of its input, for values 0..1.
        frames: T of a clip.
        segments: Number of windows that slide over the clip, each overlapping its neighbours by half or more; a window goes through
            the network by itself, and its output is averaged over time. `None`: the clip goes through as a whole.

    Raises:
        ValueError: fewer frames than segments.
    """

    widths: Mapping[str, int] = MappingProxyType({"layer1": 64, "layer2": 128, "layer3": 256, "layer4": 512})

    def __init__(
        self,
        network: nn.Module,
        *,
        stage: str,
        batch_norm: Literal["train", "frozen"],
        mean: Sequence[float],
        std: Sequence[float],
        frames: int,
        segments: int | None,
    ) -> None:
        super().__init__()
        self.mean, self.std = tuple(mean), tuple(std)
        self.width = self.widths[stage]
        self.windows = () if segments is None else sliding_windows(frames, segments)
        self.stages = ("stem", *(name for name in self.widths if name <= stage))
        for name in self.stages:
            self.add_module(name, with_own_batch_norm(network.get_submodule(name)))
        self.set_batch_norm(batch_norm)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Stem and stages."""
        return tuple(self.get_submodule(name) for name in self.stages)

    def forward(self, clip: Float[Tensor, "B T C H W"]) -> Tokens:
        """A token for each cell of the last stage's output; of windows, time slowest."""
        if not self.windows:
            return cells_of(self.blocks, clip)
        parts = torch.stack([clip[:, part] for part in self.windows], dim=1)
        tokens = cells_of(self.blocks, rearrange(parts, "B n T C H W -> (B n) T C H W"))
        places = tokens.positions[tokens.positions[:, 0] == tokens.positions[0, 0]]
        cells = rearrange(tokens.values, "(B n) (t c) D -> B n t c D", n=len(self.windows), c=len(places)).mean(dim=2)
        centres = [(part.start + part.stop) / 2 / clip.shape[1] for part in self.windows]
        positions = places.repeat(len(centres), 1)
        positions[:, 0] = torch.tensor(centres, device=places.device).repeat_interleave(len(places))
        return Tokens(rearrange(cells, "B n c D -> B (n c) D"), positions)

    def published_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State of torchvision's file without the classifier and the stages that are not here."""
        later = tuple(f"{name}." for name in (*self.widths, "fc") if name not in self.stages)
        return without(state, later, said="torchvision's video network")


def torchvision_resnet(
    network: nn.Module,
    published: Any,
    *,
    said: str,
    pretrained: bool,
    stage: str,
    batch_norm: Literal["train", "frozen"],
    frames: int,
    segments: int | None,
) -> VideoResNet:
    """A `VideoResNet` with the input statistics of torchvision's published weights, and the weights, if they are asked for.

    Args:
        network: torchvision's model.
        published: Its `Weights` entry.
        said: What to call the weights.
        pretrained: Fetch them.
        stage: See `VideoResNet`, as the others.
        batch_norm: See there.
        frames: See there.
        segments: See there.

    Raises:
        ValueError: fewer frames than segments, or the weights cannot be fetched.
    """
    transform = published.transforms()
    backbone = VideoResNet(
        network,
        stage=stage,
        batch_norm=batch_norm,
        mean=transform.mean,
        std=transform.std,
        frames=frames,
        segments=segments,
    )
    weights.load(backbone, weights.from_url(published.url, said, hashed=True) if pretrained else None)
    return backbone
