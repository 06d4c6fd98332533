"""Registrations and public entries of BatchNorm: its statistics, and with the activation in one operator that keeps x alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks, dispatch
from ...layer import BatchNorm, Norm, Quantizer, check_activation, check_norm
from ...registration import autocast, differentiable, operator
from ..duq.reference import activate, compute_dtype
from . import reference


def _moments(tensors, rest):
    return dispatch.serving(__package__, "block", tensors[0]).moments(*tensors, *rest)


def _fake_moments(tensors, rest):
    (x,) = tensors
    return tuple(x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(3))


_apply_moments = operator(
    "batch_norm_moments", "Tensor x, float eps", "(Tensor, Tensor, Tensor)", _moments, _fake_moments
)


def statistics(x: Tensor, norm: BatchNorm, move: bool = True) -> Norm:
    """What normalises x: the statistics of this batch, or the running ones.

    In training the running statistics move by the momentum, in place; without `move` they stay.
    """
    if not norm.training:
        dtype = compute_dtype(x)
        mean, invstd = norm.running_mean.to(dtype), (norm.running_var.to(dtype) + norm.eps).rsqrt()
        return Norm(mean, invstd, norm.weight, norm.bias, False)
    mean, var, invstd = _apply_moments(x.detach(), norm.eps)
    if norm.running_mean is not None and move:
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)
    return Norm(mean, invstd, norm.weight, norm.bias, True)


def by_torch(x: Tensor, norm: BatchNorm) -> Tensor:
    """batch_norm(x) as torch computes it; its running statistics move."""
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
    )


def _input_side(tensors, settings):
    """(x, norm, quantizer) of `batch_norm_act`."""
    x, *of_norm = tensors
    of_batch, activation = settings
    return x, Norm(*of_norm, of_batch), Quantizer(None, None, None, False, 0.0, activation)


def _forward(tensors, settings):
    return dispatch.serving(__package__, "block", tensors[0]).quantized_input(*_input_side(tensors, settings))


def _backward(grad, tensors, settings, needed):
    serving = dispatch.serving(__package__, "block", tensors[0])
    gx, g_gamma, g_beta, _, _ = serving.quantized_input_backward(grad, *_input_side(tensors, settings))
    return gx, g_gamma, g_beta


def _fake_backward(grad, tensors, settings, needed):
    x, _, _, gamma, beta = tensors
    return tuple(None if t is None else torch.empty_like(t) for t in (x, gamma, beta))


# Statistics of the batch have no gradient of their own: that of x holds it already.
_apply = differentiable(
    "batch_norm_act",
    "Tensor x, Tensor mean, Tensor invstd, Tensor? gamma, Tensor? beta, bool of_batch, str activation",
    _forward, _backward, fake=lambda tensors, settings: torch.empty_like(tensors[0]), fake_backward=_fake_backward,
    gradients="x gamma beta",
)  # fmt: skip


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "none",
) -> Tensor:
    """act(batch_norm(x)), which keeps x and the statistics [C] for the backward.

    Args:
        x: [N, C, H, W], any float dtype, NCHW or channels_last.
        weight, bias, running_mean, running_var, training, momentum, eps: as torch.nn.functional.batch_norm takes them; the
            running statistics are changed in place when `training`.
        activation: "none", "relu", "relu6" or "hardswish".

    Returns: like x. BatchNorm's result stays in float32 on the way to the activation, also where x is in half precision.
    Raises: ValueError or TypeError for arguments that do not fit; BackendError if the backend asked for cannot serve.
    Source: docs/maths.md, section 1.
    """
    op = "batch_norm_act"
    check_activation(op, activation)
    checks.check_float(op, "the input", x)
    norm = BatchNorm(weight, bias, running_mean, running_var, training, momentum, eps)
    check_norm(op, x, norm)
    if dispatch.choose("block", x) == "reference":
        v = by_torch(x, norm)
        # F.hardswish, as the modules have it: nothing is quantized here.
        return F.hardswish(v) if activation == "hardswish" else activate(v, activation)
    taken = statistics(x, norm)
    return _apply(x, taken.mean, taken.invstd, weight, bias, training, activation)


@torch.no_grad()
def block_batch_norm(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    eps: float = 1e-5,
) -> Tensor:
    """batch_norm(x) as block_conv2d computes it on the way, to the bit; no gradient, and no statistics are changed.

    Arguments and errors as there. Returns [N, C, H, W]; in float32 for a half-precision x where the block has a kernel.
    """
    op = "block_batch_norm"
    checks.check_float(op, "the input", x)
    x = autocast(x)
    norm = BatchNorm(bn_weight, bn_bias, running_mean, running_var, training, 0.0, eps)
    check_norm(op, x, norm)
    if dispatch.choose("block", x) == "reference":
        running = (None, None) if training else (running_mean, running_var)
        return F.batch_norm(x, *running, bn_weight, bn_bias, training, 0.0, eps)
    return reference.normalize(x, statistics(x, norm, move=False))
