"""Checks of arguments, for errors in one line: what it is called, what it must be, what it was."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any


def brief(value: object) -> str:
    """A value for a message: its repr on one line where that is short, else what it is."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text that is not empty, else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_module(model: object, usage: str = "") -> None:
    """Raise TypeError, showing the `usage` of the function where there is one, unless `model` is an nn.Module."""
    from torch import nn  # a recipe is checked before torch is loaded

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {brief(model)}{'; usage: ' if usage else ''}{usage}")


def check_path(path: object, usage: str, what: str = "path") -> None:
    """Raise TypeError, showing the `usage` of the function, unless `path` can be the path of a file."""
    if not isinstance(path, str | PathLike):
        raise TypeError(f"{what} must be a str or Path, got {brief(path)}; usage: {usage}")


def check_whole(value: object, what: str, least: int, most: float = math.inf) -> int:
    """`value` as an int. Raises ValueError unless it is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value <= most:
        limits = f"at least {least}" if most == math.inf else f"within {least}..{most}"
        raise ValueError(f"{what} must be a whole number, {limits}; got {brief(value)}")
    return int(value)


def check_number(
    value: Any, what: str, least: float = -math.inf, most: float = math.inf, *, above: float = -math.inf,
    below: float = math.inf,
) -> None:  # fmt: skip
    """Raise ValueError unless `value` is a finite number within the limits: `least` and `most` belong to them."""
    usable = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (usable and least <= value <= most and above < value < below):
        limits = {"above": above, "at least": least, "at most": most, "below": below}
        texts = [f"{word} {limit:g}" for word, limit in limits.items() if math.isfinite(limit)]
        raise ValueError(f"{what} must be a finite number{', ' if texts else ''}{' and '.join(texts)}; got {brief(value)}")


def check_flag(value: object, what: str) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{what} must be True or False, got {brief(value)}")


def check_state(state: object, keys: Iterable[str], what: str) -> None:
    """Raise ValueError unless `state` is a mapping with these keys; `what` saved it."""
    if not isinstance(state, Mapping):
        raise ValueError(f"saved state of {what}: a mapping is needed, got {brief(state)}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"saved state of {what}: {missing[0]!r} is missing, so it is damaged or of something else")
