"""What the numbers of a recipe may be, beyond their type. A value out of its range would fail deep inside torch or timm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from profit.allowed import run_name_problem

_INF = math.inf
_MANY = 10**7  # more of anything (images of a batch, classes, epochs, ...) is a slip of the pen
_RATE = 1e30  # float32 ends at 3e38, and rates are multiplied by each other
_DEPTH = 8  # of a recipe; a setting of model.args may hold lists and mappings

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
    "run.keep_checkpoints": (1, _INF),
    "optim.accumulate": (1, _INF),
    "data.mean": (-_RATE, _RATE),
    "schedule.interval_lr_mult": (0, 1e6),
    "schedule.weight_decay": (0, 1e6),
    "schedule.warmup_epochs": (0, 1e6),
    "run.eval_every": (0, _INF),
}
# above 0 and up to
POSITIVE: dict[str, float] = {
    "data.crop_pct": 1, "calibration.percentile": 100, "optim.clip_grad": _RATE, "data.std": _RATE, "data.scale": 1,
    "run.timeout_s": 1e8, "schedule.lr": _RATE, "schedule.fp_lr": _RATE,
}  # fmt: skip
# from 0 to below 1
FRACTIONS = ("optim.momentum", "ema.decay", "aiwq.decay")
CHOICES: dict[str, tuple[Any, ...]] = {
    "data.in_chans": (1, 3),
    "data.interpolation": ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random"),
}


def plain_problem(value: Any, name: str, depth: int = 0) -> str | None:
    """What no recipe may hold anywhere: what JSON, UTF-8 or 64 bits cannot write down. None if all is well."""
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, str):
        if any("\ud800" <= letter <= "\udfff" or letter == "\0" for letter in value):
            return f"{name} is no text: {value!r} holds half of a letter, or a zero"
        return None
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else f"{name} must fit into 64 bits, got a number of {len(str(value))} digits"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{name} must be a finite number, got {value!r}"
    if depth == _DEPTH:
        return f"{name} is nested too deeply"
    if isinstance(value, Mapping):
        for key, item in value.items():
            where = f"{name}.{key}".lstrip(".")
            if not isinstance(key, str):
                return f"{where}: a key must be a text, not {key!r} ({type(key).__name__})"
            found = plain_problem(key, f"a key of {name or 'the recipe'}") or plain_problem(item, where, depth + 1)
            if found:
                return found
        return None
    if isinstance(value, (list, tuple)):
        items = (plain_problem(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value))
        return next((found for found in items if found), None)
    return f"{name} must be a number, a text, a list or a mapping, not {value!r} ({type(value).__name__})"


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
        if high == _INF and value > _MANY:
            return f"must be at most {_MANY:,}"
        words = f"must be at least {low:g}" if high == _INF else f"must lie in {low:g}..{high:g}"
        return None if low <= value <= high else words
    if name in POSITIVE:
        high = POSITIVE[name]
        words = f" and at most {high:g}" if high < _RATE or value > 0 else ""
        return None if 0 < value <= high else f"must be above 0{words}"
    if name in FRACTIONS:
        return None if 0 <= value < 1 else "must be at least 0 and below 1"
    return None
