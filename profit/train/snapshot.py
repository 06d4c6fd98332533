"""What a checkpoint keeps of a trainer, and how a trainer takes it up again.

What is drawn at random is a function of seed and epoch, so no generator is stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from profit.errors import CheckpointError
from profit.train.network import load_weights, network_state

if TYPE_CHECKING:
    from profit.train.trainer import Trainer

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
    position = state["position"]
    try:
        replace(trainer.schedule).load_state_dict(position["schedule"])
    except ValueError as error:
        raise CheckpointError(f"{trainer.folder}: {error}") from None
    trainer.phase_index, trainer.epoch = position["schedule"]["position"], position["epoch"]
    load_weights(trainer.model, state["model"], f"the checkpoint of {trainer.folder}")
    for name in _MEASURED:
        setattr(trainer, name, state[name])
    trainer.run_info = {**trainer.run_info, "created": state["run"]["created"], "command": state["run"]["command"]}


def restore_phase(trainer: Trainer, state: dict[str, Any]) -> None:
    """What entering the phase made anew and the phase has changed since."""
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.ema is not None:
        load_weights(trainer.ema.module, state["ema"], f"the checkpoint of {trainer.folder}")
    if trainer.monitor is not None:
        trainer.monitor.load_state_dict(state["monitor"])
