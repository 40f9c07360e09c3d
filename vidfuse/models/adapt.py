"""Parameter-efficient training: bottleneck adapters and LoRA inside the blocks of a vision transformer that stays as it is.

Axes: B clips or frames, N tokens, D width, R width of a bottleneck.
Comes in: a backbone with its weights, whose class says where its blocks' branches are (`parts.VisionTransformer`). Goes out: the
same module with small parts in its blocks. Untrained, its tokens are those of the plain backbone, to the bit. The branches' modules
carry the adapters, so whoever calls these, in the block or one by one, calls adapters, too; and names of the backbone's state
stay, but for `.base_layer` in those that LoRA wraps, so weights are loaded before.

Source: adapters of AIM (Yang et al. 2023, arXiv:2302.03024, sections 3.2 and 3.4, figure 2) as CAST has them in both of its streams
(Lee et al. 2023, arXiv:2311.18825, figure 3): after the attention in series, beside the feed-forward part in parallel. In ViT-B a
block's two have 0.59 M parameters. AIM's third one, after the block's attention used once more over time, is not here (CAST's 48 are
14.2 M, AIM-B's 36 are 10.7 M). LoRA: Hu et al. 2022 (arXiv:2106.09685, section 4) by peft (Apache-2.0). Where a block has
LayerScale (DINOv2, DINOv3) it scales what adapters add as it scales the branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_type_hints

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vidfuse.models import select
from vidfuse.models.parts import Branches, VisionTransformer

Forward: TypeAlias = Callable[..., Any]


class Adapter(nn.Module):
    """Down to a bottleneck, GELU, and up again, from zero.

    Args:
        width: D.
        bottleneck: R.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        for parameter in self.up.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """What is added to the tokens."""
        return self.up(F.gelu(self.down(x)))


def extend(
    stream: nn.Module,
    backbone: str,
    *,
    adapters: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    last: int | None = None,
) -> None:
    """Put adapters, LoRA or both into the blocks of a vision transformer; what is trained is left to the caller.

    LoRA updates the backbone's own linear layers alone, not those of adapters.

    Args:
        stream: The backbone, with its weights.
        backbone: Its name, for errors.
        adapters: Options of `add_adapters`. `None`: none.
        lora: Options of `add_lora`. `None`: none.
        last: How many of the last blocks get them. `None`: all.

    Raises:
        ValueError: no vision transformer, or options that do not fit it.
    """
    if not isinstance(stream, VisionTransformer):
        raise ValueError(
            f"adapters and LoRA go into the blocks of a plain vision transformer, which {backbone} is not; "
            f"backbones that are: {', '.join(_vision_transformers())}"
        )
    chosen = slice(None) if last is None else slice(len(stream.blocks) - last, None)
    if lora is not None:
        add_lora(stream, backbone, stream.blocks[chosen], stream.branches[chosen], **lora)
    if adapters is not None:
        add_adapters(stream.blocks[chosen], stream.branches[chosen], width=stream.width, **adapters)


def add_adapters(
    blocks: Sequence[nn.Module],
    branches: Sequence[Branches],
    *,
    width: int,
    ratio: float = 0.25,
    placement: Literal["attention", "mlp", "both"] = "both",
    scale: float = 0.5,
) -> None:
    """Put adapters into blocks, as their child `adapters`.

    Args:
        blocks: That get adapters.
        branches: Of these blocks.
        width: D.
        ratio: R, as a share of `width`.
        placement: `attention` one after each attention, which adds to what that gives; `mlp` one beside the feed-forward part, given
            the same normed tokens; `both` all of them.
        scale: Factor of what the one beside the feed-forward part adds.

    Raises:
        ValueError: a bottleneck of no width.
    """
    bottleneck = int(width * ratio)
    if bottleneck < 1:
        raise ValueError(
            f"adapters: ratio={ratio:g} of a width of {width} is a bottleneck of none; give {1 / width:.2g} or more"
        )
    for block, branch in zip(blocks, branches, strict=True):
        after = branch.attentions if placement != "mlp" else {}
        names = [*after, *(["mlp"] if placement != "attention" else [])]
        parts = {name: Adapter(width, bottleneck) for name in names}
        block.add_module("adapters", nn.ModuleDict(parts))
        for name, attention in after.items():
            attention.forward = partial(_in_series, attention.forward, parts[name])
        if "mlp" in parts:
            _add_beside(branch.mlp, parts["mlp"], scale)


