"""bfloat16 on CPUs: what has no instructions there, or whose gradients come out wrong, is computed in float32.

Without such instructions PyTorch's bfloat16 products and convolutions are slow loops (measured on an AVX2 core: ten times the time of
float32). With them, oneDNN 3.11 (PyTorch 2.12) gives wrong gradients of the weights of a 3-D convolution whose kernel is longer than
what it goes over: a kernel of 3 over 2 frames, as at the end of R3D-18 on 16 frames, gives anything from 1 to NaN; one of 7 over 6 frames
also writes where it may not. `bfloat16_arithmetic` computes these in float32 from the bfloat16 values and rounds back, which is also
what hardware with such instructions does (products in float32, sums in float32, result rounded). Comes in and goes out: the same values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {
        *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.scaled_dot_product_attention),
        *(torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__),
    }
)
"""What is computed in float32 where there is nothing for it."""


class _InFloat32(TorchFunctionMode):
    """Computes in float32 what `chosen` says of a function and its arguments."""

    def __init__(self, chosen: Callable[[Any, tuple[Any, ...]], bool]) -> None:
        super().__init__()
        self._chosen = chosen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        if not self._chosen(func, args) or not (autocast or any(map(_is_bfloat16, args))):
            return func(*args, **(kwargs or {}))
        up = _rounded if autocast else _up
        with torch.autocast("cpu", enabled=False):
            return func(*map(up, args), **{name: up(value) for name, value in (kwargs or {}).items()}).bfloat16()


def bfloat16_arithmetic(like: Tensor, module: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """A context for a forward pass of a module on the device of `like`; on a GPU it does nothing."""
    if like.device.type == "cpu" and not _has_bfloat16():
        return _InFloat32(lambda func, args: func in PRODUCTS)
    if like.device.type == "cpu" and any(isinstance(part, nn.Conv3d) for part in module.modules()):
        return _InFloat32(_hangs_over)
    return contextlib.nullcontext()


def _hangs_over(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it is a 3-D convolution with a kernel that is longer than its input somewhere."""
    return func is F.conv3d and any(size < kernel for size, kernel in zip(args[0].shape[-3:], args[1].shape[-3:], strict=True))


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _up(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value


def _rounded(value: Any) -> Any:
    """What autocast would compute from, in float32."""
    return value.bfloat16().float() if isinstance(value, Tensor) and value.is_floating_point() else value
