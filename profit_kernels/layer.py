"""A layer as values: BatchNorm in front, quantizer of the input, convolution. Their fields, checks, order and schema text.

Everything takes them as x, norm, quantizer, weight, bias, convolution. A torch schema has no such types: `flatten` and
`unflatten` go between them and its arguments, the tensors first. The checks raise ValueError or TypeError in one line that
starts with the operator's name; they run in every layer of every step, compare attributes and read no tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import (
    check_beside,
    check_bits,
    check_choice,
    check_flag,
    check_float,
    check_number,
    pads,
    pair,
    whole,
)

ACTIVATIONS = ("none", "relu", "relu6", "hardswish")


def levels(bits: int, signed: bool) -> int:
    """Number of quantization steps s between 0 and 1: the codes run to s."""
    return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


@dataclass(frozen=True)
class BatchNorm:
    """A BatchNorm as torch.nn.functional.batch_norm takes it; tensors [C] or None.

    Its running statistics move by `momentum` when `training`.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


@dataclass(frozen=True)
class Norm:
    """What normalises x: per-channel tensors [C], mean and invstd = 1 / sqrt(variance + eps) in the compute dtype.

    gamma, beta: None where BatchNorm has no such parameter. `of_batch`: the statistics are those of x itself, so gradients
    flow through them.
    """

    mean: Tensor
    invstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    of_batch: bool


@dataclass(frozen=True)
class Quantizer:
    """DuQ of the input: raw interval a and raw scale c, one value each; bits None: the activation alone."""

    a: Tensor | None
    c: Tensor | None
    bits: int | None
    signed: bool
    offset: float
    activation: str

    @property
    def is_identity(self) -> bool:
        return self.bits is None and self.activation == "none"


NO_QUANTIZER = Quantizer(None, None, None, False, 0.0, "none")


@dataclass(frozen=True)
class Convolution:
    """Geometry: stride, pads (left, right, top, bottom), dilation, groups and the value of the border."""

    stride: list[int]
    pads: list[int]
    dilation: list[int]
    groups: int
    pad_value: float

    def split(self, channels: int) -> tuple[list[int], list[int]]:
        """(what F.pad puts around the input, padding left to the convolution): zeros need no padded copy.

        A depthwise convolution gets one all the same: its kernels multiply the border too, so that a NaN of the weight is seen.
        """
        left, right, top, bottom = self.pads
        if self.pad_value == 0 and left == right and top == bottom and not 1 < channels == self.groups:
            return [0, 0, 0, 0], [top, left]
        return self.pads, [0, 0]

    def output_size(self, op: str, x: Tensor, weight: Tensor) -> tuple[int, int]:
        """(H_out, W_out). Raises ValueError where the kernel finds no place in the padded input."""
        left, right, top, bottom = self.pads
        _, _, rows, columns = x.shape
        _, _, taps_h, taps_w = weight.shape
        if rows < 1 or columns < 1 or taps_h < 1 or taps_w < 1:
            raise ValueError(
                f"{op}: image and kernel must have a height and a width, got {rows} x {columns} and {taps_h} x {taps_w}"
            )
        height, width = rows + top + bottom, columns + left + right
        kh, kw = (taps_h - 1) * self.dilation[0] + 1, (taps_w - 1) * self.dilation[1] + 1
        if kh > height or kw > width:
            raise ValueError(f"{op}: a kernel that spans {kh} x {kw} is larger than the padded input, {height} x {width}")
        return (height - kh) // self.stride[0] + 1, (width - kw) // self.stride[1] + 1


# A layer in a torch schema: the tensors that its kernels read, then the numbers.
TENSORS = "Tensor? mean, Tensor? invstd, Tensor? gamma, Tensor? beta, Tensor? a, Tensor? c, Tensor weight, Tensor? bias"
NUMBERS = (
    "bool of_batch, int? bits, bool signed, float offset, str activation, "
    "int[] stride, int[] padding, int[] dilation, int groups, float pad_value"
)


