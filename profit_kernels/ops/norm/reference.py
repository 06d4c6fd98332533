"""The input side of a layer in plain PyTorch: the definition.

    mean, var over N, H, W             per channel: of this batch, or the running statistics
    alpha = gamma / sqrt(var + eps),   beta' = beta - mean * alpha
    v = alpha * x + beta'              what BatchNorm gives
    qx = duq(act(v))                   what the convolution reads

Only x is kept for the backward; v, the codes and the masks are computed anew. With g = dL/dv (through DuQ and the
activation), x^ = (x - mean) / sqrt(var + eps) and n = N * H * W:

    dL/dbeta = sum(g),   dL/dgamma = sum(g * x^)
    dL/dx = alpha * (g - sum(g) / n - x^ * sum(g * x^) / n)      statistics of the batch
    dL/dx = alpha * g                                            running statistics

(docs/maths.md, section 1). Without a norm v = x; with bits None qx = act(v).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layer import Norm, Quantizer
from ..duq import reference as duq


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
    """qx, in the dtype of x."""
    v = normalize(x, norm)
    if q.bits is None:
        return duq.activate(v, q.activation).to(x.dtype)
    return duq.forward(v, q.a, q.c, q.bits, q.signed, q.offset, q.activation).to(x.dtype)


def quantized_input_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dL/dx, dL/dgamma, dL/dbeta, dL/da, dL/dc) from the gradient of qx."""
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
