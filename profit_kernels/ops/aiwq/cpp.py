"""AIWQ by the C++ kernels: moments that read each tensor once, and no old output that is written.

The kernels are in csrc/cpu/aiwq. A depthwise layer is convolved again row by row (aiwq.cpp). Where the weight that gave y_new
is known, only what the update changed is computed (update.cpp), or nothing but the moments of the input (wide.cpp). Other
layers run torch's convolution and then the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...layer import Convolution, Norm, Quantizer
from ..conv.cpp import layer
from ..conv.reference import convolution
from ..norm.cpp import quantized_input
from .reference import moment_rows


def kl(y_new: Tensor, y_old: Tensor, eps: float) -> Tensor:
    """KL per channel; see reference.kl."""
    native.load()
    return torch.ops.profit_cpu.aiwq_kl(_as_maps(y_new), _as_maps(y_old), eps)


def conv_kl(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution,
    eps: float, weight_new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """KL of y_new from the output under the old weight; see reference.conv_kl. weight_new: what gave y_new, if known."""
    native.load()
    depthwise = conv.groups == x.shape[1] and weight_old.shape[1] == 1 and x.dim() == 4
    arguments = (x, y_new, *layer(norm, q, weight_old, bias, conv), eps)
    if weight_new is not None and x.dtype == y_new.dtype == torch.float32 and (depthwise or _is_pointwise(weight_old, conv)):
        found = torch.ops.profit_cpu.aiwq_update(*arguments, weight_new)
        if found is not None:
            return found
    if depthwise:
        return torch.ops.profit_cpu.aiwq_depthwise(*arguments)
    return kl(y_new, _old_output(x, y_new, norm, q, weight_old, bias, conv), eps)


def conv_moments(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """Moments [5, C] of y_new and of the output under the old weight; see reference.conv_moments."""
    native.load()
    y_old = _old_output(x, y_new, norm, q, weight_old, bias, conv)
    return moment_rows(y_new, *(torch.ops.profit_cpu.aiwq_moments(y) for y in (y_new, y_old)))


def _old_output(x, y_new, norm, q, weight_old, bias, conv) -> Tensor:
    return convolution(quantized_input(x, norm, q).to(y_new.dtype), weight_old, bias, conv)


def _is_pointwise(weight: Tensor, conv: Convolution) -> bool:
    """1 x 1 without groups and padding."""
    return conv.groups == 1 and weight.shape[2:] == (1, 1) and not any(conv.pads)


def _as_maps(y: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, H, W]."""
    return y if y.dim() == 4 else y.reshape(*y.shape[:2], 1, -1)

