"""Schemas, registrations and public entries of AIWQ. Statistics: not differentiable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import checks, dispatch
from ..block.autograd import is_plain
from ..block.op import block_batch_norm
from ..block.reference import Norm, normalize
from ..block.statistics import check_norm, statistics
from . import cpp

EPS = 1e-12  # added to both variances; far below that of a live channel, enough for a dead one to give 0 and not NaN

torch.library.define("profit_kernels::aiwq_kl", "(Tensor y_new, Tensor y_old, float eps) -> Tensor")
torch.library.define(
    "profit_kernels::aiwq_conv2d",
    "(Tensor x, Tensor y_new, Tensor weight_old, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups, "
    "float pad_value, Tensor? a_x, Tensor? c_x, int? act_bits, bool signed, float offset, str activation, float eps, "
    "*, Tensor? weight_new=None, Tensor? mean=None, Tensor? invstd=None, Tensor? gamma=None, Tensor? beta=None) -> Tensor",
)


def _wider(first: Tensor, second: Tensor) -> Tensor:
    """The one whose dtype decides which backend can serve both: float64 if either is."""
    return second if second.dtype == torch.float64 else first


def _beyond_triton(x: Tensor, weight: Tensor, padding: Sequence[int], groups: int) -> str | None:
    depthwise = groups == x.shape[1] and weight.shape[1] == 1
    pointwise = groups == 1 and tuple(weight.shape[2:]) == (1, 1) and not any(padding)
    if x.dim() == 4 and (depthwise or pointwise):
        return None
    return (
        "its aiwq_conv kernels serve depthwise layers and 1x1 layers without groups and padding, on [N, C, H, W]; "
        f"this is a weight {tuple(weight.shape)} with groups={groups}, padding={list(padding)} on {tuple(x.shape)}"
    )


@torch.library.impl("profit_kernels::aiwq_kl", "default")
def _kl(y_new, y_old, eps):
    with torch.no_grad():
        return dispatch.serving(__package__, "aiwq", _wider(y_new, y_old)).kl(y_new, y_old, eps)


def _conv_kl(
    x, y_new, weight_old, bias, stride, padding, dilation, groups, *rest,
    weight_new=None, mean=None, invstd=None, gamma=None, beta=None,
):  # fmt: skip
    limits = {"triton": _beyond_triton(x, weight_old, padding, groups)}
    norm = None if mean is None else Norm(mean, invstd, gamma, beta, of_batch=True)
    with torch.no_grad():
        backend = dispatch.serving(__package__, "aiwq_conv", _wider(x, y_new), limits)
        # Only the C++ kernels know how to use these.
        known = {"weight_new": weight_new, "norm": norm} if backend is cpp else {}
        if norm is not None and not known:
            x = normalize(x, norm)
        return backend.conv_kl(x, y_new, weight_old, bias, stride, padding, dilation, groups, *rest, **known)


torch.library.impl("profit_kernels::aiwq_conv2d", "default", _conv_kl)


@torch.library.register_fake("profit_kernels::aiwq_kl")
def _(y_new, y_old, eps):
    return y_new.new_empty(y_new.shape[1], dtype=torch.float32)


@torch.library.register_fake("profit_kernels::aiwq_conv2d")
def _(x, y_new, *rest, **more):
    return y_new.new_empty(y_new.shape[1], dtype=torch.float32)


def check_eps(op: str, eps: float) -> None:
    checks.check_number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def check_layer(
    op: str, x: Tensor, y_new: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    groups: int, pad_value: float, a_x: Tensor | None, c_x: Tensor | None, act_bits: int | None, signed: bool, offset: float,
    activation: str,
) -> tuple[list[int], list[int], list[int], int]:  # fmt: skip
    """Raise ValueError or TypeError unless y_new may be the output of such a layer; returns geometry and groups."""
    groups = checks.check_convolution(op, x, weight, bias, groups)
    checks.check_beside(op, x, "y_new", y_new)
    checks.check_number(op, "pad_value", pad_value)
    checks.check_sides(op, x, weight, a_x, c_x, None, None, act_bits, None, signed, offset, activation, None)
    geometry = checks.steps(op, stride, padding, dilation)
    expected = (x.shape[0], weight.shape[0], *checks.output_size(op, x, weight, *geometry))
    if tuple(y_new.shape) != expected:
        raise ValueError(f"{op}: y_new must be this layer's output {expected}, got {tuple(y_new.shape)}")
    return *geometry, groups


def aiwq_kl(y_new: Tensor, y_old: Tensor, *, eps: float = EPS) -> Tensor:
    """KL divergence of new from old outputs, per channel.

    Args:
        y_new, y_old: one shape, [N, C, ...]; any float dtype (moments in float64, unbiased variance).
        eps: added to both variances.

    Returns: [C], float32, no gradient. A channel with NaN, or with a single sample, is NaN.
    Raises: ValueError if the shapes or devices differ; TypeError for what is no float tensor.
    Source: PROFIT (Park & Yoo, ECCV 2020), section 3.2; docs/maths.md, section 3.
    """
    check_eps("aiwq_kl", eps)
    checks.check_float("aiwq_kl", "y_new", y_new)
    checks.check_beside("aiwq_kl", y_new, "y_old", y_old)
    if y_new.shape != y_old.shape or y_new.dim() < 2:
        raise ValueError(
            f"aiwq_kl: both outputs must have one shape [N, C, ...], got {tuple(y_new.shape)} and {tuple(y_old.shape)}"
        )
    return torch.ops.profit_kernels.aiwq_kl(y_new.detach(), y_old.detach(), eps)


@torch.no_grad()
def aiwq_conv2d(
    x: Tensor,
    y_new: Tensor,
    weight_old: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    pad_value: float = 0.0,
    a_x: Tensor | None = None,
    c_x: Tensor | None = None,
    act_bits: int | None = None,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    eps: float = EPS,
    weight_new: Tensor | None = None,
    norm: Mapping[str, Any] | None = None,
    check: bool = True,
) -> Tensor:
    """KL of a layer's output from what the same input gives with its previous quantized weight.

    Args:
        x: [N, C_in, H, W], the layer's raw input: the op applies the activation and the input quantizer itself.
        y_new: [N, C_out, H_out, W_out], the layer's output, before BatchNorm.
        weight_old: quantized weight (values, not codes) of the previous iteration; bias: [C_out] or None.
        stride, padding, dilation, groups: of the layer; padding as depthwise_conv2d takes it.
        pad_value: the layer's own border, -0.375 behind an h-swish quantizer.
        a_x, c_x, act_bits, signed, offset, activation: of the input quantizer; act_bits None means act(x) alone.
        weight_new: the quantized weight that gave y_new, if known; a kernel then computes only what the update changed.
        norm: the BatchNorm that the layer applies to x in front of the activation, as the arguments of `block_batch_norm` by
            name (bn_weight, bn_bias, running_mean, running_var, training, eps), and `statistics`, what block_conv2d recorded
            of this x, or None. Nothing is changed in it.
        check: False for a caller that hands on what a layer has just computed with, in every step: stride, padding (four
            values) and dilation are then taken as they are, and nothing is checked.

    Returns: [C_out], float32, no gradient; unclamped. NaN as aiwq_kl.
    Raises: ValueError or TypeError for arguments that do not fit, y_new included.
    """
    if check:
        quantizer = (a_x, c_x, act_bits, signed, offset, activation)
        stride, padding, dilation, groups = _check(
            x, y_new, weight_old, bias, stride, padding, dilation, groups, pad_value, *quantizer, eps, weight_new, norm
        )
    constants = {}
    if norm is not None:
        known = {name: value for name, value in norm.items() if name != "statistics"}
        if dispatch.choose("block", x) == "reference":
            x = block_batch_norm(x, **known)  # the layer's own, to the bit: another order of roundings would turn codes over
        else:
            constants = _constants(x, norm.get("statistics"), **known)
    operator = _conv_kl if is_plain(x) else torch.ops.profit_kernels.aiwq_conv2d
    return operator(
        x, y_new, weight_old, bias, list(stride), list(padding), list(dilation), groups, pad_value,
        a_x, c_x, act_bits, signed, offset, activation, eps, weight_new=weight_new, **constants,
    )  # fmt: skip


def _check(x, y_new, weight_old, bias, *layer_and_quantizer_and_eps) -> tuple[list[int], list[int], list[int], int]:
    """Geometry and groups of `aiwq_conv2d`, whose arguments these are, in its order; its errors."""
    *rest, eps, weight_new, norm = layer_and_quantizer_and_eps
    op = "aiwq_conv2d"
    check_eps(op, eps)
    found = check_layer(op, x, y_new, weight_old, bias, *rest)
    if weight_new is not None:
        checks.check_beside(op, x, "weight_new", weight_new)
        if weight_new.shape != weight_old.shape:
            raise ValueError(
                f"{op}: both weights must have one shape, got {tuple(weight_new.shape)} and {tuple(weight_old.shape)}"
            )
    if norm is not None:
        check_norm(op, x, **_named(**{name: value for name, value in norm.items() if name != "statistics"}))
    return found


def _named(bn_weight, bn_bias, running_mean, running_var, *, training, eps=1e-5) -> dict[str, Any]:
    """The arguments of `block_batch_norm` as `check_norm` takes them."""
    return {
        "weight": bn_weight, "bias": bn_bias, "running_mean": running_mean, "running_var": running_var,
        "training": training, "eps": eps,
    }  # fmt: skip


def _constants(
    x, of_x, bn_weight, bn_bias, running_mean, running_var, *, training, eps=1e-5
) -> dict[str, Tensor | None]:
    """What a kernel needs of a BatchNorm: its statistics (those of x, where known) and its parameters."""
    mean, invstd = of_x or statistics(x, running_mean, running_var, training, None, eps)
    return {"mean": mean, "invstd": invstd, "gamma": bn_weight, "beta": bn_bias}
