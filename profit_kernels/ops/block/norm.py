"""BatchNorm and activation in one operator that keeps x alone: the block's input side without quantizer and convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks, dispatch
from ..duq.reference import activate
from . import cpp, reference
from .autograd import differentiable
from .reference import Norm, Quantizer
from .statistics import check_norm, statistics

_NORM = "Tensor x, Tensor mean, Tensor invstd, Tensor? gamma, Tensor? beta, bool of_batch, str activation"

torch.library.define("profit_kernels::batch_norm_act", f"({_NORM}) -> Tensor")
torch.library.define(
    "profit_kernels::batch_norm_act_backward", f"(Tensor grad, {_NORM}) -> (Tensor, Tensor?, Tensor?)"
)


def _parts(x):
    return cpp if dispatch.choose("block", x) == "cpp" else reference


def _sides(mean, invstd, gamma, beta, of_batch, activation):
    return Norm(mean, invstd, gamma, beta, of_batch), Quantizer(None, None, None, False, 0.0, activation)


def _forward(x, *rest):
    return _parts(x).quantized_input(x, *_sides(*rest))


def _backward(grad, x, *rest):
    gx, g_gamma, g_beta, _, _ = _parts(x).quantized_input_backward(grad, x, *_sides(*rest))
    return gx, g_gamma, g_beta


@torch.library.register_fake("profit_kernels::batch_norm_act")
def _(x, *rest):
    return torch.empty_like(x)


@torch.library.register_fake("profit_kernels::batch_norm_act_backward")
def _(grad, x, mean, invstd, gamma, beta, *settings):
    return torch.empty_like(x), *(None if t is None else torch.empty_like(t) for t in (gamma, beta))


def _gradients(ctx, grad, backward):
    gx, g_gamma, g_beta = backward(grad, *ctx.saved_tensors, *ctx.settings)
    return gx, None, None, g_gamma, g_beta, None, None


_apply = differentiable("batch_norm_act", 5, _forward, _backward, _gradients)


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
    checks.check_activation(op, activation)
    checks.check_float(op, "the input", x)
    check_norm(op, x, weight, bias, running_mean, running_var, training, eps, momentum)
    if dispatch.choose("block", x) == "reference":
        v = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        # F.hardswish, as the modules have it: nothing is quantized here.
        return F.hardswish(v) if activation == "hardswish" else activate(v, activation)
    mean, invstd = statistics(x, running_mean, running_var, training, momentum, eps)
    return _apply(x, mean, invstd, weight, bias, training, activation)
