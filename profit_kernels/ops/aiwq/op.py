"""Registrations and public entries of AIWQ. Statistics: not differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks, dispatch, layer
from ...layer import Convolution, Norm, Quantizer
from ...registration import is_plain, operator
from . import cpp

EPS = 1e-12  # added to both variances; far below that of a live channel, enough for a dead one to give 0 and not NaN


def _wider(first: Tensor, second: Tensor) -> Tensor:
    """The one whose dtype decides which backend can serve both: float64 if either is."""
    return second if second.dtype == torch.float64 else first


def _beyond_triton(x: Tensor, weight: Tensor, conv: Convolution) -> str | None:
    depthwise = conv.groups == x.shape[1] and weight.shape[1] == 1
    pointwise = conv.groups == 1 and tuple(weight.shape[2:]) == (1, 1) and not any(conv.pads)
    if x.dim() == 4 and (depthwise or pointwise):
        return None
    return (
        "its aiwq_conv kernels serve depthwise layers and 1x1 layers without groups and padding, on [N, C, H, W]; "
        f"this is a weight {tuple(weight.shape)} with groups={conv.groups}, padding={conv.pads} on {tuple(x.shape)}"
    )


def _kl(tensors, rest):
    with torch.no_grad():
        return dispatch.serving(__package__, "aiwq", _wider(*tensors)).kl(*tensors, *rest)


def _conv_kl(tensors, rest):
    x, y_new, *tensors, weight_new = tensors
    *numbers, eps = rest
    return _kl_of_layer(x, y_new, layer.unflatten(tensors, numbers), eps, weight_new)


def _kl_of_layer(x, y_new, values, eps, weight_new):
    _, _, weight_old, _, conv = values
    limits = {"triton": _beyond_triton(x, weight_old, conv)}
    with torch.no_grad():
        backend = dispatch.serving(__package__, "aiwq_conv", _wider(x, y_new), limits)
        known = {"weight_new": weight_new} if backend is cpp else {}  # only the C++ kernels know how to use it
        return backend.conv_kl(x, y_new, *values, eps, **known)


def _conv_moments(tensors, numbers):
    x, y_new, *tensors = tensors
    limits = {"triton": "its aiwq_conv kernels give the KL, not the moments of a convolution"}
    with torch.no_grad():
        backend = dispatch.serving(__package__, "aiwq_conv", _wider(x, y_new), limits)
        return backend.conv_moments(x, y_new, *layer.unflatten(tensors, numbers))


def _fake_kl(tensors, rest):
    y_new = tensors[1]
    return y_new.new_empty(y_new.shape[1], dtype=torch.float32)


def _fake_moments(tensors, rest):
    y_new = tensors[1]
    return y_new.new_empty((5, y_new.shape[1]), dtype=torch.float64)


_LAYER = f"Tensor x, Tensor y_new, {layer.TENSORS}"
_apply_kl = operator("aiwq_kl", "Tensor y_new, Tensor y_old, float eps", "Tensor", _kl, _fake_kl)
_apply_conv_kl = operator(
    "aiwq_conv2d", f"{_LAYER}, Tensor? weight_new, {layer.NUMBERS}, float eps", "Tensor", _conv_kl, _fake_kl
)
_apply_moments = operator("aiwq_conv2d_moments", f"{_LAYER}, {layer.NUMBERS}", "Tensor", _conv_moments, _fake_moments)


def check_eps(op: str, eps: float) -> None:
    checks.check_number(op, "eps", eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")


def _check_layer(
    op: str, x: Tensor, y_new: Tensor, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution
) -> None:
    """Raise ValueError or TypeError unless y_new may be the output of such a layer."""
    layer.check_convolution(op, x, weight, bias, conv.groups)
    checks.check_beside(op, x, "y_new", y_new)
    layer.check_input(op, x, q)
    expected = (x.shape[0], weight.shape[0], *conv.output_size(op, x, weight))
    if tuple(y_new.shape) != expected:
        raise ValueError(f"{op}: y_new must be this layer's output {expected}, got {tuple(y_new.shape)}")


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
    return _apply_kl(y_new.detach(), y_old.detach(), eps)


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

    Returns: [C_out], float32, no gradient; unclamped. NaN as aiwq_kl.
    Raises: ValueError or TypeError for arguments that do not fit, y_new included.
    """
    op = "aiwq_conv2d"
    check_eps(op, eps)
    checks.check_number(op, "pad_value", pad_value)
    q = Quantizer(a_x, c_x, act_bits, signed, offset, activation)
    conv = layer.convolution(op, stride, padding, dilation, groups, pad_value)
    _check_layer(op, x, y_new, q, weight_old, bias, conv)
    if weight_new is not None:
        checks.check_beside(op, x, "weight_new", weight_new)
        if weight_new.shape != weight_old.shape:
            raise ValueError(
                f"{op}: both weights must have one shape, got {tuple(weight_new.shape)} and {tuple(weight_old.shape)}"
            )
    return quantized_conv2d_kl(x, y_new, None, q, weight_old, bias, conv, eps=eps, weight_new=weight_new)


@torch.no_grad()
def aiwq_conv2d_moments(
    x: Tensor, y_new: Tensor, weight_old: Tensor, bias: Tensor | None = None, *,
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    stride: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1), groups: int = 1, pad_value: float = 0.0,
    a_x: Tensor | None = None, c_x: Tensor | None = None, act_bits: int | None = None, signed: bool = False,
    offset: float = 0.0, activation: str = "none",
) -> Tensor:  # fmt: skip
    """What `aiwq_conv2d` compares, as moments that can be pooled.

    Args: as `aiwq_conv2d`, padding as (left, right, top, bottom).
    Returns: [5, C_out] float64, rows as in `ROWS`.
    """
    op = "aiwq_conv2d_moments"
    checks.check_number(op, "pad_value", pad_value)
    q = Quantizer(a_x, c_x, act_bits, signed, offset, activation)
    conv = layer.convolution(op, stride, padding, dilation, groups, pad_value)
    _check_layer(op, x, y_new, q, weight_old, bias, conv)
    return quantized_conv2d_moments(x, y_new, None, q, weight_old, bias, conv)


@torch.no_grad()
def quantized_conv2d_kl(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution, *,
    eps: float = EPS, weight_new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`aiwq_conv2d` of a layer given as the values that `quantized_conv2d` has just computed y_new with; nothing is checked.

    Args:
        x: what the layer got. norm: what `quantized_conv2d` returned beside y_new.
        weight_old, weight_new: the quantized weights of the previous iteration and of this one (or None).

    Returns: [C_out], float32; see `aiwq_conv2d`.
    """
    if is_plain(x):
        return _kl_of_layer(x, y_new, (norm, q, weight_old, bias, conv), eps, weight_new)
    tensors, numbers = layer.flatten(norm, q, weight_old, bias, conv)
    return _apply_conv_kl(x, y_new, *tensors, weight_new, *numbers, eps)


@torch.no_grad()
def quantized_conv2d_moments(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """`aiwq_conv2d_moments` of a layer given as values, as `quantized_conv2d_kl` takes them. Returns [5, C_out], float64."""
    tensors, numbers = layer.flatten(norm, q, weight_old, bias, conv)
    return _apply_moments(x, y_new, *tensors, *numbers)
