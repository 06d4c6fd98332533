"""The operators that may stand between the layers of an exported network, each computed by PyTorch in the dtype given.

They are computed in floating point: residual sums, squeeze-and-excite gates, pools and activations that conversion left
where they were. The names and settings are part of the packed file's format (docs/export.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _clip(x: Tensor, *, low: float | None, high: float | None) -> Tensor:
    return x.clamp(low, high)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """A BatchNorm that could not be folded: per index of dimension 1."""
    shape = [1, -1] + [1] * (x.dim() - 2)
    return x * scale.view(shape) + shift.view(shape)


def _pad(x: Tensor, *, pads: Sequence[int], value: float) -> Tensor:
    return F.pad(x, list(pads), value=value)


def _avg_pool(x: Tensor, *, kernel, stride, padding, ceil_mode: bool, count_include_pad: bool) -> Tensor:
    return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)


def _max_pool(x: Tensor, *, kernel, stride, padding, dilation, ceil_mode: bool) -> Tensor:
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)


def _mean(x: Tensor, *, dims: Sequence[int], keepdim: bool) -> Tensor:
    return x.mean(list(dims), keepdim)


def _reshape(x: Tensor, *, shape: Sequence[int]) -> Tensor:
    return x.reshape(list(shape))


def _permute(x: Tensor, *, dims: Sequence[int]) -> Tensor:
    return x.permute(list(dims))


def _cat(*parts: Tensor, dim: int) -> Tensor:
    return torch.cat(parts, dim)


def _slice(x: Tensor, *, dim: int, start: int, stop: int, step: int) -> Tensor:
    index = [slice(None)] * x.dim()
    index[dim] = slice(start, stop, step)
    return x[tuple(index)]


def _softmax(x: Tensor, *, dim: int) -> Tensor:
    return x.softmax(dim)


def _gelu(x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _leaky_relu(x: Tensor, *, slope: float) -> Tensor:
    return F.leaky_relu(x, slope)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "relu": F.relu,
    "clip": _clip,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": _gelu,
    "tanh": torch.tanh,
    "leaky_relu": _leaky_relu,
    "softmax": _softmax,
    "affine": _affine,
    "mean": _mean,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "pad": _pad,
    "reshape": _reshape,
    "permute": _permute,
    "cat": _cat,
    "slice": _slice,
}
