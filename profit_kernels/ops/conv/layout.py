"""Memory formats of the kernels' results, known without a kernel: the fakes need them too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ...layer import Convolution


def memory_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """channels_last if either operand is, as torch's convolutions have it."""
    either = torch.channels_last in (suggest_memory_format(x), suggest_memory_format(weight))
    return torch.channels_last if either else torch.contiguous_format


def output(x: Tensor, weight: Tensor, conv: Convolution) -> Tensor:
    """An unwritten [N, C_out, H_out, W_out] in the dtype of x."""
    shape = (x.shape[0], weight.shape[0], *conv.output_size("convolution", x, weight))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x, weight))


def input_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """An unwritten dL/dx."""
    return torch.empty_like(x, memory_format=memory_format(x, weight))
