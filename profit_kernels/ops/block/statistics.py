"""The statistics a BatchNorm normalises with, and its running ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ..duq.reference import compute_dtype
from . import cpp, reference
from .autograd import is_plain

torch.library.define("profit_kernels::block_moments", "(Tensor x, float eps) -> (Tensor, Tensor, Tensor)")


def _moments(x, eps):
    return (cpp if dispatch.choose("block", x) == "cpp" else reference).moments(x, eps)


torch.library.impl("profit_kernels::block_moments", "default", _moments)


@torch.library.register_fake("profit_kernels::block_moments")
def _(x, eps):
    return tuple(x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(3))


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool,
) -> None:  # fmt: skip
    """Raise ValueError unless these are the tensors of a BatchNorm over x [N, C, H, W]."""
    if x.dim() != 4:
        raise ValueError(f"{op}: the input must be [N, C, H, W], got shape {tuple(x.shape)}")
    names = ("weight", "bias", "running_mean", "running_var")
    for name, value in zip(names, (weight, bias, running_mean, running_var), strict=True):
        if value is not None and value.shape != x.shape[1:2]:
            raise ValueError(f"{op}: BatchNorm's {name} must have shape [{x.shape[1]}], got {tuple(value.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var go together, one of them is None")
    if not training and running_mean is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var")
    if training and x.numel() == x.shape[1]:
        raise ValueError(f"{op}: statistics of the batch need more than one value per channel, got {tuple(x.shape)}")


def statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(variance + eps)), [C]: of this batch, or the running ones.

    In training the running statistics move by `momentum`, in place; with None they stay.
    """
    if not training:
        dtype = compute_dtype(x)
        return running_mean.to(dtype), (running_var.to(dtype) + eps).rsqrt()
    of_batch = _moments if is_plain(x) else torch.ops.profit_kernels.block_moments
    mean, var, invstd = of_batch(x.detach(), eps)
    if running_mean is not None and momentum is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return mean, invstd
