"""Calls of the C++ kernels of the convolution. Depthwise layers and pointwise ones of codes are theirs; of the others
they compute the input side, and the convolution behind it is torch's."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...layer import Convolution, Norm, Quantizer
from ..norm.cpp import input_side, quantized_input, quantized_input_backward
from . import reference


def is_fused(depthwise: bool, norm: Norm | None, weight: Tensor) -> bool:
    """Whether one kernel computes the whole layer: a depthwise convolution, where asked for or behind a BatchNorm."""
    return depthwise or (norm is not None and weight.shape[1] == 1)


def _channels_last(x: Tensor) -> torch.memory_format | None:
    """The format of a convolution's output where the channels of each pixel of x lie together; else None."""
    if x.is_contiguous():
        # Of one pixel both formats are the same.
        return torch.contiguous_format if x.shape[2] == x.shape[3] == 1 else None
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else None


def pointwise(
    x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    codes: tuple[Tensor, int],
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
    served = torch.ops.profit_cpu.block_pointwise(y, x, *input_side(norm, q), weight, bias, *codes)
    return y if served else None


def layer(norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution) -> tuple[Any, ...]:
    """A layer as all C++ schemas take it."""
    geometry = (conv.stride, conv.pads, conv.dilation, conv.groups, conv.pad_value)
    return *input_side(norm, q), weight, bias, *geometry


def conv2d(
    x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution, *,
    depthwise: bool = False, codes: tuple[Tensor, int] | None = None,
) -> Tensor:  # fmt: skip
    """y; see reference.conv2d. codes: the scale and the bits that the weight is quantized with, if it is."""
    if is_fused(depthwise, norm, weight):
        native.load()
        return torch.ops.profit_cpu.block_depthwise(x, *layer(norm, q, weight, bias, conv))
    y = None if codes is None else pointwise(x, norm, q, weight, bias, conv, codes)
    return reference.conv2d(x, norm, q, weight, bias, conv, quantized_input) if y is None else y


def conv2d_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    need: tuple[bool, bool, bool], *, depthwise: bool = False,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, gamma, beta, a, c, weight, bias; see reference.conv2d_backward."""
    if not is_fused(depthwise, norm, weight):
        in_place = functools.partial(quantized_input_backward, in_place=True)
        return reference.conv2d_backward(grad, x, norm, q, weight, bias, conv, need, quantized_input, in_place)
    native.load()
    of_batch = norm is not None and norm.of_batch
    return torch.ops.profit_cpu.block_depthwise_backward(grad, x, *layer(norm, q, weight, bias, conv), of_batch, need[1])
