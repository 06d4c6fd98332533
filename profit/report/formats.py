"""Numbers as people read them; each takes None (and NaN) and says so."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from profit.report.results import finite

NONE = "–"


def accuracy(value: Any) -> str:
    """Percent with two decimals; the unit is part of the text."""
    return f"{value:.2f} %" if finite(value) else "not measured"


def fixed(value: Any, digits: int = 2) -> str:
    """A number with `digits` decimals, "NaN" or "inf" as such, a dash where there is none."""
    if value is None:
        return NONE
    if not finite(value):
        return str(value).replace("nan", "NaN")
    return f"{value:.{digits}f}".replace("-", "\u2212")


def short(value: Any) -> str:
    """Three significant digits, for values of unknown magnitude; from a thousand on an integer."""
    if not finite(value):
        return fixed(value)
    if abs(value) >= 1000:
        return whole(round(value))
    return f"{value:.3g}".replace("-", "\u2212")


def whole(value: Any) -> str:
    """An integer with thin spaces between thousands."""
    if not finite(value):
        return fixed(value)
    return f"{value:,.0f}".replace(",", "\u202f") if value == int(value) else short(value)


def size(value: Any) -> str:
    """Bytes as kB (1000 bytes) or MB."""
    if not finite(value):
        return fixed(value)
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def duration(seconds: Any) -> str:
    """Seconds as "1 h 2 min", "3 min 4 s" or "5.6 s"."""
    if not finite(seconds):
        return fixed(seconds)
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(created: Any) -> str:
    """An ISO 8601 time to the minute, "2026-01-31 12:34 UTC"; any other text as it is."""
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".strip()


def bits(value: Any) -> str:
    """A bit width; None is full precision."""
    return "float" if value is None or value == 32 else short(value)


def text(value: Any) -> str:
    """A value of any type for a table cell: numbers short, lists as 3 × 3, None as a dash."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " × ".join(text(item) for item in value) or NONE
    if isinstance(value, int | float):
        return short(value) if isinstance(value, float) else str(value)
    return str(value)


FILTERS: dict[str, Callable[..., str]] = {
    "accuracy": accuracy,
    "fixed": fixed,
    "short": short,
    "whole": whole,
    "size": size,
    "duration": duration,
    "moment": moment,
    "bits": bits,
    "text": text,
}
