"""What a checkpoint keeps of a trainer, and how a trainer takes it up again.

What is drawn at random is a function of seed and epoch, so no generator is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from profit.checks import first_line
from profit.errors import CheckpointError
from profit.report.results import check_phases
from profit.train.network import load_weights, network_state

if TYPE_CHECKING:
    from profit.train.trainer import Trainer

_NUMBER = (int, float)
_KINDS: dict[str, Any] = {
    "model": dict, "position": dict, "run": dict, "history": list, "phases": list, "best": dict, "aiwq": (dict, type(None)),
    "frozen_stage": dict, "accuracy_fp": (*_NUMBER, type(None)), "wall_s": _NUMBER, "phase_wall_s": _NUMBER,
    "images_per_s": _NUMBER,
}  # fmt: skip
_MEASURED = ("history", "phases", "best", "aiwq", "frozen_stage", "accuracy_fp", "wall_s", "phase_wall_s", "images_per_s")


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """Everything the next epoch depends on."""
    state = {
        **network_state(trainer.model, trainer.architecture),
        "position": {
            "schedule": {**trainer.schedule.state_dict(), "position": trainer.phase_index}, "epoch": trainer.epoch,
        },
        **{name: getattr(trainer, name) for name in _MEASURED},
        "run": trainer.run_info,
    }  # fmt: skip
    if trainer.epoch:  # between two phases there is nothing of the phase to keep
        state["optimizer"] = trainer.optimizer.state_dict()
        state["ema"] = trainer.ema.module.state_dict() if trainer.ema else None
        state["monitor"] = trainer.monitor.state_dict() if trainer.monitor else None
    return state


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Model, position and everything measured so far. Raises CheckpointError for the state of another schedule."""
    wrong = _wrong(state)
    if wrong:
        raise CheckpointError(f"the checkpoint of {trainer.folder} is damaged: {wrong}")
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


def restore_phase(trainer: Trainer, state: dict[str, Any]) -> None:
    """What entering the phase made anew and the phase has changed since."""
    try:
        trainer.optimizer.load_state_dict(state["optimizer"])
        if trainer.ema is not None:
            load_weights(trainer.ema.module, state["ema"], f"the checkpoint of {trainer.folder}")
        if trainer.monitor is not None:
            trainer.monitor.load_state_dict(state["monitor"])
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"the checkpoint of {trainer.folder} does not fit its phase: {first_line(error)}") from None


def _wrong(state: Mapping[str, Any]) -> str | None:
    """What a checkpoint must hold and does not, by its name."""
    for name, kinds in _KINDS.items():
        if name not in state or not isinstance(state[name], kinds) or isinstance(state[name], bool):
            return f"{name} is missing or of another type"
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
        check_phases(state["phases"])
    except ValueError as error:
        return str(error)
    return None
