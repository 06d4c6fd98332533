"""All weights of a converted model quantized in one call at the start of its forward.

Layer by layer this costs a kernel launch (on a CPU, a call) for every layer, which for small maps is more than the
arithmetic. A layer called outside the forward of its model quantizes its own weight, with the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from profit_kernels import duq_fake_quantize_weights

from .layer import QuantLayer


class Forward:
    """One forward of a model: what its layers' batched weights share."""

    def __init__(self) -> None:
        self.active = True  # until it ends


class BatchedWeight:
    """The quantized weight that a layer uses in the present forward of its model. A copy of the layer has none."""

    def __init__(self, weight: Tensor, forward: Forward) -> None:
        self.weight = weight
        self.forward = forward
        self.recorded = False  # used where autograd was recording

    def current(self) -> Tensor | None:
        """The weight, during the forward and where activation checkpointing repeats a part of it in the backward."""
        if self.forward.active:
            self.recorded = self.recorded or torch.is_grad_enabled()
            return self.weight
        # Recomputing must save the very tensors of the first time. With use_reentrant=True that was under no_grad, and
        # the repetition has a graph of its own. A call of the layer alone, after the forward, makes an end of it.
        self.recorded = self.recorded and torch._C._current_graph_task_id() != -1
        return self.weight if self.recorded else None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _nothing() -> None:
    return None


def quantize_weights(model: nn.Module, args: Any) -> None:
    """Forward pre-hook: give every layer that needs one its quantized weight."""
    layers = [m for m in model.modules() if isinstance(m, QuantLayer) and m.needs_quantized_weight()]
    if not layers:
        return
    quantizers = [layer.weight_quantizer for layer in layers]
    quantized = duq_fake_quantize_weights(
        [layer.weight for layer in layers], [q.a for q in quantizers], [q.c for q in quantizers],
        bits=[q.bits for q in quantizers],
    )  # fmt: skip
    forward = Forward()
    for layer, weight in zip(layers, quantized, strict=True):
        layer.batched_weight = BatchedWeight(weight, forward)


def end_forward(model: nn.Module, args: Any, output: Any) -> None:
    """Forward hook, called after an error too: from here on the layers are on their own."""
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.batched_weight is not None:
            if torch.compiler.is_compiling():  # compiled graphs are not recomputed from here, and would keep it alive
                layer.batched_weight = None
            elif layer.batched_weight.forward.active:
                layer.batched_weight.forward.active = False
                return  # one for all its layers: no need to walk through the rest of the model


def attach(model: nn.Module) -> None:
    """Quantize all weights of `model` at the start of every forward; once attached, nothing more happens."""
    if quantize_weights not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(quantize_weights)
        model.register_forward_hook(end_forward, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo `attach` in `model` and all it contains: every layer quantizes its own weight. For exporters, which follow one
    layer at a time."""
    for module in model.modules():
        for hooks, function in ((module._forward_pre_hooks, quantize_weights), (module._forward_hooks, end_forward)):
            for key in [k for k, hook in hooks.items() if hook is function]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if isinstance(module, QuantLayer):
            module.batched_weight = None
