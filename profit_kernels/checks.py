"""Checks of single arguments: one line, what was wrong and what is allowed. Those of a whole layer stand in layer.py.

They run in every layer of every step: attributes are compared, no tensor is read.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

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


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


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
