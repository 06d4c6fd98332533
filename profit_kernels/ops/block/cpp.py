"""Calls of the C++ kernels of the block's input side (csrc/cpu/norm/input.cpp); the convolution behind it is torch's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import native
from ..duq.reference import ACTIVATIONS
from . import reference
from .reference import Convolution, Norm, Quantizer


def _dense(x: Tensor) -> Tensor:
    """x as the kernels walk it."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x if last or x.is_contiguous() else x.contiguous()


def _arguments(norm: Norm | None, q: Quantizer) -> tuple[Any, ...]:
    statistics = (None,) * 4 if norm is None else (norm.mean, norm.invstd, norm.gamma, norm.beta)
    return *statistics, q.a, q.c, q.bits, q.signed, q.offset, ACTIVATIONS.index(q.activation)


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, unbiased variance, 1 / sqrt(biased variance + eps)); see reference.moments."""
    native.load()
    return torch.ops.profit_cpu.block_moments(_dense(x), eps)


def quantized_input(x: Tensor, norm: Norm | None, q: Quantizer) -> Tensor:
    """duq(act(v)); see reference.quantized_input."""
    native.load()
    return torch.ops.profit_cpu.block_input(_dense(x), *_arguments(norm, q))


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
    rest = torch.ops.profit_cpu.block_input_backward(grad, gx, dense, *_arguments(norm, q), of_batch)
    return gx if dense is x else torch.empty_like(x).copy_(gx), *rest


def is_fused(norm: Norm | None, weight: Tensor) -> bool:
    """Whether one kernel computes the whole block: BatchNorm in front of a depthwise convolution."""
    return norm is not None and weight.shape[1] == 1


def _depthwise_arguments(norm: Norm, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution) -> tuple[Any, ...]:
    mean, invstd, gamma, beta, *quantizer = _arguments(norm, q)
    intervals, settings = quantizer[:2], quantizer[2:]
    tensors = (mean, invstd, gamma, beta, weight, *intervals, bias)
    return *tensors, *settings, conv.stride, conv.pads, conv.dilation, conv.pad_value


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The format of a convolution's output where the channels of each pixel of x lie together; else None."""
    if x.is_contiguous():
        # Of one pixel both formats are the same.
        return torch.contiguous_format if x.shape[2] == x.shape[3] == 1 else None
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None


def pointwise(
    x: Tensor, norm: Norm | None, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution, c_w: Tensor,
    weight_bits: int,
) -> Tensor | None:  # fmt: skip
    """y of a pointwise convolution, summed in integers; None where the tensors or the processor do not allow it."""
    plain = weight.shape[2] == weight.shape[3] == conv.groups == 1 and conv.stride == [1, 1] and not any(conv.pads)
    if not plain or q.bits is None or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return None
    native.load()
    layout = _channels_last(x)
    if layout is None or not torch.ops.profit_cpu.has_byte_products():
        return None
    images, _, height, width = x.shape
    y = torch.empty((images, weight.shape[0], height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    arguments = _arguments(norm, q)
    tensors = (*arguments[:4], weight, c_w, weight_bits, *arguments[4:6], bias)
    return y if torch.ops.profit_cpu.block_pointwise(y, x, *tensors, *arguments[6:]) else None


def block(
    x: Tensor, norm: Norm | None, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution,
    c_w: Tensor | None = None, weight_bits: int | None = None,
) -> Tensor:  # fmt: skip
    """y; see reference.block. c_w, weight_bits: those the weight is quantized with, if it is."""
    if is_fused(norm, weight):
        native.load()
        return torch.ops.profit_cpu.block_depthwise(x, *_depthwise_arguments(norm, weight, q, bias, conv))
    y = None if weight_bits is None else pointwise(x, norm, weight, q, bias, conv, c_w, weight_bits)
    return reference.block(x, norm, weight, q, bias, conv, quantized_input) if y is None else y


def block_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, gamma, beta, weight, a, c, bias; see reference.block_backward."""
    if is_fused(norm, weight):
        native.load()
        gx, g_gamma, g_beta, gw, ga, gc, gb = torch.ops.profit_cpu.block_depthwise_backward(
            grad, x, *_depthwise_arguments(norm, weight, q, bias, conv), norm.of_batch, need[1]
        )
        return gx, g_gamma, g_beta, gw, ga, gc, gb
    in_place = functools.partial(quantized_input_backward, in_place=True)
    return reference.block_backward(grad, x, norm, weight, q, bias, conv, need, quantized_input, in_place)
