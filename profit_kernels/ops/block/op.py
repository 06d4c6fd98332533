"""Schemas, registrations and public entries of the block: BatchNorm, activation, DuQ and convolution in one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import checks, dispatch
from ..depthwise import layout
from ..depthwise.op import autocast, duq_depthwise_conv2d
from ..depthwise.reference import quantize_input
from ..duq.op import duq_fake_quantize
from . import cpp, reference
from .autograd import differentiable
from .reference import Convolution, Norm, Quantizer
from .statistics import check_norm, statistics

_TENSORS = (
    "Tensor? mean, Tensor? invstd, Tensor? gamma, Tensor? beta, Tensor weight, Tensor? a, Tensor? c, Tensor? bias, "
    "Tensor? c_w"
)
_SETTINGS = (
    "bool of_batch, int? bits, bool signed, float offset, str activation, "
    "int[] stride, int[] padding, int[] dilation, int groups, float pad_value, int? weight_bits"
)

_TENSOR_COUNT = 10  # x and _TENSORS

torch.library.define("profit_kernels::block_conv2d", f"(Tensor x, {_TENSORS}, {_SETTINGS}) -> Tensor")
torch.library.define(
    "profit_kernels::block_conv2d_backward",
    f"(Tensor grad, Tensor x, {_TENSORS}, {_SETTINGS}, bool need_input, bool need_weight, bool need_bias) "
    "-> (Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)",
)


def _unflatten(
    x, mean, invstd, gamma, beta, weight, a, c, bias, c_w, of_batch, bits, signed, offset, activation, *geometry
):
    """The operator's arguments as the reference takes them; the scale and the bits of the weight's codes are not its own."""
    norm = None if mean is None else Norm(mean, invstd, gamma, beta, of_batch)
    quantizer = Quantizer(a, c, bits, signed, offset, activation)
    return x, norm, weight, quantizer, bias, Convolution(*geometry[:-1])


def _block(x, *rest):
    if dispatch.choose("block", x) == "cpp":
        return cpp.block(*_unflatten(x, *rest), c_w=rest[_TENSOR_COUNT - 2], weight_bits=rest[-1])
    return reference.block(*_unflatten(x, *rest))


def _block_backward(grad, x, *rest):
    if dispatch.choose("block", x) == "cpp":
        return cpp.block_backward(grad, *_unflatten(x, *rest[:-3]), rest[-3:])
    return reference.block_backward(grad, *_unflatten(x, *rest[:-3]), rest[-3:])


# The fakes run the reference on meta tensors: a convolution's memory format is torch's to decide. A kernel's is ours.
@torch.library.register_fake("profit_kernels::block_conv2d")
def _(x, *rest):
    x, norm, weight, q, bias, conv = _unflatten(x, *rest)
    if dispatch.choose("block", x) == "cpp" and cpp.is_fused(norm, weight):
        return layout.output(x, weight, conv.stride, conv.pads, conv.dilation)
    return reference.block(x, norm, weight, q, bias, conv)


@torch.library.register_fake("profit_kernels::block_conv2d_backward")
def _(grad, x, *rest):
    return reference.block_backward(grad, *_unflatten(x, *rest[:-3]), rest[-3:])


def _gradients(ctx, grad, backward):
    """Of all inputs, from the one `backward` that computes what some of them need."""
    needs = ctx.needs_input_grad
    x, mean, invstd, gamma, beta, weight, a, c, bias, _ = range(_TENSOR_COUNT)
    need = (any(needs[i] for i in (x, gamma, beta, a, c)), needs[weight], needs[bias])
    gx, g_gamma, g_beta, gw, ga, gc, gb = backward(grad, *ctx.saved_tensors, *ctx.settings, *need)
    # Statistics of the batch have no gradient of their own: dL/dx holds it already. That of c_w is in the weight's.
    return gx, None, None, g_gamma, g_beta, gw, ga, gc, gb, None, *[None] * len(ctx.settings)


_apply = differentiable("block_conv2d", _TENSOR_COUNT, _block, _block_backward, _gradients)


def block_conv2d(
    x: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    a_x: Tensor | None,
    c_x: Tensor | None,
    a_w: Tensor | None,
    c_w: Tensor | None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act_bits: int | None,
    weight_bits: int | None,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    pad_value: float | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    weight_codes: tuple[Tensor, int] | None = None,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """conv2d(pad(duq(act(batch_norm(x)))), duq(weight)): one layer with the BatchNorm in front of it.

    For the backward it keeps x, the statistics [C] and the quantized weight; everything else is computed anew.

    Args:
        x: [N, C, H, W], the tensor that enters BatchNorm; any float dtype, NCHW or channels_last.
        bn_weight, bn_bias: [C] or None; BatchNorm's tensors are of the dtype of x, or float32 beside half precision.
        running_mean, running_var: [C] or None; changed in place when `training`, as torch.nn.functional.batch_norm does.
        weight: [C_out, C / groups, kh, kw]. bias: [C_out] or None.
        a_x, c_x: raw interval and scale of the input, one value each; None where act_bits is None.
        a_w, c_w: those of the weight, one value or one per output channel; None where weight_bits is None.
        training: normalise with the statistics of this batch; else with the running ones.
        momentum, eps: of BatchNorm; the running values move by `momentum` towards those of the batch.
        act_bits, weight_bits: 2 to 8; None leaves that side unquantized (the activation still applies).
        signed, offset, activation: of the input quantizer, as duq_fake_quantize takes them.
        pad_value: the border in units of the quantized input; None means `offset`, which is code 0.
        stride, dilation, padding, groups: of the convolution, padding as depthwise_conv2d takes it.
        weight_codes: (c_w, bits) with which `weight` is quantized already, beside weight_bits None: a kernel may then compute
            with the codes, and rounds a weight that is none of their values to the nearest.
        record: a list to which the statistics are appended, (mean, 1 / sqrt(variance + eps)), each [C], for whoever looks at
            the same x again (aiwq_conv2d); nothing is where BatchNorm is torch's.

    Returns: [N, C_out, H_out, W_out] in the dtype of x (under autocast, in autocast's, to which x is taken first).
        BatchNorm's result stays in float32 on the way to the quantizer, also where x is in half precision.
    Raises: ValueError or TypeError for arguments that do not fit; BackendError if the backend asked for cannot serve.
    Source: docs/maths.md, section 1.
    """
    op = "block_conv2d"
    groups = checks.check_convolution(op, x, weight, bias, groups)
    x = autocast(x)
    checks.check_sides(
        op, x, weight, a_x, c_x, a_w, c_w, act_bits, weight_bits, signed, offset, activation, pad_value
    )
    codes = checks.codes(op, weight, weight_codes, weight_bits)
    if record is not None and not isinstance(record, list):
        raise TypeError(f"{op}: record must be a list to append to, or None, got {type(record).__name__}")
    settings = (act_bits, signed, offset, activation)
    border = offset if pad_value is None else pad_value
    geometry = (*checks.geometry(op, x, weight, stride, padding, dilation), groups, border)
    check_norm(op, x, bn_weight, bn_bias, running_mean, running_var, training, eps, momentum)
    if dispatch.choose("block", x) == "reference":
        v = F.batch_norm(x, running_mean, running_var, bn_weight, bn_bias, training, momentum, eps)
        return _in_parts(v, weight, a_x, c_x, a_w, c_w, bias, weight_bits, settings, geometry)
    mean, invstd = statistics(x, running_mean, running_var, training, momentum, eps)
    if record is not None:
        record.append((mean, invstd))
    weight, *codes = _quantized_weight(weight, a_w, c_w, weight_bits, codes)
    return _apply(
        x, mean, invstd, bn_weight, bn_bias, weight, a_x, c_x, bias, codes[0], training, *settings, *geometry, codes[1]
    )


def duq_conv2d(
    x: Tensor,
    weight: Tensor,
    a_x: Tensor | None,
    c_x: Tensor | None,
    a_w: Tensor | None,
    c_w: Tensor | None,
    bias: Tensor | None = None,
    *,
    act_bits: int | None,
    weight_bits: int | None,
    signed: bool = False,
    offset: float = 0.0,
    activation: str = "none",
    pad_value: float | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    weight_codes: tuple[Tensor, int] | None = None,
) -> Tensor:
    """conv2d(pad(duq(act(x))), duq(weight)) that keeps x alone for the backward: block_conv2d without BatchNorm.

    Arguments, result and errors as there.
    """
    op = "duq_conv2d"
    groups = checks.check_convolution(op, x, weight, bias, groups)
    checks.check_sides(
        op, x, weight, a_x, c_x, a_w, c_w, act_bits, weight_bits, signed, offset, activation, pad_value
    )
    codes = checks.codes(op, weight, weight_codes, weight_bits)
    settings = (act_bits, signed, offset, activation)
    border = offset if pad_value is None else pad_value
    geometry = (*checks.geometry(op, x, weight, stride, padding, dilation), groups, border)
    x = autocast(x)
    if dispatch.choose("block", x) == "reference":
        return _in_parts(x, weight, a_x, c_x, a_w, c_w, bias, weight_bits, settings, geometry)
    weight, *codes = _quantized_weight(weight, a_w, c_w, weight_bits, codes)
    return _apply(
        x, None, None, None, None, weight, a_x, c_x, bias, codes[0], False, *settings, *geometry, codes[1]
    )


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
    check_norm(op, x, bn_weight, bn_bias, running_mean, running_var, training, eps)
    if dispatch.choose("block", x) == "reference":
        running = (None, None) if training else (running_mean, running_var)
        return F.batch_norm(x, *running, bn_weight, bn_bias, training, 0.0, eps)
    mean, invstd = statistics(x, running_mean, running_var, training, None, eps)
    return reference.normalize(x, Norm(mean, invstd, bn_weight, bn_bias, training))


def _quantized_weight(
    weight: Tensor, a_w: Tensor | None, c_w: Tensor | None, bits: int | None, codes: tuple[Tensor | None, int | None]
) -> tuple[Tensor, Tensor | None, int | None]:
    """The quantized weight, with the scale and the bits of its codes where it has any."""
    if bits is None:
        return weight, *codes
    return duq_fake_quantize(weight, a_w, c_w, bits=bits, signed=True), c_w, bits


def _in_parts(v, weight, a_x, c_x, a_w, c_w, bias, weight_bits, settings, geometry) -> Tensor:
    """Without a kernel of the whole: its parts, each on the backend that serves it best, plain to torch.compile."""
    bits, signed, offset, activation = settings
    conv = Convolution(*geometry)
    if conv.groups == v.shape[1] > 1:
        return duq_depthwise_conv2d(
            v, weight, a_x, c_x, a_w, c_w, bias, stride=conv.stride, padding=conv.pads, dilation=conv.dilation,
            act_bits=bits, weight_bits=weight_bits, signed=signed, offset=offset, activation=activation,
            pad_value=conv.pad_value,
        )  # fmt: skip
    if bits is None:
        qx = quantize_input(v, None, None, None, signed, offset, activation)
    else:
        qx = duq_fake_quantize(v, a_x, c_x, bits=bits, signed=signed, offset=offset, activation=activation)
    if weight_bits is not None:
        weight = duq_fake_quantize(weight, a_w, c_w, bits=weight_bits, signed=True)
    return reference.convolution(qx, weight, bias, conv)
