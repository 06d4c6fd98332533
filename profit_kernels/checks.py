"""Checks of the arguments that the operators share: one line, what was wrong and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .ops.duq.reference import ACTIVATIONS


def check_bits(op: str, bits: int, name: str = "bits") -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{op}: {name} must be an integer from 2 to 8, got {bits!r}")


def check_quantizer(
    op: str, x: Tensor, a: Tensor, c: Tensor | None, bits: int, signed: bool, offset: float, activation: str
) -> None:
    """Arguments of one DuQ; raises TypeError or ValueError."""
    check_bits(op, bits)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if offset > 0:
        raise ValueError(f"{op}: offset is the lower bound of the input, at most 0, got {offset}")
    if signed and offset != 0:
        raise ValueError(f"{op}: a signed quantizer has no offset, got {offset}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: the input must be floating point, got {x.dtype}")
    for name, raw in (("a", a), ("c", c)):
        if raw is None:
            continue
        if not raw.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {raw.dtype}")
        if raw.device != x.device:
            raise ValueError(f"{op}: {name} is on {raw.device}, the input on {x.device}; move them to one device")
        if raw.numel() != 1 and (raw.dim() != 1 or x.dim() == 0 or raw.shape[0] != x.shape[0]):
            raise ValueError(
                f"{op}: {name} must hold one value, or one per channel (dimension 0 of the input: "
                f"{x.shape[0] if x.dim() else 'none'}), got shape {tuple(raw.shape)}"
            )


def check_sides(
    op: str, x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str,
) -> None:  # fmt: skip
    """Arguments of a convolution with a DuQ on its input and one on its weight; raises TypeError or ValueError."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for side, bits, tensor, a, c in (("act", act_bits, x, a_x, c_x), ("weight", weight_bits, weight, a_w, c_w)):
        if bits is None:
            continue
        check_bits(op, bits, f"{side}_bits")
        if a is None or c is None:
            raise ValueError(f"{op}: {side}_bits={bits} needs the interval a and the scale c of that side")
        if side == "act" and (a.numel() != 1 or c.numel() != 1):
            raise ValueError(f"{op}: the input has one interval and one scale, got {a.numel()} and {c.numel()} values")
        check_quantizer(
            op, tensor, a, c, bits, side == "weight" or signed, offset if side == "act" else 0.0, activation
        )


def pair(op: str, name: str, value: int | Sequence[int], minimum: int) -> tuple[int, int]:
    values = (value, value) if isinstance(value, int) else tuple(value)
    if len(values) != 2 or any(v < minimum for v in values):
        raise ValueError(f"{op}: {name} must be an integer or a pair of integers >= {minimum}, got {value!r}")
    return values  # type: ignore[return-value]


def pads(op: str, padding: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom), as torch.nn.functional.pad takes them, from p, (ph, pw) or the four themselves."""
    values = (padding, padding) if isinstance(padding, int) else tuple(padding)
    if len(values) == 2:
        values = (values[1], values[1], values[0], values[0])
    if len(values) != 4 or any(v < 0 for v in values):
        raise ValueError(
            f"{op}: padding must be p, (ph, pw) or (left, right, top, bottom) with no negative value, got {padding!r}"
        )
    return values  # type: ignore[return-value]


def geometry(
    op: str, stride: int | Sequence[int], padding: int | Sequence[int], dilation: int | Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding (left, right, top, bottom) and dilation as the operators' schemas take them."""
    return list(pair(op, "stride", stride, 1)), list(pads(op, padding)), list(pair(op, "dilation", dilation, 1))
