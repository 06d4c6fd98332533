"""AIWQ in plain PyTorch: the definition.

Per output channel, mean and unbiased variance of new and old outputs over N, H, W, and the Gaussian (second-order) KL

    r = var_new / var_old ;  KL = 0.5 * (r - 1 - ln r) + 0.5 * (mean_new - mean_old)^2 / var_old

(PROFIT, section 3.2; docs/maths.md, section 3). Both outputs come from the same input, before BatchNorm.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ...layer import Convolution, Norm, Quantizer
from ..conv.reference import convolution
from ..norm.reference import quantized_input


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
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """conv(pad(duq(act(batch_norm(x)))), weight_old): x is the layer's raw input, as the layer itself takes it."""
    # In the dtype of y_new: under autocast the layer ran in bfloat16, and a float32 `old` would differ by the rounding alone.
    return convolution(quantized_input(x, norm, q).to(y_new.dtype), weight_old, bias, conv)


def conv_kl(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution,
    eps: float,
) -> Tensor:  # fmt: skip
    """KL of y_new from the old output."""
    return kl(y_new, old_output(x, y_new, norm, q, weight_old, bias, conv), eps)


def conv_moments(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """Moments [5, C], float64, of y_new and of the old output: rows as in pooled.ROWS."""
    y_old = old_output(x, y_new, norm, q, weight_old, bias, conv)
    return moment_rows(y_new, moments(y_new), moments(y_old))


def moment_rows(y: Tensor, new: Iterable[Tensor], old: Iterable[Tensor]) -> Tensor:
    """[5, C] from mean and unbiased variance of two outputs like y."""
    count = y.numel() // max(y.shape[1], 1)
    rows = [y.new_full((y.shape[1],), count, dtype=torch.float64)]
    for mean, variance in (new, old):
        # of a single value the unbiased variance is NaN, but it adds nothing to a pooled one
        rows += [mean, variance * (count - 1) if count > 1 else torch.zeros_like(mean)]
    return torch.stack(rows)
