"""Freezing convolution weights: the most unstable first (PROFIT), or all of them (BatchNorm phases).

Source: PROFIT (arXiv 2008.04693), section 4: the convolutions are ranked once by AIWQ, and stage i of N trains with the
top i/N of them frozen. What is frozen is the latent weight; "weights+intervals" also stops the layer's weight quantizer,
so that its quantized weight is a constant and is computed once. Frozen means `requires_grad = False`: no gradient is
computed, and `profit.param_groups` leaves the parameter out. Build a new optimizer after every change.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

from torch import nn

from .checks import brief, check_module, check_state, check_whole
from .config import check_choice
from .optim import is_weighted_layer, quantizer_parameters, quantizers


class ProgressiveFreezer:
    """Freeze the most unstable of the ranked convolutions, stage by stage.

    Args:
        model: converted model; the names of `scores` are its module names.
        scores: instability per layer, larger is frozen earlier (`AIWQMonitor.scores()`); ties go by name.
        stages: number of stages N; stage i freezes floor(n * i / N) of the n layers.
        freeze: "weights" (published) or "weights+intervals" (the layer's weight quantizer too, and its quantized weight
            is cached).

    Raises:
        ValueError: a name that is no quantized layer of `model`, a score that is not a finite number, no scores at all,
            `stages` that is no whole number from 1, or an unknown `freeze`. TypeError: no model, or scores that are no
            mapping.
    """

    def __init__(self, model: nn.Module, scores: Mapping[str, float], stages: int = 3, freeze: str = "weights") -> None:
        check_module(model)
        self.stages = check_whole(stages, "stages", 1)
        check_choice(freeze, ("weights", "weights+intervals"), "freeze")
        self.freeze = freeze
        self.stage: int | None = None
        self._modules = {name: m for name, m in model.named_modules() if hasattr(m, "freeze_weight")}
        self._set_scores(scores)

    def _set_scores(self, scores: Mapping[str, float]) -> None:
        if not isinstance(scores, Mapping):
            raise TypeError(f"scores must map layer names to numbers, as AIWQMonitor.scores() does; got {brief(scores)}")
        if not scores:
            raise ValueError("no scores to rank: sample AIWQ first, on a model with convolutions followed by BatchNorm")
        unknown = sorted(map(str, set(scores) - set(self._modules)))
        if unknown:
            raise ValueError(
                f"{len(unknown)} scored names are no quantized layers of this model: {', '.join(unknown[:5])}"
            )
        bad = sorted(n for n, score in scores.items() if not isinstance(score, numbers.Real) or not math.isfinite(score))
        if bad:
            raise ValueError(f"scores that are not finite cannot be ranked: {', '.join(bad[:5])}; sample again")
        self.scores = {name: float(score) for name, score in scores.items()}
        self.order: list[str] = sorted(self.scores, key=lambda name: (-self.scores[name], name))

    def frozen_names(self, stage: int) -> list[str]:
        """The layers that `stage` freezes, most unstable first; changes nothing.

        Raises:
            ValueError: `stage` is no whole number within 0..stages.
        """
        stage = check_whole(stage, "stage", 0, self.stages)
        return self.order[: len(self.order) * stage // self.stages]

    def apply(self, stage: int) -> list[str]:
        """Put the ranked layers in the state of `stage` (whatever stage came before) and return the frozen names.

        Raises:
            ValueError: `stage` is no whole number within 0..stages.
        """
        frozen = self.frozen_names(stage)
        # Thawing comes first: where two layers share one weight, frozen must win whatever the order of the names.
        for name in self.order[len(frozen) :]:
            self._modules[name].unfreeze_weight()
        for name in frozen:
            _freeze_layer(self._modules[name], intervals=self.freeze == "weights+intervals")
        self.stage = stage
        return frozen

    def release(self) -> None:
        """Make every ranked layer train again."""
        for name in self.order:
            self._modules[name].unfreeze_weight()
        self.stage = None

    def state_dict(self) -> dict[str, Any]:
        """Scores and current stage (JSON-able)."""
        return {"scores": dict(self.scores), "stages": self.stages, "freeze": self.freeze, "stage": self.stage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over ranking and stage from `state_dict`, and apply the stage.

        Raises:
            ValueError: a damaged state, another number of stages or kind of freezing, or scores this model does not have.
                Nothing is changed then.
        """
        check_state(state, ("stages", "freeze", "scores", "stage"), "ProgressiveFreezer")
        if (state["stages"], state["freeze"]) != (self.stages, self.freeze):
            raise ValueError(
                f"saved freezer has stages={state['stages']}, freeze={state['freeze']!r}; "
                f"this one stages={self.stages}, freeze={self.freeze!r}"
            )
        if state["stage"] is not None:
            check_whole(state["stage"], "saved freezer: stage", 0, self.stages)
        if not isinstance(state["scores"], Mapping):
            raise ValueError(f"saved freezer: scores must map layer names to numbers, got {brief(state['scores'])}")
        self._set_scores(state["scores"])
        if state["stage"] is None:
            self.release()
        else:
            self.apply(state["stage"])


def freeze_all(model: nn.Module, intervals: bool = False) -> list[str]:
    """Freeze every convolution and linear weight: the BatchNorm phases. Returns the names of these layers.

    Args:
        model: any model; quantized layers cache their quantized weight where that is constant.
        intervals: freeze all quantizer parameters too (weights and activations), so that BatchNorm and biases are left.

    Raises:
        TypeError: no model.
    """
    check_module(model)
    names = []
    for name, module in model.named_modules():
        if is_weighted_layer(module):
            _freeze_layer(module, intervals)
            names.append(name)
    if intervals:
        for parameter in quantizer_parameters(model):
            parameter.requires_grad_(False)
            parameter.grad = None
    return names


def release_all(model: nn.Module) -> None:
    """Make every convolution and linear weight and every quantizer parameter train: undoes all freezing."""
    for module in model.modules():
        if not is_weighted_layer(module):
            continue
        if hasattr(module, "unfreeze_weight"):
            module.unfreeze_weight()
        else:
            module.weight.requires_grad_(True)
    for quantizer in quantizers(model):
        # The image is never quantized: its quantizer has no gradient to wait for.
        quantizer.requires_grad_(getattr(quantizer, "kind", None) != "raw")


def _freeze_layer(module: nn.Module, intervals: bool) -> None:
    if hasattr(module, "freeze_weight"):
        module.freeze_weight(intervals=intervals)
    else:
        module.weight.requires_grad_(False)
    # A gradient left over from the last step would still be applied by an optimizer that holds the parameter.
    module.weight.grad = None
