"""What a checkpoint keeps of a trainer, and how a trainer takes it up again.

What is drawn at random is a function of seed and epoch, so no generator is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from profit.aiwq import AIWQMonitor
from profit.checks import first_line
from profit.errors import CheckpointError
from profit.report.results import check_measured
from profit.schedule import PhaseSchedule
from profit.train.ema import ModelEma
from profit.train.network import Architecture, load_weights, network_state

_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "model": dict, "position": dict, "run": dict, "history": list, "phases": list, "best": dict, "aiwq": (dict, type(None)),
    "frozen_stage": dict, "accuracy_fp": (*_NUMBER, type(None)), "wall_s": _NUMBER, "phase_wall_s": _NUMBER,
    "images_per_s": _NUMBER,
}  # fmt: skip
_MEASURED = ("history", "phases", "best", "aiwq", "frozen_stage", "accuracy_fp", "wall_s", "phase_wall_s", "images_per_s")


class RunState(Protocol):
    """What is stored of a trainer; beside the attributes below those that `_MEASURED` names."""

    folder: Path
    model: nn.Module
    architecture: Architecture
    schedule: PhaseSchedule
    phase_index: int
    epoch: int
    optimizer: torch.optim.Optimizer | None
    ema: ModelEma | None
    monitor: AIWQMonitor | None
    run_info: dict[str, Any]
    origin: dict[str, Any]


def snapshot(trainer: RunState) -> dict[str, Any]:
    """Everything the next epoch depends on."""
    state = {
        **network_state(trainer.model, trainer.architecture),
        "position": {
            "schedule": {**trainer.schedule.state_dict(), "position": trainer.phase_index}, "epoch": trainer.epoch,
        },
        **{name: getattr(trainer, name) for name in _MEASURED},
        "run": trainer.run_info,
        "origin": trainer.origin,
    }  # fmt: skip
    if trainer.epoch:  # between two phases there is nothing of the phase to keep
        state["optimizer"] = trainer.optimizer.state_dict()
        state["ema"] = trainer.ema.module.state_dict() if trainer.ema else None
        state["monitor"] = trainer.monitor.state_dict() if trainer.monitor else None
    return state


def restore(trainer: RunState, state: dict[str, Any]) -> None:
    """Model, position and everything measured so far. Raises CheckpointError for the state of another schedule."""
    check_snapshot(state, trainer.folder)
    position = state["position"]
    try:
        replace(trainer.schedule).load_state_dict(position["schedule"])
    except ValueError as error:
        raise CheckpointError(f"{trainer.folder}: {error}") from None
    epochs = [*(phase.epochs for phase in trainer.schedule.phases), 1][position["schedule"]["position"]]
    if not 0 <= position["epoch"] < epochs:
        raise CheckpointError(f"the checkpoint of {trainer.folder} is damaged: epoch {position['epoch']} of {epochs}")
    trainer.phase_index, trainer.epoch = position["schedule"]["position"], position["epoch"]
    load_weights(trainer.model, state["model"], f"the checkpoint of {trainer.folder}")
    for name in _MEASURED:
        setattr(trainer, name, state[name])
    trainer.run_info = {**trainer.run_info, "created": state["run"]["created"], "command": state["run"]["command"]}


def restore_phase(trainer: RunState, state: dict[str, Any]) -> None:
    """What entering the phase made anew and the phase has changed since."""
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
        if trainer.ema is not None:
            load_weights(trainer.ema.module, state["ema"], f"the checkpoint of {trainer.folder}")
        if trainer.monitor is not None:
            trainer.monitor.load_state_dict(state["monitor"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint of {trainer.folder} does not fit its phase: {first_line(error)}") from None


def check_snapshot(state: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError where the state of a run lacks something, or holds it in another type."""
    wrong = _wrong(state) or _wrong_origin(state.get("origin"))
    if wrong:
        raise CheckpointError(f"the checkpoint of {folder} is damaged: {wrong}")


def _wrong_origin(origin: Any) -> str | None:
    """The same of what a run was begun with; None where an earlier version did not record it."""
    if origin is None:
        return None
    sections = ("recipe", "teacher", "data")
    if not isinstance(origin, dict) or not all(isinstance(origin.get(key), dict) for key in sections):
        return "origin is of another type"
    recipe, teacher, data = (origin[key] for key in sections)
    names = data.get("class_names")
    splits = [data[split] for split in ("train", "test") if split in data]
    fits = (
        isinstance(recipe.get("values"), dict)
        and all(key in teacher and isinstance(teacher[key], (str, type(None))) for key in ("source", "sha256"))
        and isinstance(names, list) and all(isinstance(name, str) for name in names)
        and all(isinstance(split, dict) and {"images", "sha256"} <= split.keys() for split in splits)
    )  # fmt: skip
    return None if fits else "origin is of another type"


def _wrong(state: Mapping[str, Any]) -> str | None:
    """What a checkpoint must hold and does not, by its name."""
    for name, kinds in _KINDS.items():
        if name not in state or not isinstance(state[name], kinds) or isinstance(state[name], bool):
            return f"{name} is missing or of another type"
        if isinstance(state[name], float) and not math.isfinite(state[name]):
            return f"{name} is {state[name]}"
    position = state["position"]
    if not isinstance(position.get("epoch"), int) or not isinstance(position.get("schedule"), dict):
        return "position is of another type"
    if not all(isinstance(state["run"].get(key), str) for key in ("created", "command")):
        return "run is of another type"
    if not all(isinstance(tensor, Tensor) for tensor in state["model"].values()):
        return "model holds other things than tensors"
    if state["aiwq"] is not None and not isinstance(state["aiwq"].get("scores"), dict):
        return "aiwq.scores is missing or of another type"
    try:
        check_measured(state)
    except ValueError as error:
        return str(error)
    return None
