"""What the numbers of a recipe may be, beyond their type. A value out of its range would fail deep inside torch or timm."""

from __future__ import annotations

import math
from typing import Any

from profit.allowed import run_name_problem

_INF = math.inf

# lowest and highest
LIMITS: dict[str, tuple[float, float]] = {
    "data.image_size": (1, 4096),
    "data.batch_size": (1, _INF),
    "data.eval_batch_size": (1, _INF),
    "data.folds": (2, _INF),
    "data.fold": (0, _INF),
    "data.shift": (0, 4096),
    "data.limit": (1, _INF),
    "data.classes": (2, _INF),
    "data.workers": (0, 1024),
    "data.hflip": (0, 1),
    "data.color_jitter": (0, _INF),
    "calibration.batches": (1, _INF),
    "optim.label_smoothing": (0, 1),
    "teacher.weight": (0, _INF),
    "aiwq.every": (1, _INF),
    "model.classes": (2, _INF),
    "run.seed": (0, 2**63 - 1),
    "run.threads": (1, 4096),
    "run.eval_every": (0, _INF),
}
# above 0 and up to
POSITIVE: dict[str, float] = {
    "data.crop_pct": 1, "calibration.percentile": 100, "optim.clip_grad": _INF, "data.std": _INF, "data.scale": 1,
}  # fmt: skip
# from 0 to below 1
FRACTIONS = ("optim.momentum", "ema.decay", "aiwq.decay")
CHOICES: dict[str, tuple[Any, ...]] = {
    "data.in_chans": (1, 3),
    "data.interpolation": ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random"),
}


def problem(name: str, value: Any) -> str | None:
    """What is wrong with the value of the setting `name` ("section.key"), or None. Every item of a list is looked at."""
    for item in value if isinstance(value, tuple) else (value,):
        found = _problem(name, item)
        if found:
            return f"{name} {found}, got {item!r}"
    if name == "data.scale" and isinstance(value, tuple) and not (len(value) == 2 and value[0] <= value[1]):
        return f"{name} must be two numbers, the smaller one first, got {list(value)}"
    return None


def _problem(name: str, value: Any) -> str | None:
    if name == "run.name":
        return run_name_problem(value)
    if name in CHOICES:
        return None if value in CHOICES[name] else f"must be one of {', '.join(map(str, CHOICES[name]))}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if name in LIMITS:
        low, high = LIMITS[name]
        words = f"must be at least {low:g}" if high == _INF else f"must lie in {low:g}..{high:g}"
        return None if low <= value <= high else words
    if name in POSITIVE:
        high = POSITIVE[name]
        return None if 0 < value <= high else "must be above 0" + ("" if high == _INF else f" and at most {high:g}")
    if name in FRACTIONS:
        return None if 0 <= value < 1 else "must be at least 0 and below 1"
    return None
