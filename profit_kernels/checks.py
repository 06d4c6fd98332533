"""Checks of the arguments that the operators share: one line, what was wrong and what is allowed.

They run in every layer of every step: attributes are compared, no tensor is read.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.duq.reference import ACTIVATIONS

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, name: str, value: Tensor) -> None:
    """Raise TypeError unless `value` is a tensor of a dtype that the operators compute with."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{op}: {name} must be floating point (float32, bfloat16, float16 or float64), got {value.dtype}"
        )


def check_beside(op: str, x: Tensor, name: str, value: Tensor) -> None:
    """`check_float`, and ValueError unless `value` is where the input x is: a kernel would read foreign memory."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        check_float(op, name, value)
    if value.device != x.device:
        raise ValueError(f"{op}: {name} is on {value.device}, the input on {x.device}; move them to one device")


def check_flag(op: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_number(op: str, name: str, value: float) -> None:
    """Raise TypeError unless `value` is a number, ValueError unless it is finite."""
    known = isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)
    if not known and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_bits(op: str, bits: int, name: str = "bits") -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{op}: {name} must be an integer from 2 to 8, got {bits!r}")


def check_activation(op: str, activation: str) -> None:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


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


def check_quantizer(op: str, x: Tensor, bits: int, signed: bool, offset: float, activation: str, **raws: Tensor) -> None:
    """Arguments of one DuQ, `raws` being its interval and scale by name; raises TypeError or ValueError."""
    check_float(op, "the input", x)
    check_bits(op, bits)
    check_settings(op, signed, offset, activation)
    for name, raw in raws.items():
        check_raw(op, x, name, raw)


def check_sides(
    op: str, x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float | None,
) -> None:  # fmt: skip
    """What is quantized in a convolution, whose x and weight have been checked; raises TypeError or ValueError."""
    check_settings(op, signed, offset, activation)
    if pad_value is not None:
        check_number(op, "pad_value", pad_value)
    if act_bits is not None:
        check_bits(op, act_bits, "act_bits")
        if a_x is None or c_x is None:
            raise ValueError(f"{op}: act_bits={act_bits} needs a_x and c_x, the interval and the scale of the input")
        for name, raw in (("a_x", a_x), ("c_x", c_x)):
            check_beside(op, x, name, raw)
            if raw.numel() != 1:
                raise ValueError(f"{op}: the input has one interval and one scale, got {name} with {raw.numel()} values")
    if weight_bits is not None:
        check_bits(op, weight_bits, "weight_bits")
        if a_w is None or c_w is None:
            raise ValueError(f"{op}: weight_bits={weight_bits} needs a_w and c_w, the interval and the scale of the weight")
        check_raw(op, weight, "a_w", a_w)
        check_raw(op, weight, "c_w", c_w)


def codes(
    op: str, weight: Tensor, weight_codes: tuple[Tensor, int] | None, weight_bits: int | None
) -> tuple[Tensor | None, int | None]:
    """(c_w, bits) of a weight that is quantized already, (None, None) of another; raises TypeError or ValueError."""
    if weight_codes is None:
        return None, None
    if not isinstance(weight_codes, (tuple, list)) or len(weight_codes) != 2:
        raise TypeError(f"{op}: weight_codes must be the scale and the bits of a quantized weight, got {weight_codes!r}")
    if weight_bits is not None:
        raise ValueError(f"{op}: weight_codes says that the weight is quantized, weight_bits={weight_bits} would do it again")
    c_w, bits = weight_codes
    check_bits(op, bits, "the bits of weight_codes")
    check_raw(op, weight, "the scale of weight_codes", c_w)
    return c_w, bits


def _integer(value: Any) -> int | None:
    """`value` as the schemas take an integer (numpy's included); None if it is none."""
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value
    return int(value) if isinstance(value, numbers.Integral) else None


def _integers(value: Any) -> tuple[int | None, ...] | int | None:
    """`value` as an integer or several; None stands for what is no integer."""
    if isinstance(value, (tuple, list)):
        return tuple([v if type(v) is int else _integer(v) for v in value])
    one = _integer(value)
    if one is not None or isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        return one
    return tuple([_integer(v) for v in value])


def whole(op: str, name: str, value: int, minimum: int) -> int:
    found = _integer(value)
    if found is None:
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if found < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value!r}")
    return found


