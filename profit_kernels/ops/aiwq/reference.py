"""AIWQ in plain PyTorch: the definition.

Per output channel, mean and unbiased variance of new and old outputs over N, H, W, and the Gaussian (second-order) KL

    r = var_new / var_old ;  KL = 0.5 * (r - 1 - ln r) + 0.5 * (mean_new - mean_old)^2 / var_old

(PROFIT, section 3.2; docs/maths.md, section 3). Both outputs come from the same input, before BatchNorm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..depthwise.reference import pad, quantize_input


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per channel (dimension 1), two-pass in float64."""
    rows = y.double().transpose(0, 1).flatten(1)
    mean = rows.mean(1)
    return mean, (rows - mean[:, None]).square().sum(1) / (rows.shape[1] - 1)


def kl_of_moments(mean_new: Tensor, var_new: Tensor, mean_old: Tensor, var_old: Tensor, eps: float) -> Tensor:
    """KL per channel, float32. eps is added to both variances; log1p keeps what r - 1 has of significant digits."""
    scale = var_old + eps
    r_minus_1 = (var_new - var_old) / scale
    return (0.5 * (r_minus_1 - torch.log1p(r_minus_1)) + 0.5 * (mean_new - mean_old).square() / scale).float()


def kl(y_new: Tensor, y_old: Tensor, eps: float) -> Tensor:
    """KL per channel of two outputs, float32."""
    return kl_of_moments(*moments(y_new), *moments(y_old), eps)


def old_output(
    x: Tensor, y_new: Tensor, weight_old: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    groups: int, pad_value: float, a_x: Tensor | None, c_x: Tensor | None, act_bits: int | None, signed: bool, offset: float,
    activation: str,
) -> Tensor:  # fmt: skip
    """conv(pad(duq(act(x))), weight_old): x is the layer's raw input, as the layer itself takes it."""
    # In the dtype of y_new: under autocast the layer ran in bfloat16, and a float32 `old` would differ by the rounding alone.
    dtype = y_new.dtype
    qx = quantize_input(x, a_x, c_x, act_bits, signed, offset, activation).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.conv2d(pad(qx, pads, pad_value), weight_old.to(dtype), bias, stride, 0, dilation, groups)


def conv_kl(x: Tensor, y_new: Tensor, weight_old: Tensor, *rest: Any) -> Tensor:
    """KL of y_new from the old output; `rest` is that of `old_output`, then eps."""
    return kl(y_new, old_output(x, y_new, weight_old, *rest[:-1]), rest[-1])