def add_lora(
    stream: nn.Module,
    backbone: str,
    blocks: Sequence[nn.Module],
    branches: Sequence[Branches],
    *,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> None:
    """Wrap linear layers of blocks so that a product of two matrices, trained and of low rank, is added to their own.

    Args:
        stream: The backbone.
        backbone: Its name, for errors.
        blocks: Whose layers are wrapped.
        branches: Of these blocks.
        rank: Of an update.
        alpha: Updates are multiplied by `alpha / rank`.
        dropout: Of what an update is given.
        targets: Layers by the end of their name in the block. `None`: all of the attentions.

    Raises:
        ValueError: a target that no layer is called; lists those there are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = {id(module): name for name, module in stream.named_modules()}
    wanted: list[str] = []
    for block, branch in zip(blocks, branches, strict=True):
        layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        attending = {id(module) for attention in branch.attentions.values() for module in attention.modules()}
        for target in targets or ():
            if not any(_called(name, target) for name in layers):
                listed = ", ".join(layers)
                raise ValueError(f"lora: {backbone} has no linear layer {target!r} in its blocks; there are: {listed}")
        chosen = [m for n, m in layers.items() if targets is None or any(_called(n, target) for target in targets)]
        wanted += [names[id(module)] for module in chosen if targets is not None or id(module) in attending]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=wanted)
    inject_adapter_in_model(config, stream)


def added(stream: nn.Module) -> list[nn.Module]:
    """The parts that `extend` has put into a stream."""
    parts: list[nn.Module] = []
    for module in stream.modules():
        if isinstance(module, Adapter):
            parts.append(module)
        elif hasattr(module, "lora_A"):  # peft's wrapper of a layer, without importing peft where there is none
            wrapper = cast(Any, module)
            parts += [wrapper.lora_A, wrapper.lora_B, wrapper.lora_dropout]
    return parts


def plain_name(key: str) -> str:
    """Name that a tensor of an extended stream's state has in the plain backbone's."""
    return key.replace(".base_layer.", ".")


def _called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _vision_transformers() -> list[str]:
    builders = {name: select.builder("backbones", name) for name in select.names("backbones")}
    return [name for name, build in builders.items() if hasattr(get_type_hints(build)["return"], "branches")]


def _add_beside(mlp: tuple[nn.Module, ...], adapter: Adapter, scale: float) -> None:
    if len(mlp) == 1:
        mlp[0].forward = partial(_in_parallel, mlp[0].forward, adapter, scale)
        return
    first, final = mlp
    first.forward = partial(_parting, first.forward, adapter, scale)
    final.forward = partial(_meeting, final.forward)


def _in_series(forward: Forward, adapter: Adapter, *args: Any, **kwargs: Any) -> Any:
    result = forward(*args, **kwargs)
    if isinstance(result, tuple):
        return (result[0] + adapter(result[0]), *result[1:])
    return result + adapter(result)


def _in_parallel(forward: Forward, adapter: Adapter, scale: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    result: Tensor = forward(x, *args, **kwargs) + scale * adapter(x)
    return result


def _parting(forward: Forward, adapter: Adapter, scale: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of a feed-forward part, which hands what the adapter adds to the last half.

    It goes with the values, not by the side: activation checkpointing stops a block's second forward as soon as it has what
    backward needs, which can be between the halves, and what was kept by the side would stay there.
    """
    return forward(x), scale * adapter(x)


def _meeting(forward: Forward, given: tuple[Tensor, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    values, added = given
    result: Tensor = forward(values, *args, **kwargs) + added
    return result
