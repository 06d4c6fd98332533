"""What a checkpoint keeps of a trainer, and how a trainer takes it up again.

What is drawn at random is a function of seed and epoch, so no generator is stored.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from profit.aiwq import AIWQMonitor
from profit.errors import CheckpointError
from profit.schedule import PhaseSchedule
from profit.train.ema import ModelEma
from profit.train.network import Architecture, load_weights, network_state

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


def restore_phase(trainer: RunState, state: dict[str, Any]) -> None:
    """What entering the phase made anew and the phase has changed since."""
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.ema is not None:
        load_weights(trainer.ema.module, state["ema"], f"the checkpoint of {trainer.folder}")
    if trainer.monitor is not None:
        trainer.monitor.load_state_dict(state["monitor"])
