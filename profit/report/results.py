"""Reading results.json: every key of schema 1 present afterwards, with the right type or None."""

import json
import math
from pathlib import Path
from typing import Any

from profit.errors import ProfitError

SCHEMA = 1
RESULTS_NAME = "results.json"

_NUMBER = (int, float)
_HISTORY = dict.fromkeys(("epoch", "lr", "train_loss", "test_loss", "accuracy", "accuracy_ema"), _NUMBER)
_PHASE = {
    **dict.fromkeys(("name", "kind", "bits"), str),
    **dict.fromkeys(("weight_bits", "act_bits", "frozen", "epochs", "lr", "accuracy", "accuracy_ema"), _NUMBER),
    **dict.fromkeys(("train_loss", "test_loss", "wall_s", "images_per_s"), _NUMBER),
    "frozen_layers": [str],
    "history": [_HISTORY],
}
_LAYER = {
    **dict.fromkeys(("name", "type", "kind", "activation"), str),
    **dict.fromkeys(("stride", "groups", "offset", "pad_value", "weight_bits", "act_bits"), object),
    **dict.fromkeys(("parameters", "macs", "A_x", "C_x", "A_w", "C_w", "aiwq", "rank", "frozen_stage"), _NUMBER),
    "kernel": [_NUMBER],
    "ranked": bool,
}
_WEIGHTS = {"edges": [_NUMBER], "counts": [_NUMBER], "grid": [_NUMBER], "code_counts": [_NUMBER], "unit": str}
_RUN = {
    **dict.fromkeys(("name", "created", "command", "git_commit", "device"), str),
    **dict.fromkeys(("seed", "threads", "wall_s"), _NUMBER),
    "finished": bool,
    "versions": dict,
}
_RESULTS = {
    "run": _RUN,
    "model": {"name": str, **dict.fromkeys(("parameters", "classes", "in_chans"), _NUMBER)},
    "data": {"name": str, "class_names": [str], **dict.fromkeys(("train", "test", "unreadable", "image_size", "fold"), object)},
    "recipe": dict,
    "phases": [_PHASE],
    "layers": [_LAYER],
    "weights": dict,
    "sizes": [{"label": str, **dict.fromkeys(("bits", "bytes", "accuracy"), _NUMBER)}],
    "aiwq": {"mode": str, **dict.fromkeys(("steps", "decay", "clamped", "skipped"), _NUMBER), "scores": dict},
    "final": dict.fromkeys(("accuracy", "accuracy_ema", "accuracy_fp"), _NUMBER),
}
_TYPE_NAMES = {_NUMBER: "a number", str: "a text", bool: "true or false", dict: "a mapping", object: "a value"}


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """Read `run_dir`/results.json and complete it.

    Keys of schema 1 that are absent become None (sections: a mapping of Nones, or an empty list; `aiwq` stays None),
    so that a run stopped early reads like a finished one. Unknown keys are ignored.

    Raises:
        ProfitError: no such file, not JSON, another schema, or a value of the wrong type (named by its place).
    """
    path = Path(run_dir) / RESULTS_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ProfitError(f"{path} does not exist: give the folder of a run that finished at least one phase") from None
    except OSError as error:
        raise ProfitError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 errors alike
        raise ProfitError(f"{path} is not valid JSON ({error}): train again or restore the file") from None
    if not isinstance(raw, dict):
        raise ProfitError(f"{path}: expected a mapping at the top level, found {_show(raw)}")
    if raw.get("schema") != SCHEMA:
        raise ProfitError(f"{path}: schema is {_show(raw.get('schema'))}, this version reads schema {SCHEMA}")
    try:
        results = _complete(raw, _RESULTS, "")
        results["aiwq"] = results["aiwq"] if raw.get("aiwq") is not None else None
        results["weights"] = {
            name: _complete(entry, _WEIGHTS, f"weights.{name}") for name, entry in results["weights"].items()
        }
        _check_histograms(results["weights"])
    except _Malformed as error:
        raise ProfitError(f"{path}: {error}") from None
    return results


class _Malformed(ValueError):
    """What is wrong inside the file, without its path."""


def _complete(value: Any, spec: Any, where: str) -> Any:
    if isinstance(spec, dict):
        if value is not None and not isinstance(value, dict):
            raise _Malformed(f"{where}: expected a mapping, found {_show(value)}")
        given = value or {}
        return {key: _complete(given.get(key), inner, f"{where}.{key}".lstrip(".")) for key, inner in spec.items()}
    if isinstance(spec, list):
        if value is not None and not isinstance(value, list):
            raise _Malformed(f"{where}: expected a list, found {_show(value)}")
        items = [_complete(item, spec[0], f"{where}[{i}]") for i, item in enumerate(value or [])]
        return items
    if value is None:
        return {} if spec is dict else None
    # bool is an int in Python, but an accuracy of `true` is a mistake
    if not isinstance(value, spec) or (spec is _NUMBER and isinstance(value, bool)):
        raise _Malformed(f"{where}: expected {_TYPE_NAMES[spec]}, found {_show(value)}")
    return value


def _check_histograms(weights: dict[str, dict[str, list[float]]]) -> None:
    for name, entry in weights.items():
        if any(not finite(number) for key in ("edges", "counts", "grid", "code_counts") for number in entry[key]):
            raise _Malformed(f"weights.{name}: every edge, count and level must be a finite number")
        if entry["counts"] and len(entry["edges"]) != len(entry["counts"]) + 1:
            raise _Malformed(f"weights.{name}: {len(entry['counts'])} counts need {len(entry['counts']) + 1} edges")
        if len(entry["grid"]) != len(entry["code_counts"]):
            raise _Malformed(f"weights.{name}: grid and code_counts differ in length")


def finite(value: Any) -> bool:
    """True for a number that can be drawn: not None, not NaN, not infinite."""
    return isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
