"""The convolution operator in plain PyTorch: the definition.

    qx = duq(act(batch_norm(x)))       ops/norm/reference.py; each of the three may be absent
    y = conv(pad(qx, d), w) + bias     w is quantized already

With d = -3/8 behind an h-swish quantizer the padding is integer code 0 (PROFIT, section 4.2; docs/maths.md, section 2).
Only x is kept for the backward; the gradient of the weight includes the padded taps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layer import Convolution, Norm, Quantizer
from ..norm.reference import quantized_input, quantized_input_backward


def pad(x: Tensor, pads: list[int], value: float) -> Tensor:
    """pads = (left, right, top, bottom)."""
    return F.pad(x, pads, value=value) if any(pads) else x


def unpad(x: Tensor, pads: list[int]) -> Tensor:
    left, right, top, bottom = pads
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def convolution(qx: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution) -> Tensor:
    """conv(pad(qx, d), w) + bias, in the dtype of qx."""
    pads, padding = conv.split(qx.shape[1])
    qx = pad(qx, pads, conv.pad_value)
    bias = None if bias is None else bias.to(qx.dtype)
    return F.conv2d(qx, weight.to(qx.dtype), bias, conv.stride, padding, conv.dilation, conv.groups)


def convolution_backward(
    grad: Tensor, qx: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dL/dqx, dL/dw, dL/dbias), each only where `need`ed. dL/dqx reads the shape of qx alone."""
    pads, padding = conv.split(qx.shape[1])
    padded = pad(qx, pads, conv.pad_value)
    bias_sizes = None if bias is None else [weight.shape[0]]
    g_padded, gw, gb = torch.ops.aten.convolution_backward(
        grad, padded, weight.to(qx.dtype), bias_sizes, conv.stride, padding, conv.dilation, False, [0, 0], conv.groups, need
    )
    gqx = unpad(g_padded, pads) if need[0] else None
    return gqx, gw.to(weight.dtype) if need[1] else None, gb.to(bias.dtype) if need[2] else None


def conv2d(
    x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    stage: Callable[..., Tensor] = quantized_input,
) -> Tensor:  # fmt: skip
    """y [N, C_out, H_out, W_out]; `stage` computes the quantized input (a kernel may)."""
    return convolution(stage(x, norm, q), weight, bias, conv)


def conv2d_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    need: tuple[bool, bool, bool], stage: Callable[..., Tensor] = quantized_input,
    stage_backward: Callable[..., tuple[Tensor | None, ...]] = quantized_input_backward,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, gamma, beta, a, c, weight, bias; `need`: those of the input side, of the weight, of the bias."""
    # Without a weight gradient nothing reads the values of the quantized input.
    qx = stage(x, norm, q) if need[1] else x
    gqx, gw, gb = convolution_backward(grad, qx, weight, bias, conv, need)
    gx = g_gamma = g_beta = ga = gc = None
    if gqx is not None:
        gx, g_gamma, g_beta, ga, gc = stage_backward(gqx, x, norm, q)
    return gx, g_gamma, g_beta, ga, gc, gw, gb
