"""bfloat16 on CPUs that have no instructions for it.

There PyTorch's bfloat16 products and convolutions are slow loops (measured on an AVX2 core: ten times the time of float32).
`bfloat16_arithmetic` has them computed in float32 from the bfloat16 values and rounded back, which is also what hardware with
such instructions does (products in float32, sums in float32, result rounded). Comes in and goes out: nothing but time changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

PRODUCTS = frozenset(
    {
        *(F.conv1d, F.conv2d, F.conv3d, F.linear, F.scaled_dot_product_attention),
        *(torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__),
    }
)
"""What is computed in float32."""


class _InFloat32(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in PRODUCTS or not any(_is_bfloat16(value) for value in args):
            return func(*args, **(kwargs or {}))
        return func(*map(_up, args), **{name: _up(value) for name, value in (kwargs or {}).items()}).bfloat16()


def bfloat16_arithmetic(like: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context for a forward pass on the device of `like`: it does something on CPUs without bfloat16 alone."""
    return _InFloat32() if like.device.type == "cpu" and not _has_bfloat16() else contextlib.nullcontext()


@cache
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_bfloat16(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _up(value: Any) -> Any:
    return value.float() if _is_bfloat16(value) else value
