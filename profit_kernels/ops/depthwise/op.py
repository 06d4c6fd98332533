"""Schemas, registrations and public entries of the depthwise convolution, plain and with DuQ in front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks, dispatch
from ..duq.op import duq_fake_quantize, no_double_backward
from . import layout, reference

_GEOMETRY = "int[] stride, int[] padding, int[] dilation"
_QUANT = "int? act_bits, int? weight_bits, bool signed, float offset, str activation, float pad_value"
_INTERVALS = "Tensor? a_x, Tensor? c_x, Tensor? a_w, Tensor? c_w, Tensor? bias"

torch.library.define(
    "profit_kernels::depthwise_conv2d",
    f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, float pad_value) -> Tensor",
)
torch.library.define(
    "profit_kernels::depthwise_conv2d_backward",
    f"(Tensor grad, Tensor x, Tensor weight, bool has_bias, {_GEOMETRY}, float pad_value, bool need_weight) "
    "-> (Tensor, Tensor?, Tensor?)",
)
torch.library.define(
    "profit_kernels::duq_depthwise_conv2d", f"(Tensor x, Tensor weight, {_INTERVALS}, {_GEOMETRY}, {_QUANT}) -> Tensor"
)
torch.library.define(
    "profit_kernels::duq_depthwise_conv2d_backward",
    f"(Tensor grad, Tensor x, Tensor weight, {_INTERVALS}, {_GEOMETRY}, {_QUANT}, bool need_weight) "
    "-> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
)


@torch.library.impl("profit_kernels::depthwise_conv2d", "default")
def _depthwise(x, *rest):
    return dispatch.serving(__package__, "depthwise", x).depthwise(x, *rest)


@torch.library.impl("profit_kernels::depthwise_conv2d_backward", "default")
def _depthwise_backward(grad, x, *rest):
    return dispatch.serving(__package__, "depthwise", x).depthwise_backward(grad, x, *rest)


@torch.library.impl("profit_kernels::duq_depthwise_conv2d", "default")
def _duq_depthwise(x, *rest):
    return dispatch.serving(__package__, "duq_depthwise", x).duq_depthwise(x, *rest)


@torch.library.impl("profit_kernels::duq_depthwise_conv2d_backward", "default")
def _duq_depthwise_backward(grad, x, *rest):
    return dispatch.serving(__package__, "duq_depthwise", x).duq_depthwise_backward(grad, x, *rest)


# The reference's fakes run it on meta tensors: a convolution's memory format is torch's to decide. A kernel's is ours.
@torch.library.register_fake("profit_kernels::depthwise_conv2d")
def _(x, weight, bias, stride, padding, dilation, pad_value):
    if dispatch.choose("depthwise", x) == "reference":
        return reference.depthwise(x, weight, bias, stride, padding, dilation, pad_value)
    return layout.output(x, weight, stride, padding, dilation)


@torch.library.register_fake("profit_kernels::depthwise_conv2d_backward")
def _(grad, x, weight, has_bias, stride, padding, dilation, pad_value, need_weight):
    if dispatch.choose("depthwise", x) == "reference":
        return reference.depthwise_backward(grad, x, weight, has_bias, stride, padding, dilation, pad_value, need_weight)
    gx, gw = layout.gradients(x, weight)
    return gx, gw if need_weight else None, x.new_empty(weight.shape[0]) if has_bias else None


@torch.library.register_fake("profit_kernels::duq_depthwise_conv2d")
def _(x, weight, a_x, c_x, a_w, c_w, bias, stride, padding, dilation, *quant):
    if dispatch.choose("duq_depthwise", x) == "reference":
        return reference.duq_depthwise(x, weight, a_x, c_x, a_w, c_w, bias, stride, padding, dilation, *quant)
    return layout.output(x, weight, stride, padding, dilation)


@torch.library.register_fake("profit_kernels::duq_depthwise_conv2d_backward")
def _(grad, x, weight, a_x, c_x, a_w, c_w, bias, stride, padding, dilation, act_bits, weight_bits, *rest):
    if dispatch.choose("duq_depthwise", x) == "reference":
        return reference.duq_depthwise_backward(
            grad, x, weight, a_x, c_x, a_w, c_w, bias, stride, padding, dilation, act_bits, weight_bits, *rest
        )
    need_weight = rest[-1]
    gx, gw = layout.gradients(x, weight)
    of_input = (None, None) if act_bits is None else (torch.empty_like(a_x), torch.empty_like(c_x))
    of_weight = (None, None)
    if need_weight and weight_bits is not None:
        of_weight = (torch.empty_like(a_w), torch.empty_like(c_w))
    of_bias = None if bias is None else torch.empty_like(bias)
    return gx, gw if need_weight else None, *of_input, *of_weight, of_bias


def _setup_depthwise(ctx, inputs, output):
    x, weight, bias, *settings = inputs
    ctx.save_for_backward(x, weight)
    ctx.settings = (bias is not None, *settings)


def _autograd_depthwise(ctx, grad):
    need_weight = ctx.needs_input_grad[1]
    grads = torch.ops.profit_kernels.depthwise_conv2d_backward(grad, *ctx.saved_tensors, *ctx.settings, need_weight)
    return *grads, None, None, None, None


def _setup_duq_depthwise(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _autograd_duq_depthwise(ctx, grad):
    weight, a_w, c_w = (ctx.needs_input_grad[i] for i in (1, 4, 5))
    need_weight = weight or a_w or c_w  # the intervals' gradients follow from that of the quantized weight
    grads = torch.ops.profit_kernels.duq_depthwise_conv2d_backward(
        grad, *ctx.saved_tensors, *ctx.settings, need_weight
    )
    return *grads, *[None] * len(ctx.settings)


def _register_autograd(name: str, formula, setup) -> None:
    torch.library.register_autograd(f"profit_kernels::{name}", formula, setup_context=setup)
    torch.library.register_autograd(f"profit_kernels::{name}_backward", no_double_backward(name))


_register_autograd("depthwise_conv2d", _autograd_depthwise, _setup_depthwise)
_register_autograd("duq_depthwise_conv2d", _autograd_duq_depthwise, _setup_duq_depthwise)


def autocast(x: Tensor) -> Tensor:
    """The autocast rule, that of a convolution: to the lower precision, float64 excepted."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):  # meta: to ask more is an error
        return x
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    pad_value: float = 0.0,
) -> Tensor:
    """Depthwise convolution whose border is `pad_value` instead of zero; differentiable.

    Args:
        x: [N, C, H, W], any float dtype, NCHW or channels_last.
        weight: [C_out, 1, kh, kw] with C_out a multiple of C. bias: [C_out] or None. Both are taken to the dtype of x.
        stride, dilation: an integer or (h, w).
        padding: p, (ph, pw), or (left, right, top, bottom) for an asymmetric border.
        pad_value: -0.375 behind an h-swish quantizer.

    Returns: [N, C_out, H_out, W_out], in the dtype of x (under autocast, in autocast's).
    Raises: ValueError or TypeError for arguments that do not fit; BackendError if the backend asked for cannot serve the call.
    Source: negative padding, PROFIT (Park & Yoo, ECCV 2020), section 4.2; docs/maths.md, section 2.
    """
    op = "depthwise_conv2d"
    checks.check_depthwise(op, x, weight, bias)
    checks.check_number(op, "pad_value", pad_value)
    geometry = checks.geometry(op, x, weight, stride, padding, dilation)
    x = autocast(x)
    # The kernels compute in the dtype of x; so does the reference, of which torch would refuse a mix.
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if dispatch.choose("depthwise", x) == "reference":
        return reference.depthwise(x, weight, bias, *geometry, pad_value)
    return torch.ops.profit_kernels.depthwise_conv2d(x, weight, bias, *geometry, pad_value)


