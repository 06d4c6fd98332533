"""Depthwise convolution that pads with a value, in plain PyTorch: the definition.

    y = conv(pad(x, d), w) + bias          one filter per output channel, groups = channels of x

With d = -3/8 behind an h-swish quantizer the padding is integer code 0 (PROFIT, section 4.2; docs/maths.md, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..duq import reference as duq


def pad(x: Tensor, pads: list[int], value: float) -> Tensor:
    """pads = (left, right, top, bottom)."""
    return F.pad(x, pads, value=value) if any(pads) else x


def unpad(x: Tensor, pads: list[int]) -> Tensor:
    left, right, top, bottom = pads
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    pad_value: float,
) -> Tensor:
    """Differentiable in x, weight and bias."""
    return F.conv2d(pad(x, pads, pad_value), weight, bias, stride, 0, dilation, groups=x.shape[1])


def depthwise_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    has_bias: bool,
    stride: list[int],
    pads: list[int],
    dilation: list[int],
    pad_value: float,
    need_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dL/dx, dL/dw, dL/dbias); the weight gradient, where it is needed, includes the padded taps."""
    padded = pad(x, pads, pad_value)
    mask = [True, need_weight, has_bias]
    bias_sizes = [weight.shape[0]] if has_bias else None
    g_padded, gw, gb = torch.ops.aten.convolution_backward(
        grad, padded, weight, bias_sizes, stride, [0, 0], dilation, False, [0, 0], x.shape[1], mask
    )
    return unpad(g_padded, pads), gw if need_weight else None, gb if has_bias else None


def quantize_input(
    x: Tensor, a: Tensor | None, c: Tensor | None, bits: int | None, signed: bool, offset: float, activation: str
) -> Tensor:
    """What the convolution sees: act(x), quantized unless bits is None."""
    if bits is None:
        return duq.activate(x.to(duq.compute_dtype(x)), activation).to(x.dtype)
    return duq.forward(x, a, c, bits, signed, offset, activation)


def quantize_weight(weight: Tensor, a: Tensor | None, c: Tensor | None, bits: int | None) -> Tensor:
    return weight if bits is None else duq.forward(weight, a, c, bits, True, 0.0, "none")


def duq_depthwise(
    x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
) -> Tensor:  # fmt: skip
    """depthwise(duq(act(x)), duq(w)), the weight quantized in its own dtype and then taken to that of x."""
    qx = quantize_input(x, a_x, c_x, act_bits, signed, offset, activation)
    qw = quantize_weight(weight, a_w, c_w, weight_bits).to(x.dtype)
    return depthwise(qx, qw, None if bias is None else bias.to(x.dtype), stride, pads, dilation, pad_value)


def duq_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
    need_weight: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, a_x, c_x, a_w, c_w, bias; the quantized input and weight are computed anew.

    Without `need_weight` none of weight, a_w, c_w has one: a frozen layer.
    """
    qx = quantize_input(x, a_x, c_x, act_bits, signed, offset, activation)
    qw = quantize_weight(weight, a_w, c_w, weight_bits).to(x.dtype)
    gqx, gqw, gb = depthwise_backward(grad, qx, qw, bias is not None, stride, pads, dilation, pad_value, need_weight)
    ga_x = gc_x = ga_w = gc_w = None
    if act_bits is None:
        gx = (gqx * duq.activate_grad(x.to(duq.compute_dtype(x)), activation)).to(x.dtype)
    else:
        gx, ga_x, gc_x = duq.backward(gqx, x, a_x, c_x, act_bits, signed, offset, activation)
    gw = gqw.to(weight.dtype) if need_weight else None
    if need_weight and weight_bits is not None:
        gw, ga_w, gc_w = duq.backward(gw, weight, a_w, c_w, weight_bits, True, 0.0, "none")
    return gx, gw, ga_x, gc_x, ga_w, gc_w, None if gb is None else gb.to(bias.dtype)
