"""A recipe that runs every kind of phase in a few seconds."""

from __future__ import annotations

from typing import Any

import pytest

from profit.train import Recipe, parse_recipe, trainer
from profit.train.recipe_io import apply_overrides

VALUES: dict[str, Any] = {
    "model": {"args": {"width": 0.34, "head": 16}},
    "data": {"limit": 64, "batch_size": 32, "shift": 1},
    "calibration": {"batches": 1},
    "schedule": {
        "fp_epochs": 3, "fp_lr": 0.05, "act_bits": [4], "weight_bits": [5, 4], "profit_bits": [4], "bn_epochs": 1,
        "train_epochs": 2, "sample_epochs": 2, "stages": 3, "stage_epochs": 2, "final_bn_epochs": 1, "lr": 0.02,
    },
    "teacher": {"source": "self"},
    "run": {"name": "tiny", "device": "cpu", "threads": 1, "tensorboard": False},
}  # fmt: skip


def tiny_recipe(*overrides: str) -> Recipe:
    """The recipe with some values changed, `section.key=value`."""
    return parse_recipe(apply_overrides(VALUES, overrides))


def interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Raise KeyboardInterrupt when the epoch after `epochs` epochs has been trained but not yet been kept."""
    original, count = trainer.train_epoch, []

    def interrupted(*args, **kwargs):
        stats = original(*args, **kwargs)
        count.append(1)
        if len(count) > epochs:
            raise KeyboardInterrupt
        return stats

    monkeypatch.setattr(trainer, "train_epoch", interrupted)
