"""Reading results.json: every key of schema 1 present afterwards, with the right type or None."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from profit.errors import ProfitError

SCHEMA = 1
RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class _Number:
    """A number in a range that people and drawings can be shown; NaN and infinities too, unless it counts something."""

    low: float
    high: float
    finite: bool = False

    def refuses(self, value: Any) -> bool:
        # bool is an int in Python, but an accuracy of `true` is a mistake
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        if isinstance(value, float) and not math.isfinite(value):
            return self.finite
        return not self.low <= value <= self.high

    def expected(self, value: Any) -> str:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return f"a number in {self.low:g}..{self.high:g}" if is_number else "a number"


_NUMBER, _PERCENT, _COUNT = _Number(-1e40, 1e40), _Number(0, 100), _Number(0, 2.0**53, finite=True)
_HISTORY = {
    "epoch": _COUNT, "accuracy": _PERCENT, "accuracy_ema": _PERCENT,
    **dict.fromkeys(("lr", "train_loss", "test_loss"), _NUMBER),
}  # fmt: skip
_PHASE = {
    **dict.fromkeys(("name", "kind", "bits"), str),
    **dict.fromkeys(("weight_bits", "act_bits", "frozen", "epochs"), _COUNT),
    **dict.fromkeys(("accuracy", "accuracy_ema"), _PERCENT),
    **dict.fromkeys(("lr", "train_loss", "test_loss", "wall_s", "images_per_s"), _NUMBER),
    "frozen_layers": [str],
    "history": [_HISTORY],
}
_LAYER = {
    **dict.fromkeys(("name", "type", "kind", "activation"), str),
    **dict.fromkeys(("stride", "groups", "offset", "pad_value", "weight_bits", "act_bits"), object),
    **dict.fromkeys(("parameters", "macs", "rank", "frozen_stage"), _COUNT),
    **dict.fromkeys(("A_x", "C_x", "A_w", "C_w", "aiwq"), _NUMBER),
    "kernel": [_COUNT],
    "ranked": bool,
}
_WEIGHTS = {"edges": [_NUMBER], "counts": [_COUNT], "grid": [_NUMBER], "code_counts": [_COUNT], "unit": str}
_RUN = {
    **dict.fromkeys(("name", "created", "command", "git_commit", "device"), str),
    **dict.fromkeys(("seed", "threads"), _Number(0, 2.0**63, finite=True)),
    "wall_s": _NUMBER,
    "finished": bool,
    "versions": dict,
}
_RESULTS = {
    "run": _RUN,
    "model": {"name": str, **dict.fromkeys(("parameters", "classes", "in_chans"), _COUNT)},
    "data": {"name": str, "class_names": [str], **dict.fromkeys(("train", "test", "unreadable", "image_size", "fold"), object)},
    "recipe": dict,
    "phases": [_PHASE],
    "layers": [_LAYER],
    "weights": dict,
    "sizes": [{"label": str, "bits": _COUNT, "bytes": _COUNT, "accuracy": _PERCENT}],
    "aiwq": {"mode": str, "decay": _NUMBER, **dict.fromkeys(("steps", "clamped", "skipped"), _COUNT), "scores": dict},
    "final": dict.fromkeys(("accuracy", "accuracy_ema", "accuracy_fp"), _PERCENT),
}
_TYPE_NAMES = {str: "a text", bool: "true or false", dict: "a mapping", object: "a value"}
_DEPTH = 12  # of the whole file; results nest five deep and the recipe in them some more
# What a finished run has, for those who print it.
_FINISHED = {
    "run": ("name", "wall_s"), "model": ("name",), "data": ("name",), "final": ("accuracy",),
    "phases": ("name", "bits", "frozen", "epochs", "accuracy", "wall_s"),
}  # fmt: skip


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """Read `run_dir`/results.json and complete it.

    Keys of schema 1 that are absent become None (sections: a mapping of Nones, or an empty list; `aiwq` stays None),
    so that a run stopped early reads like a finished one. Unknown keys are ignored.

    Raises:
        ProfitError: no such file, not JSON, another schema, or a value of the wrong type (named by its place).
    """
    path = Path(run_dir) / RESULTS_NAME
    raw = _raw(path)
    try:
        return _completed(raw)
    except _Malformed as error:
        raise ProfitError(f"{path}: {error}") from None


def read_finished(run_dir: str | Path) -> dict[str, Any]:
    """What `run_dir`/results.json of a finished run holds, as it stands there, after every check.

    Raises:
        ProfitError: as `read_results`, or something that a finished run has is missing (named by its place).
    """
    path = Path(run_dir) / RESULTS_NAME
    raw = _raw(path)
    try:
        results = _completed(raw)
        for section, keys in _FINISHED.items():
            found = results[section]
            if not found:
                raise _Malformed(f"{section} is missing, of a run that is finished")
            for entry in found if isinstance(found, list) else [found]:
                absent = [key for key in keys if entry[key] is None]
                if absent:
                    raise _Malformed(f"{section}: {absent[0]} is missing, of a run that is finished")
    except _Malformed as error:
        raise ProfitError(f"{path}: {error}") from None
    return raw


# What the trainer computes with, of the phases that are over and of the epochs of the one that runs.
_NEEDED = {"phases": _FINISHED["phases"], "history": ("accuracy", "train_loss", "test_loss")}


def check_measured(measured: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the place, where the measurements in a checkpoint are not what a run measures.

    Args:
        measured: phases and history as in results.json (the history is that of the running phase), aiwq or None, and by
            name best (accuracies in percent) and frozen_stage (whole numbers).
    """
    names = ("phases", "history", "aiwq", "best", "frozen_stage")
    _check_plain({name: measured[name] for name in names}, "")
    _complete(measured, {"phases": [_PHASE], "history": [_HISTORY], "aiwq": _RESULTS["aiwq"]}, "")
    for name in ("phases", "history", "best"):
        try:
            json.dumps(measured[name], allow_nan=False)
        except ValueError:
            raise _Malformed(f"{name} holds NaN or infinity, which results.json cannot") from None
    for name, keys in _NEEDED.items():
        for index, entry in enumerate(measured[name]):
            _check_complete(entry or {}, keys, f"{name}[{index}]")
    scores = measured["aiwq"]["scores"] if measured["aiwq"] else {}
    named = {"best": _PERCENT, "frozen_stage": _COUNT, "aiwq.scores": _NUMBER}
    for name, kind in named.items():
        values = scores if name == "aiwq.scores" else measured[name]
        _complete(values, dict.fromkeys(values, kind), name)
        _check_complete(values, tuple(values), name)