def _refuse(values: tuple[int | None, ...] | int | None, message: str) -> None:
    raise (TypeError if values is None or isinstance(values, tuple) and None in values else ValueError)(message)


def pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    values = found = _integers(value)
    if found is not None and not isinstance(found, tuple):
        values = (found, found)
    if values is None or None in values or len(values) != 2 or values[0] < minimum or values[1] < minimum:
        _refuse(found, f"{op}: {name} must be an integer or a pair of integers >= {minimum}, got {value!r}")
    return values


def pads(op: str, padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as torch.nn.functional.pad takes them, from p, (ph, pw) or the four themselves."""
    values = found = _integers(padding)
    if found is not None and not isinstance(found, tuple):
        values = (found,) * 4
    elif found is not None and len(found) == 2:
        values = (found[1], found[1], found[0], found[0])
    if values is None or None in values or len(values) != 4 or min(values) < 0:
        _refuse(
            found,
            f"{op}: padding must be p, (ph, pw) or (left, right, top, bottom) with no negative value, got {padding!r}",
        )
    return values


def output_size(
    op: str, x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """(H_out, W_out) for pads = (left, right, top, bottom). Raises ValueError where the kernel finds no place."""
    left, right, top, bottom = pads
    _, _, rows, columns = x.shape
    _, _, taps_h, taps_w = weight.shape
    if rows < 1 or columns < 1 or taps_h < 1 or taps_w < 1:
        raise ValueError(
            f"{op}: image and kernel must have a height and a width, got {rows} x {columns} and {taps_h} x {taps_w}"
        )
    height, width = rows + top + bottom, columns + left + right
    kh, kw = (taps_h - 1) * dilation[0] + 1, (taps_w - 1) * dilation[1] + 1
    if kh > height or kw > width:
        raise ValueError(f"{op}: a kernel that spans {kh} x {kw} is larger than the padded input, {height} x {width}")
    return (height - kh) // stride[0] + 1, (width - kw) // stride[1] + 1


def geometry(
    op: str, x: Tensor, weight: Tensor, stride: int | Sequence[int], padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[list[int], list[int], list[int]]:  # fmt: skip
    """Stride, padding (left, right, top, bottom) and dilation as the operators' schemas take them; the kernel must fit in x."""
    found = steps(op, stride, padding, dilation)
    output_size(op, x, weight, *found)
    return found


def steps(
    op: str, stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """`geometry` without a look at the tensors."""
    return list(pair(op, "stride", stride, 1)), list(pads(op, padding)), list(pair(op, "dilation", dilation, 1))


def _check_tensors(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_float(op, "the input", x)
    check_beside(op, x, "the weight", weight)
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"{op}: the input must be [N, C, H, W], got shape {tuple(x.shape)}")
    if bias is not None:
        check_beside(op, x, "the bias", bias)
        if bias.shape != weight.shape[:1]:
            expected = weight.shape[0] if weight.dim() else "C_out"
            raise ValueError(f"{op}: the bias must have shape [{expected}], got {tuple(bias.shape)}")


def check_convolution(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> int:
    """The tensors of a convolution with groups; returns `groups`."""
    groups = whole(op, "groups", groups, 1)
    _check_tensors(op, x, weight, bias)
    fits = weight.dim() == 4 and weight.shape[0] > 0 and weight.shape[1] * groups == x.shape[1]
    if not fits or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: the weight must be [C_out, {x.shape[1]} / groups, kh, kw] with C_out a multiple of groups={groups}, "
            f"got shape {tuple(weight.shape)}"
        )
    return groups


def check_depthwise(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The tensors of a depthwise convolution."""
    _check_tensors(op, x, weight, bias)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] == 0 or weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"{op}: the weight must be [C_out, 1, kh, kw] with C_out a multiple of the input's {x.shape[1]} channels, "
            f"got shape {tuple(weight.shape)}"
        )
