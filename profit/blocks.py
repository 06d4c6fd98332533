"""Blocks: convolutions that apply the BatchNorm in front of them themselves, so that only its input is kept.

Found by data flow at conversion: convolution input = [activation of] a BatchNorm, with no other reader on the way. The
BatchNorm stays in the model, its state_dict keys in place, and hands its input on (`profit.nn.DeferredBatchNorm`).
"""

from __future__ import annotations

from torch import nn

from .config import DuQConfig
from .dataflow import LayerFlow
from .nn import QuantConv2d, QuantLayer

_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d",)  # by name: timm is optional


def norm_to_defer(
    model: nn.Module, config: DuQConfig, flow: LayerFlow, layer: QuantLayer, fused: nn.Module | None
) -> nn.BatchNorm2d | None:
    """The BatchNorm that `layer` can apply itself, or None. `fused`: the activation module that moves into the layer."""
    if not (config.fuse and flow.norm and isinstance(layer, QuantConv2d) and layer.can_apply_norm):
        return None
    if flow.activation and fused is None:
        return None
    norm = model.get_submodule(flow.norm)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is norm]
    return norm if len(names) == 1 and is_deferrable(norm, fused) else None


def is_deferrable(norm: nn.Module, fused: nn.Module | None = None) -> bool:
    """Whether `norm` computes plain BatchNorm (then perhaps `fused`) and nobody watches its output."""
    cls = type(norm)
    if cls is not nn.BatchNorm2d:
        if f"{cls.__module__}.{cls.__qualname__}" not in _WITH_ACTIVATION:
            return False
        if any(not isinstance(child, nn.Identity) and child is not fused for child in norm.children()):
            return False
    return not (norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks)


def unfuse_(model: nn.Module) -> int:
    """Give every BatchNorm its work back, in place: the network computes the same, and hooks see what they used to.

    For exporters and for hooks on BatchNorm; activations stay in their quantizers. Returns how many were given back.
    """
    children = [(parent, key, child) for parent in model.modules() for key, child in parent._modules.items()]
    restored = 0
    for layer in (m for m in model.modules() if isinstance(m, QuantConv2d) and m.norm is not None):
        norm, original = layer.norm, layer.norm.restore()
        for parent, key, child in children:
            if child is norm:
                parent._modules[key] = original
        layer.set_norm(None)
        restored += 1
    return restored