def flatten(
    norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """(TENSORS, NUMBERS) of a layer."""
    front = (None,) * 4 if norm is None else (norm.mean, norm.invstd, norm.gamma, norm.beta)
    of_batch = norm is not None and norm.of_batch
    geometry = (conv.stride, conv.pads, conv.dilation, conv.groups, conv.pad_value)
    return (*front, q.a, q.c, weight, bias), (of_batch, q.bits, q.signed, q.offset, q.activation, *geometry)


def unflatten(
    tensors: Sequence[Tensor | None], numbers: Sequence[Any]
) -> tuple[Norm | None, Quantizer, Tensor, Tensor | None, Convolution]:
    """`flatten` undone."""
    mean, invstd, gamma, beta, a, c, weight, bias = tensors
    of_batch, bits, signed, offset, activation, *geometry = numbers
    norm = None if mean is None else Norm(mean, invstd, gamma, beta, of_batch)
    return norm, Quantizer(a, c, bits, signed, offset, activation), weight, bias, Convolution(*geometry)


def check_activation(op: str, activation: str) -> None:
    check_choice(op, "activation", activation, ACTIVATIONS)


def check_settings(op: str, signed: bool, offset: float, activation: str) -> None:
    """The numbers of one DuQ other than its width."""
    check_activation(op, activation)
    check_flag(op, "signed", signed)
    check_number(op, "offset", offset)
    if offset > 0:
        raise ValueError(f"{op}: offset is the lower bound of the input, at most 0, got {offset}")
    if signed and offset != 0:
        raise ValueError(f"{op}: a signed quantizer has no offset, got {offset}")


def check_raw(op: str, x: Tensor, name: str, raw: Tensor) -> None:
    """A raw interval or scale of a quantizer of x."""
    check_beside(op, x, name, raw)
    if raw.numel() != 1 and (raw.dim() != 1 or x.dim() == 0 or raw.shape[0] != x.shape[0]):
        raise ValueError(
            f"{op}: {name} must hold one value, or one per channel (dimension 0 of the input: "
            f"{x.shape[0] if x.dim() else 'none'}), got shape {tuple(raw.shape)}"
        )


def check_quantizer(op: str, x: Tensor, bits: int, **raws: Tensor) -> None:
    """The input and the width of one DuQ by itself, and its interval and scale by name."""
    check_float(op, "the input", x)
    check_bits(op, bits)
    for name, raw in raws.items():
        check_raw(op, x, name, raw)


def check_input(op: str, x: Tensor, q: Quantizer) -> None:
    """The quantizer of a layer's input x, a float tensor."""
    check_settings(op, q.signed, q.offset, q.activation)
    if q.bits is None:
        return
    check_bits(op, q.bits, "act_bits")
    if q.a is None or q.c is None:
        raise ValueError(f"{op}: act_bits={q.bits} needs a_x and c_x, the interval and the scale of the input")
    for name, raw in (("a_x", q.a), ("c_x", q.c)):
        check_beside(op, x, name, raw)
        if raw.numel() != 1:
            raise ValueError(f"{op}: the input has one interval and one scale, got {name} with {raw.numel()} values")


def check_weight(op: str, weight: Tensor, a: Tensor | None, c: Tensor | None, bits: int | None) -> None:
    """The quantizer of a layer's weight."""
    if bits is None:
        return
    check_bits(op, bits, "weight_bits")
    if a is None or c is None:
        raise ValueError(f"{op}: weight_bits={bits} needs a_w and c_w, the interval and the scale of the weight")
    check_raw(op, weight, "a_w", a)
    check_raw(op, weight, "c_w", c)


def check_codes(op: str, weight: Tensor, codes: tuple[Tensor, int] | None, bits: int | None = None) -> None:
    """`codes`: the scale and the bits of a weight that is quantized already; `bits`: those it would be quantized with."""
    if codes is None:
        return
    if not isinstance(codes, (tuple, list)) or len(codes) != 2:
        raise TypeError(f"{op}: weight_codes must be the scale and the bits of a quantized weight, got {codes!r}")
    if bits is not None:
        raise ValueError(f"{op}: weight_codes says that the weight is quantized, weight_bits={bits} would do it again")
    check_bits(op, codes[1], "the bits of weight_codes")
    check_raw(op, weight, "the scale of weight_codes", codes[0])


def convolution(
    op: str, stride: Any, padding: Any, dilation: Any, groups: int, pad_value: float | None, offset: float = 0.0
) -> Convolution:
    """From what the public functions take: integers or pairs, padding also as (left, right, top, bottom); pad_value None means
    `offset`, the quantizer's."""
    groups = whole(op, "groups", groups, 1)
    if pad_value is not None:
        check_number(op, "pad_value", pad_value)
    geometry = list(pair(op, "stride", stride, 1)), list(pads(op, padding)), list(pair(op, "dilation", dilation, 1))
    return Convolution(*geometry, groups, offset if pad_value is None else pad_value)


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int | None) -> None:
    """The tensors of a convolution; groups None: a depthwise one."""
    check_float(op, "the input", x)
    check_beside(op, x, "the weight", weight)
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"{op}: the input must be [N, C, H, W], got shape {tuple(x.shape)}")
    if bias is not None:
        check_beside(op, x, "the bias", bias)
        if bias.shape != weight.shape[:1]:
            expected = weight.shape[0] if weight.dim() else "C_out"
            raise ValueError(f"{op}: the bias must have shape [{expected}], got {tuple(bias.shape)}")
    channels = x.shape[1]
    parts = channels if groups is None else groups
    if weight.dim() == 4 and weight.shape[0] > 0 and weight.shape[1] * parts == channels and weight.shape[0] % parts == 0:
        return
    if groups is None:
        wanted = f"[C_out, 1, kh, kw] with C_out a multiple of the input's {channels} channels"
    else:
        wanted = f"[C_out, {channels} / groups, kh, kw] with C_out a multiple of groups={groups}"
    raise ValueError(f"{op}: the weight must be {wanted}, got shape {tuple(weight.shape)}")


