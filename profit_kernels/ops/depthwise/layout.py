"""Sizes and memory formats of the depthwise kernels' results, known without a kernel: the fakes need them too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ...checks import output_size as _output_size


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last if either operand is, as torch's convolutions have it."""
    either = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if either else torch.contiguous_format


def output_size(x: Tensor, weight: Tensor, stride: list[int], pads: list[int], dilation: list[int]) -> tuple[int, int]:
    """(H_out, W_out) for pads = (left, right, top, bottom). Raises ValueError for a kernel larger than the padded input."""
    return _output_size("depthwise convolution", x, weight, stride, pads, dilation)


def output(x: Tensor, weight: Tensor, stride: list[int], pads: list[int], dilation: list[int]) -> Tensor:
    """An unwritten [N, C_out, H_out, W_out] in the dtype of x."""
    shape = (x.shape[0], weight.shape[0], *output_size(x, weight, stride, pads, dilation))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))


def gradients(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Unwritten dL/dx and dL/dw."""
    return torch.empty_like(x, memory_format=memory_format(x, weight)), torch.empty_like(weight)
