"""Calls of the C++ kernels of a layer's input side (csrc/cpu/norm/input.cpp)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import native
from ...layer import ACTIVATIONS, Norm, Quantizer


def _dense(x: Tensor) -> Tensor:
    """x as the kernels walk it."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def input_side(norm: Norm | None, q: Quantizer) -> tuple[Any, ...]:
    """Norm and quantizer as all C++ schemas take them."""
    front = (None,) * 4 if norm is None else (norm.mean, norm.invstd, norm.gamma, norm.beta)
    return *front, q.a, q.c, q.bits, q.signed, q.offset, ACTIVATIONS.index(q.activation)


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, unbiased variance, 1 / sqrt(biased variance + eps)); see reference.moments."""
    native.load()
    return torch.ops.profit_cpu.block_moments(_dense(x), eps)


def quantized_input(x: Tensor, norm: Norm | None, q: Quantizer) -> Tensor:
    """duq(act(v)); see reference.quantized_input."""
    native.load()
    return torch.ops.profit_cpu.block_input(_dense(x), *input_side(norm, q))


def quantized_input_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer, in_place: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dL/dx, dL/dgamma, dL/dbeta, dL/da, dL/dc); `in_place`: the first in the memory of `grad`, where that fits."""
    native.load()
    dense = _dense(x)
    if grad.stride() != dense.stride():
        grad, in_place = torch.empty_like(dense).copy_(grad), True
    gx = grad if in_place else torch.empty_like(dense)
    of_batch = norm is not None and norm.of_batch
    rest = torch.ops.profit_cpu.block_input_backward(grad, gx, dense, *input_side(norm, q), of_batch)
    return gx if dense is x else torch.empty_like(x).copy_(gx), *rest