# Dtype of the input -> those of BatchNorm's tensors, as torch.nn.functional.batch_norm takes them.
_PARAMETERS = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.bfloat16: (torch.float32, torch.bfloat16),
    torch.float16: (torch.float32, torch.float16),
}
_NAMES = ("BatchNorm's weight", "BatchNorm's bias", "BatchNorm's running_mean", "BatchNorm's running_var")


def check_norm(op: str, x: Tensor, norm: BatchNorm) -> None:
    """A BatchNorm over x [N, C, H, W], a float tensor."""
    if x.dim() != 4:
        raise ValueError(f"{op}: the input must be [N, C, H, W], got shape {tuple(x.shape)}")
    check_flag(op, "training", norm.training)
    check_number(op, "momentum", norm.momentum)
    check_number(op, "eps", norm.eps)
    if norm.eps <= 0:
        raise ValueError(f"{op}: eps must be above 0, got {norm.eps}")
    shape, device, allowed, dtype = x.shape[1:2], x.device, _PARAMETERS[x.dtype], None
    for name, value in zip(_NAMES, (norm.weight, norm.bias, norm.running_mean, norm.running_var), strict=True):
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.device != device:
            check_beside(op, x, name, value)
        if value.shape != shape:
            raise ValueError(f"{op}: {name} must have shape [{x.shape[1]}], got {tuple(value.shape)}")
        found = value.dtype
        if found not in allowed or (dtype is not None and found != dtype):
            check_float(op, name, value)
            raise TypeError(
                f"{op}: BatchNorm's tensors must be of one dtype, that of the input ({x.dtype}) or, beside half precision, "
                f"float32; {name} is {found}"
            )
        dtype = found
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{op}: running_mean and running_var go together, one of them is None")
    if not norm.training and norm.running_mean is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var")
    if norm.training and x.numel() <= x.shape[1]:
        raise ValueError(f"{op}: statistics of the batch need more than one value per channel, got {tuple(x.shape)}")