def duq_depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    a_x: Tensor | None,
    c_x: Tensor | None,
    a_w: Tensor | None,
    c_w: Tensor | None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    act_bits: int | None,
    weight_bits: int | None,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    pad_value: float | None = None,
) -> Tensor:
    """depthwise_conv2d(duq(act(x)), duq(weight)), the border padded with `pad_value`; differentiable in every tensor.

    Args:
        x, weight, bias, stride, padding, dilation: as depthwise_conv2d takes them.
        a_x, c_x: raw interval and scale of the input, one value each; None where act_bits is None.
        a_w, c_w: those of the weight, one value or one per output channel; None where weight_bits is None.
        act_bits, weight_bits: 2 to 8; None leaves that side unquantized (the activation still applies).
        signed, offset, activation: of the input quantizer, as duq_fake_quantize takes them.
        pad_value: the border in units of the quantized input; None means `offset`, which is code 0.

    Returns, Raises: as depthwise_conv2d and duq_fake_quantize. Under autocast x is taken to autocast's dtype first and
    the weight is quantized in its own.
    """
    op = "duq_depthwise_conv2d"
    checks.check_depthwise(op, x, weight, bias)
    checks.check_sides(
        op, x, weight, a_x, c_x, a_w, c_w, act_bits, weight_bits, signed, offset, activation, pad_value
    )
    geometry = checks.geometry(op, x, weight, stride, padding, dilation)
    pad_value = offset if pad_value is None else pad_value
    x = autocast(x)
    if dispatch.choose("duq_depthwise", x) == "reference":
        # No fused kernel here: its parts, each on the backend that serves it best.
        if act_bits is None:
            qx = reference.quantize_input(x, None, None, None, signed, offset, activation)
        else:
            qx = duq_fake_quantize(x, a_x, c_x, bits=act_bits, signed=signed, offset=offset, activation=activation)
        if weight_bits is not None:
            weight = duq_fake_quantize(weight, a_w, c_w, bits=weight_bits, signed=True)
        bias = None if bias is None else bias.to(x.dtype)
        return depthwise_conv2d(
            qx,
            weight.to(x.dtype),
            bias,
            stride=geometry[0],
            padding=geometry[1],
            dilation=geometry[2],
            pad_value=pad_value,
        )
    settings = (*geometry, act_bits, weight_bits, signed, offset, activation, pad_value)
    return torch.ops.profit_kernels.duq_depthwise_conv2d(x, weight, a_x, c_x, a_w, c_w, bias, *settings)
