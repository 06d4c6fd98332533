"""Straight-through building blocks of the baseline quantizers: the gradient follows from autograd on readable formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Replace(torch.autograd.Function):
    """`value` in the forward pass, the gradient of `smooth` in the backward pass."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def round_ste(x: Tensor) -> Tensor:
    """Round half to even, exactly; gradient 1 (`x + (round(x) - x).detach()` would not always be a whole number)."""
    return _Replace.apply(x, x.detach().round())


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """`x`, with its gradient multiplied by `factor`."""
    return _ScaleGradient.apply(x, factor)


def clip_strict(x: Tensor, low: float, high: float) -> Tensor:
    """Clip with gradient 1 strictly inside and 0 at the ends, whatever torch.clamp does there; NaN stays NaN."""
    return torch.where((x > low) & (x < high), x, x.detach().clamp(low, high))


def in_float(x: Tensor) -> Tensor:
    """`x` in at least float32: quantization is never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
