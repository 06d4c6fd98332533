"""The convolution operator: its registration, the entry that takes a layer as values, and the public functions around it.

What dispatch knows of it are three kinds of call, each with backends of its own: `depthwise`, plain; `duq_depthwise`, with a
quantizer in front; `block`, all else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import checks, dispatch, layer
from ...layer import NO_QUANTIZER, BatchNorm, Convolution, Norm, Quantizer
from ...registration import autocast, differentiable
from ..duq.op import duq_fake_quantize
from ..duq.reference import activate, compute_dtype
from ..norm.op import by_torch, statistics
from . import cpp, layout, reference


def _forward(tensors, rest):
    x, *tensors, c_w = tensors
    *numbers, kind, weight_bits = rest
    values = layer.unflatten(tensors, numbers)
    backend = dispatch.serving(__package__, kind, x)
    if backend is cpp:
        codes = None if c_w is None else (c_w, weight_bits)
        return cpp.conv2d(x, *values, depthwise=kind != "block", codes=codes)
    return backend.conv2d(x, *values)


def _backward(grad, tensors, rest, need):
    x, *tensors, _ = tensors
    *numbers, kind, _ = rest
    values = layer.unflatten(tensors, numbers)
    backend = dispatch.serving(__package__, kind, x)
    if backend is cpp:
        return cpp.conv2d_backward(grad, x, *values, need, depthwise=kind != "block")
    return backend.conv2d_backward(grad, x, *values, need)


# The fakes run the reference on meta tensors: a convolution's memory format is torch's to decide. A kernel's is ours.
def _fake(tensors, rest):
    x, *tensors, _ = tensors
    *numbers, kind, _ = rest
    norm, q, weight, bias, conv = layer.unflatten(tensors, numbers)
    backend = dispatch.choose(kind, x)
    if backend == "triton" or (backend == "cpp" and cpp.is_fused(kind != "block", norm, weight)):
        return layout.output(x, weight, conv)
    return reference.conv2d(x, norm, q, weight, bias, conv)


def _fake_backward(grad, tensors, rest, need):
    x, *tensors, _ = tensors
    *numbers, kind, _ = rest
    norm, q, weight, bias, conv = layer.unflatten(tensors, numbers)
    if kind == "block" or dispatch.choose(kind, x) == "reference":
        return reference.conv2d_backward(grad, x, norm, q, weight, bias, conv, need)
    ga, gc = (None, None) if q.bits is None else (torch.empty_like(q.a), torch.empty_like(q.c))
    gw = torch.empty_like(weight) if need[1] else None
    return layout.input_gradient(x, weight), None, None, ga, gc, gw, None if bias is None else torch.empty_like(bias)


# Statistics of the batch have no gradient of their own: that of x holds it already. That of c_w is in the weight's.
_apply = differentiable(
    "conv2d", f"Tensor x, {layer.TENSORS}, Tensor? c_w, {layer.NUMBERS}, str kind, int? weight_bits",
    _forward, _backward, _fake, _fake_backward, gradients="x gamma beta a c weight bias",
    needs={"need_input": "x gamma beta a c", "need_weight": "weight", "need_bias": "bias"},
)  # fmt: skip


def _run(
    kind: str, x: Tensor, norm: BatchNorm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    codes: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Norm | None]:  # fmt: skip
    """`quantized_conv2d` of arguments that have been checked."""
    if dispatch.choose(kind, x) == "reference":
        return _in_parts(kind, x if norm is None else by_torch(x, norm), q, weight, bias, conv), None
    taken = None if norm is None else statistics(x, norm)
    tensors, numbers = layer.flatten(taken, q, weight, bias, conv)
    c_w, weight_bits = (None, None) if codes is None else codes
    return _apply(x, *tensors, c_w, *numbers, kind, weight_bits), taken


def _in_parts(kind: str, x: Tensor, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution) -> Tensor:
    """Without a kernel of the whole: its parts, each on the backend that serves it best, plain to torch.compile."""
    if kind == "block" and conv.groups == x.shape[1] > 1:
        return _run("duq_depthwise", x, None, q, weight, bias, conv)[0]
    if q.bits is not None:
        qx = duq_fake_quantize(x, q.a, q.c, bits=q.bits, signed=q.signed, offset=q.offset, activation=q.activation)
    else:
        qx = x if q.activation == "none" else activate(x.to(compute_dtype(x)), q.activation).to(x.dtype)
    if kind == "duq_depthwise":
        bias = None if bias is None else bias.to(x.dtype)
        return _run("depthwise", qx, None, NO_QUANTIZER, weight.to(x.dtype), bias, conv)[0]
    return reference.convolution(qx, weight, bias, conv)


def quantized_conv2d(
    x: Tensor, norm: BatchNorm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    codes: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Norm | None]:  # fmt: skip
    """conv2d(pad(duq(act(batch_norm(x)))), weight) of a layer given as values (`profit_kernels.layer`).

    Args:
        x: [N, C, H, W], any float dtype, NCHW or channels_last. norm: the BatchNorm in front, or None.
        weight: [C_out, C / groups, kh, kw], quantized already. bias: [C_out] or None.
        codes: raw scale and bits of the codes that `weight` consists of, as `weight_codes` of block_conv2d.

    Returns: (y, what normalised x): the second is None without a norm, and where torch computed it.
    Raises: as block_conv2d.
    """
    op = "duq_conv2d" if norm is None else "block_conv2d"
    if norm is None and q.is_identity and not conv.groups == x.shape[1] > 1:
        return reference.convolution(x, weight, bias, conv), None  # the image: nothing in front of torch's convolution
    x, kind = _checked(op, x, norm, q, weight, bias, conv)
    layer.check_codes(op, weight, codes)
    return _run(kind, x, norm, q, weight, bias, conv, codes)


def _checked(
    op: str, x: Tensor, norm: BatchNorm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution
) -> tuple[Tensor, str]:
    """x in autocast's dtype, and the kind of the call, where all of it fits."""
    layer.check_convolution(op, x, weight, bias, conv.groups)
    x = autocast(x)
    layer.check_input(op, x, q)
    conv.output_size(op, x, weight)
    if norm is not None:
        layer.check_norm(op, x, norm)
        return x, "block"
    return x, "duq_depthwise" if conv.groups == x.shape[1] > 1 else "block"


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
    layer.check_convolution(op, x, weight, bias, None)
    checks.check_number(op, "pad_value", pad_value)
    conv = layer.convolution(op, stride, padding, dilation, x.shape[1], pad_value)
    conv.output_size(op, x, weight)
    x = autocast(x)
    # The kernels compute in the dtype of x; so does the reference, of which torch would refuse a mix.
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return _run("depthwise", x, None, NO_QUANTIZER, weight, bias, conv)[0]


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
    q = Quantizer(a_x, c_x, act_bits, signed, offset, activation)
    layer.check_convolution(op, x, weight, bias, None)
    conv = layer.convolution(op, stride, padding, dilation, x.shape[1], pad_value, offset)
    x, _ = _checked(op, x, None, q, weight, bias, conv)
    weight, _ = _quantized_weight(op, weight, a_w, c_w, weight_bits)
    return _run("duq_depthwise", x, None, q, weight, bias, conv)[0]


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

    Returns: [N, C_out, H_out, W_out] in the dtype of x (under autocast, in autocast's, to which x is taken first).
        BatchNorm's result stays in float32 on the way to the quantizer, also where x is in half precision.
    Raises: ValueError or TypeError for arguments that do not fit; BackendError if the backend asked for cannot serve.
    Source: docs/maths.md, section 1.
    """
    op = "block_conv2d"
    q = Quantizer(a_x, c_x, act_bits, signed, offset, activation)
    norm = BatchNorm(bn_weight, bn_bias, running_mean, running_var, training, momentum, eps)
    conv = layer.convolution(op, stride, padding, dilation, groups, pad_value, offset)
    x, kind = _checked(op, x, norm, q, weight, bias, conv)
    weight, codes = _quantized_weight(op, weight, a_w, c_w, weight_bits, weight_codes)
    return _run(kind, x, norm, q, weight, bias, conv, codes)[0]


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
    q = Quantizer(a_x, c_x, act_bits, signed, offset, activation)
    conv = layer.convolution(op, stride, padding, dilation, groups, pad_value, offset)
    x, kind = _checked(op, x, None, q, weight, bias, conv)
    weight, codes = _quantized_weight(op, weight, a_w, c_w, weight_bits, weight_codes)
    return _run(kind, x, None, q, weight, bias, conv, codes)[0]


def _quantized_weight(
    op: str, weight: Tensor, a: Tensor | None, c: Tensor | None, bits: int | None, codes: tuple[Tensor, int] | None = None
) -> tuple[Tensor, tuple[Tensor, int] | None]:
    """The quantized weight, with the scale and the bits of its codes where it has any."""
    layer.check_weight(op, weight, a, c, bits)
    layer.check_codes(op, weight, codes, bits)
    if bits is None:
        return weight, codes
    return duq_fake_quantize(weight, a, c, bits=bits, signed=True), (c, bits)
