"""The statistics a BatchNorm normalises with, and its running ones."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks, dispatch
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


# Dtype of the input -> those of BatchNorm's tensors, as torch.nn.functional.batch_norm takes them.
_PARAMETERS = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
}
_NAMES = ("BatchNorm's weight", "BatchNorm's bias", "BatchNorm's running_mean", "BatchNorm's running_var")


def check_norm(
    op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, eps: float, momentum: float = 0.0,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless these are the arguments of a BatchNorm over x [N, C, H, W], a float tensor."""
    if x.dim() != 4:
        raise ValueError(f"{op}: the input must be [N, C, H, W], got shape {tuple(x.shape)}")
    checks.check_flag(op, "training", training)
    checks.check_number(op, "momentum", momentum)
    checks.check_number(op, "eps", eps)
    if eps <= 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    shape, device, allowed, dtype = x.shape[1:2], x.device, _PARAMETERS[x.dtype], None
    for name, value in zip(_NAMES, (weight, bias, running_mean, running_var), strict=True):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.device != device:
            checks.check_beside(op, x, name, value)
        if value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [{x.shape[1]}], got {tuple(value.shape)}")
        found = value.dtype
        if found not in allowed or (dtype is not None and found != dtype):
            checks.check_float(op, name, value)
            raise TypeError(
                f"{op}: BatchNorm's tensors must be of one dtype, that of the input ({x.dtype}) or, beside half precision, "
                f"float32; {name} is {found}"
            )
        dtype = found
    if (running_mean is None) != (running_var is None):
        raise ValueError(f"{op}: running_mean and running_var go together, one of them is None")
    if not training and running_mean is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var")
    if training and x.numel() <= x.shape[1]:
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
