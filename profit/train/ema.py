"""An exponential average of a model's weights and statistics."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class ModelEma:
    """`ema <- decay * ema + (1 - decay) * model` over parameters and float buffers, in one fused call per step.

    The copy starts as the model is now; make a new one wherever the model changes by other means than training (bit
    widths, calibration, freezing). Parameters that are frozen now are not averaged: they stay equal.

    Args:
        model: the model that trains, with its bit widths and frozen layers already set.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.module = copy.deepcopy(model).eval()
        self._averaged: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []
        for ours, theirs in zip(self.module.parameters(), model.parameters(), strict=True):
            if theirs.requires_grad:
                self._averaged.append((ours.detach(), theirs.detach()))
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            (self._averaged if ours.is_floating_point() else self._copied).append((ours, theirs))
        self.module.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the model."""
        if self._averaged:
            ours, theirs = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(ours, theirs, 1.0 - self.decay)
        if self._copied:
            ours, theirs = zip(*self._copied, strict=True)
            torch._foreach_copy_(ours, theirs)
