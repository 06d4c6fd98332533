"""Independent oracles: the textbook in torch's own differentiable functions, and sums by hand in numpy.

Nothing here calls profit_kernels; the package is compared with it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "relu6": F.relu6, "hardswish": F.hardswish}


def textbook_duq(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """DuQ as one would first write it; autograd does the rest (hardtanh's gradient is strict at both ends)."""
    levels = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    shape = [-1] + [1] * (x.dim() - 1) if a.numel() > 1 else [1] * x.dim()
    A, C = F.softplus(a).view(shape), F.softplus(c).view(shape)
    u = F.hardtanh((ACTIVATIONS[activation](x) - offset) / A, -1.0 if signed else 0.0, 1.0)
    return C * (_RoundSTE.apply(u * levels) / levels) + offset


def loop_depthwise(x: np.ndarray, w: np.ndarray, stride, pads, dilation, pad_value: float) -> np.ndarray:
    """Depthwise convolution by its definition, in float64 loops over the output."""
    (left, right, top, bottom), (sh, sw), (dh, dw) = pads, stride, dilation
    n, channels, height, width = x.shape
    out_channels, _, kh, kw = w.shape
    padded = np.full((n, channels, height + top + bottom, width + left + right), pad_value, dtype=np.float64)
    padded[:, :, top : top + height, left : left + width] = x
    out_h = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = np.zeros((n, out_channels, out_h, out_w))
    for o in range(out_channels):
        source = padded[:, o * channels // out_channels]
        for i in range(out_h):
            for j in range(out_w):
                window = source[:, i * sh : i * sh + dh * kh : dh, j * sw : j * sw + dw * kw : dw]
                y[:, o, i, j] = (window * w[o, 0]).sum(axis=(1, 2))
    return y


def gaussian_kl(new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """KL(N_new || N_old) per channel in its usual form, from float64 moments over all other axes."""
    axes = (0, *range(2, new.ndim))
    mean_new, mean_old = new.mean(axes, dtype=np.float64), old.mean(axes, dtype=np.float64)
    var_new, var_old = (v.astype(np.float64).var(axes, ddof=1) for v in (new, old))
    return np.log(np.sqrt(var_old / var_new)) + (var_new + (mean_new - mean_old) ** 2) / (2 * var_old) - 0.5
