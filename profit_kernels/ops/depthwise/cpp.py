"""Calls of the C++ kernels of the depthwise convolution (csrc/cpu/conv/depthwise.cpp). The plain one is the fused one with both
quantizers absent."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ..duq.reference import ACTIVATIONS


def duq_depthwise(
    x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
) -> Tensor:  # fmt: skip
    """y; see reference.duq_depthwise."""
    native.load()
    return torch.ops.profit_cpu.duq_depthwise_forward(
        x, weight, a_x, c_x, a_w, c_w, bias, stride, pads, dilation,
        act_bits, weight_bits, signed, offset, ACTIVATIONS.index(activation), pad_value,
    )  # fmt: skip


def duq_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
    need_weight: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, a_x, c_x, a_w, c_w, bias; see reference.duq_depthwise_backward."""
    native.load()
    return torch.ops.profit_cpu.duq_depthwise_backward(
        grad, x, weight, a_x, c_x, a_w, c_w, bias, stride, pads, dilation,
        act_bits, weight_bits, signed, offset, ACTIVATIONS.index(activation), pad_value, need_weight,
    )  # fmt: skip


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], pad_value: float
) -> Tensor:
    """y; see reference.depthwise."""
    settings = (stride, pads, dilation, None, None, False, 0.0, "none", pad_value)
    return duq_depthwise(x, weight, None, None, None, None, bias, *settings)


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool,
    stride: list[int], pads: list[int], dilation: list[int], pad_value: float, need_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dL/dx, dL/dw, dL/dbias); see reference.depthwise_backward."""
    # The values of the bias do not matter here, only whether there is one.
    bias = weight.new_empty(weight.shape[0]) if has_bias else None
    settings = (stride, pads, dilation, None, None, False, 0.0, "none", pad_value)
    gx, gw, _, _, _, _, gb = duq_depthwise_backward(grad, x, weight, None, None, None, None, bias, *settings, need_weight)
    return gx, gw, gb
