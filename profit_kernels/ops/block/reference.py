"""The block operator in plain PyTorch: the definition.

    mean, var over N, H, W             per channel: of this batch, or the running statistics
    alpha = gamma / sqrt(var + eps),   beta' = beta - mean * alpha
    v = alpha * x + beta'              what BatchNorm gives
    y = conv(pad(duq(act(v)), p), w) + bias

Only x is kept for the backward; v, the codes and the masks are computed anew. With g = dL/dv (through the convolution,
DuQ and the activation), x^ = (x - mean) / sqrt(var + eps) and n = N * H * W:

    dL/dbeta = sum(g),   dL/dgamma = sum(g * x^)
    dL/dx = alpha * (g - sum(g) / n - x^ * sum(g * x^) / n)      statistics of the batch
    dL/dx = alpha * g                                            running statistics

(docs/maths.md, section 1). Without statistics (mean None) there is no BatchNorm and v = x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..depthwise import reference as depthwise
from ..duq import reference as duq


@dataclass(frozen=True)
class Norm:
    """What normalises x: per-channel tensors [C] in the compute dtype, or None where BatchNorm has no such parameter.

    `of_batch`: the statistics are those of x itself, so gradients flow through them.
    """

    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    of_batch: bool


@dataclass(frozen=True)
class Quantizer:
    """DuQ of the input; bits None: the activation alone."""

    a: Tensor | None
    c: Tensor | None
    bits: int | None
    signed: bool
    offset: float
    activation: str


def per_channel(value: Tensor, x: Tensor) -> Tensor:
    """[C] shaped to broadcast over [N, C, H, W], in the compute dtype of x."""
    return value.to(duq.compute_dtype(x)).view(1, -1, 1, 1)


def moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, unbiased variance, 1 / sqrt(biased variance + eps)) per channel, from float64 sums; [C], compute dtype."""
    dtype = duq.compute_dtype(x)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    n = x.numel() // max(x.shape[1], 1)
    return mean.to(dtype), (var * (n / (n - 1))).to(dtype), (var + eps).rsqrt().to(dtype)


def scale_and_shift(norm: Norm) -> tuple[Tensor, Tensor]:
    """alpha, beta' of v = alpha * x + beta'."""
    dtype = norm.mean.dtype
    alpha = norm.invstd if norm.gamma is None else norm.invstd * norm.gamma.to(dtype)
    shift = -(norm.mean * alpha)
    return alpha, shift if norm.beta is None else norm.beta.to(dtype) + shift


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """v, in the compute dtype: it is not rounded to a half-precision x in between."""
    x = x.to(duq.compute_dtype(x))
    if norm is None:
        return x
    alpha, shift = scale_and_shift(norm)
    return x * per_channel(alpha, x) + per_channel(shift, x)


def quantized_input(x: Tensor, norm: Norm | None, q: Quantizer) -> Tensor:
    """duq(act(v)), what the convolution reads, in the dtype of x."""
    v = normalize(x, norm)
    return depthwise.quantize_input(v, q.a, q.c, q.bits, q.signed, q.offset, q.activation).to(x.dtype)


def quantized_input_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dL/dx, dL/dgamma, dL/dbeta, dL/da, dL/dc) from the gradient of the quantized input."""
    v = normalize(x, norm)
    grad = grad.to(v.dtype)
    ga = gc = None
    if q.bits is None:
        g = grad * duq.activate_grad(v, q.activation)
    else:
        g, ga, gc = duq.backward(grad, v, q.a, q.c, q.bits, q.signed, q.offset, q.activation)
    if norm is None:
        return g.to(x.dtype), None, None, ga, gc
    x_hat = (x.to(v.dtype) - per_channel(norm.mean, x)) * per_channel(norm.invstd, x)
    sum_g = g.double().sum((0, 2, 3))
    sum_g_x = (g.double() * x_hat).sum((0, 2, 3))
    if norm.of_batch:
        n = x.numel() // max(x.shape[1], 1)
        g = g - per_channel(sum_g / n, x) - x_hat * per_channel(sum_g_x / n, x)
    gx = per_channel(scale_and_shift(norm)[0], x) * g
    g_gamma = None if norm.gamma is None else sum_g_x.to(norm.gamma.dtype)
    g_beta = None if norm.beta is None else sum_g.to(norm.beta.dtype)
    return gx.to(x.dtype), g_gamma, g_beta, ga, gc


@dataclass(frozen=True)
class Convolution:
    """Geometry: stride, pads (left, right, top, bottom), dilation, groups and the value of the border."""

    stride: list[int]
    pads: list[int]
    dilation: list[int]
    groups: int
    pad_value: float

    def split(self) -> tuple[list[int], list[int]]:
        """(what F.pad puts around the input, padding left to the convolution): zeros need no padded copy."""
        left, right, top, bottom = self.pads
        if self.pad_value == 0 and left == right and top == bottom:
            return [0, 0, 0, 0], [top, left]
        return self.pads, [0, 0]


def convolution(qx: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution) -> Tensor:
    """conv(pad(qx, p), w) + bias, in the dtype of qx."""
    pads, padding = conv.split()
    qx = depthwise.pad(qx, pads, conv.pad_value)
    bias = None if bias is None else bias.to(qx.dtype)
    return F.conv2d(qx, weight.to(qx.dtype), bias, conv.stride, padding, conv.dilation, conv.groups)


def convolution_backward(
    grad: Tensor, qx: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dL/dqx, dL/dw, dL/dbias), each only where `need`ed. dL/dqx reads the shape of qx alone."""
    pads, padding = conv.split()
    padded = depthwise.pad(qx, pads, conv.pad_value)
    bias_sizes = None if bias is None else [weight.shape[0]]
    g_padded, gw, gb = torch.ops.aten.convolution_backward(
        grad, padded, weight.to(qx.dtype), bias_sizes, conv.stride, padding, conv.dilation, False, [0, 0], conv.groups, need
    )
    gqx = depthwise.unpad(g_padded, pads) if need[0] else None
    return gqx, gw.to(weight.dtype) if need[1] else None, gb.to(bias.dtype) if need[2] else None


def block(
    x: Tensor, norm: Norm | None, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution,
    stage: Callable[..., Tensor] = quantized_input,
) -> Tensor:  # fmt: skip
    """y [N, C_out, H_out, W_out]; `stage` computes the quantized input (a kernel may)."""
    return convolution(stage(x, norm, q), weight, bias, conv)


def block_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, q: Quantizer, bias: Tensor | None, conv: Convolution,
    need: tuple[bool, bool, bool], stage: Callable[..., Tensor] = quantized_input,
    stage_backward: Callable[..., tuple[Tensor | None, ...]] = quantized_input_backward,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, gamma, beta, weight, a, c, bias; `need`: those of the input side, of the weight, of the bias."""
    # Without a weight gradient nothing reads the values of the quantized input.
    qx = stage(x, norm, q) if need[1] else x
    gqx, gw, gb = convolution_backward(grad, qx, weight, bias, conv, need)
    gx = g_gamma = g_beta = ga = gc = None
    if gqx is not None:
        gx, g_gamma, g_beta, ga, gc = stage_backward(gqx, x, norm, q)
    return gx, g_gamma, g_beta, gw, ga, gc, gb
