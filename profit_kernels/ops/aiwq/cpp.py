"""AIWQ by the C++ kernels: moments that read each tensor once, and no old output that is written.

The kernels are in csrc/cpu/aiwq. A depthwise layer is convolved again row by row (aiwq.cpp). Where the weight that gave y_new
is known, only what the update changed is computed (update.cpp), or nothing but the moments of the input (wide.cpp). Other
layers run torch's convolution and then the moments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ..block import cpp as block_cpp
from ..block.reference import Convolution, Norm, Quantizer, convolution
from ..duq.reference import ACTIVATIONS


def kl(y_new: Tensor, y_old: Tensor, eps: float) -> Tensor:
    """KL per channel; see reference.kl."""
    native.load()
    return torch.ops.profit_cpu.aiwq_kl(_as_maps(y_new), _as_maps(y_old), eps)


def conv_kl(
    x: Tensor, y_new: Tensor, weight_old: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    groups: int, pad_value: float, a_x: Tensor | None, c_x: Tensor | None, act_bits: int | None, signed: bool, offset: float,
    activation: str, eps: float, weight_new: Tensor | None = None, norm: Norm | None = None,
) -> Tensor:  # fmt: skip
    """KL of y_new from the output under the old weight; see reference.conv_kl.

    weight_new: what gave y_new, if known. norm: the BatchNorm in front of the activation.
    """
    native.load()
    dtype = y_new.dtype
    front = (None,) * 4 if norm is None else (norm.mean, norm.invstd, norm.gamma, norm.beta)
    if weight_new is not None and x.dtype == dtype == torch.float32 and _is_simple(x, weight_old, pads, groups):
        found = torch.ops.profit_cpu.aiwq_update(
            x, y_new, weight_old, weight_new, bias, stride, pads, dilation, groups, pad_value,
            a_x, c_x, act_bits, signed, offset, ACTIVATIONS.index(activation), eps, *front,
        )  # fmt: skip
        if found is not None:
            return found
    if groups == x.shape[1] and weight_old.shape[1] == 1 and x.dim() == 4:
        return torch.ops.profit_cpu.aiwq_depthwise(
            x, y_new, weight_old, bias, stride, pads, dilation, pad_value,
            a_x, c_x, act_bits, signed, offset, ACTIVATIONS.index(activation), eps, *front,
        )  # fmt: skip
    qx = block_cpp.quantized_input(x, norm, Quantizer(a_x, c_x, act_bits, signed, offset, activation)).to(dtype)
    y_old = convolution(qx, weight_old, bias, Convolution(stride, pads, dilation, groups, pad_value))
    return kl(y_new, y_old, eps)


def _is_simple(x: Tensor, weight: Tensor, pads: list[int], groups: int) -> bool:
    """Depthwise, or pointwise without groups and padding."""
    depthwise = groups == x.shape[1] and weight.shape[1] == 1
    return depthwise or (groups == 1 and weight.shape[2:] == (1, 1) and not any(pads))


def _as_maps(y: Tensor) -> Tensor:
    """[N, C, ...] as [N, C, H, W]."""
    return y if y.dim() == 4 else y.reshape(*y.shape[:2], 1, -1)

