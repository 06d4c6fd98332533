"""Checks of arguments, for errors in one line: what it is called, what it must be, what it was."""

from __future__ import annotations

import math
import numbers
from os import PathLike
from typing import Any

from torch import nn


def brief(value: object) -> str:
    """A value for a message: its repr on one line where that is short, else what it is."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def check_module(model: object, what: str = "model") -> None:
    """Raise TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{what} must be a torch.nn.Module, got {brief(model)}")


def check_path(path: object, usage: str) -> None:
    """Raise TypeError, showing the `usage` of the function, unless `path` can be the path of a file."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"path must be a str or Path, got {brief(path)}; usage: {usage}")


def check_whole(value: object, what: str, least: int, most: float = math.inf) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"within {least}..{most}"
        raise ValueError(f"{what} must be a whole number, {limits}; got {brief(value)}")
    return int(value)


def check_number(
    value: Any, what: str, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf
) -> None:
    """Raise ValueError unless `value` is a finite number from `least` to `most`, and larger than `above`."""
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (usable and least <= value <= most and value > above):
        limits = [f"above {above:g}"] * (above > -math.inf)
        limits += [f"at least {least:g}"] * (least > -math.inf) + [f"at most {most:g}"] * (most < math.inf)
        raise ValueError(f"{what} must be a finite number{', ' if limits else ''}{' and '.join(limits)}; got {brief(value)}")