def _check_complete(entry: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    absent = [key for key in keys if entry.get(key) is None]
    if absent:
        raise _Malformed(f"{where}.{absent[0]} is missing")


def _raw(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_dir() and not path.is_file():
            raise ProfitError(f"{path} cannot be read: it is no regular file")
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
    return raw


def _completed(raw: dict[str, Any]) -> dict[str, Any]:
    _check_plain(raw, "")
    results = _complete(raw, _RESULTS, "")
    results["aiwq"] = results["aiwq"] if raw.get("aiwq") is not None else None
    if results["aiwq"] is not None:
        scores = results["aiwq"]["scores"]
        _complete(scores, dict.fromkeys(scores, _NUMBER), "aiwq.scores")
    results["weights"] = {name: _complete(entry, _WEIGHTS, f"weights.{name}") for name, entry in results["weights"].items()}
    _check_histograms(results["weights"])
    return results


def _check_plain(value: Any, where: str, depth: int = 0) -> None:
    """What no page can show, in sections of which nothing else is known."""
    if depth > _DEPTH:
        raise _Malformed(f"{where[:60]}: nested too deeply")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise _Malformed(f"{where}: expected a text, found half of a letter, {_show(value)}")
    if isinstance(value, int) and not -(2**64) < value < 2**64:
        raise _Malformed(f"{where}: expected a number of 64 bits, found {_show(value)}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where or 'the file'}", depth)
            _check_plain(item, f"{where}.{key}".lstrip("."), depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]", depth + 1)


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
    wrong = spec.refuses(value) if isinstance(spec, _Number) else not isinstance(value, spec)
    if wrong:
        expected = spec.expected(value) if isinstance(spec, _Number) else _TYPE_NAMES[spec]
        raise _Malformed(f"{where}: expected {expected}, found {_show(value)}")
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
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
