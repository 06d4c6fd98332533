"""What becomes of the BatchNorms of a converted model: less is kept for the backward, and the network computes the same.

A convolution whose input is [the activation of] a BatchNorm, with no other reader on the way (found by data flow), applies that
BatchNorm itself; the others compute BatchNorm and activation in one operator. Both stay in the model under their names
(`profit.nn.deferred`).
"""

from __future__ import annotations

from torch import nn

from .checks import check_module
from .config import DuQConfig
from .dataflow import LayerFlow
from .nn import BatchNormAct, QuantConv2d, QuantLayer, StandIn

_WITH_ACTIVATION = ("timm.layers.norm_act.BatchNormAct2d",)  # by name: timm is optional
_ACTIVATIONS = {nn.Identity: "none", nn.ReLU: "relu", nn.ReLU6: "relu6", nn.Hardswish: "hardswish"}


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
    return norm if len(names) == 1 and can_defer(norm, fused) else None


def can_defer(norm: nn.Module, fused: nn.Module | None = None) -> bool:
    """Whether `norm` computes plain BatchNorm (then perhaps `fused`) and nobody watches its output."""
    watched = norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks
    return not watched and activation_inside(norm, fused) == "none"


def activation_inside(norm: nn.Module, fused: nn.Module | None = None) -> str | None:
    """The activation that `norm` applies, `fused` left out; None if it is no BatchNorm2d known here."""
    cls = type(norm)
    if cls is nn.BatchNorm2d:
        return "none"
    if f"{cls.__module__}.{cls.__qualname__}" not in _WITH_ACTIVATION:
        return None
    active = [child for child in norm.children() if child is not fused and not isinstance(child, nn.Identity)]
    if not active:
        return "none"
    known = len(active) == 1 and active[0] is norm.act and not (active[0]._forward_hooks or active[0]._forward_pre_hooks)
    return _ACTIVATIONS.get(type(active[0])) if known else None


def stand_ins(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """BatchNorm -> its replacement, for those that no convolution applies."""
    found = {m: activation_inside(m) for m in model.modules() if isinstance(m, nn.BatchNorm2d)}
    return {m: BatchNormAct(m, activation) for m, activation in found.items() if activation is not None}


def swap_modules(model: nn.Module, swaps: dict[nn.Module, nn.Module]) -> None:
    """Put `swaps[old]` wherever `old` stands in `model`, under every name it has."""
    children = [(parent, key, child) for parent in model.modules() for key, child in parent._modules.items()]
    places = [(parent, key, swaps[child]) for parent, key, child in children if child in swaps]
    for parent, key, new in places:
        parent._modules[key] = new


def unfuse_(model: nn.Module) -> int:
    """Give every BatchNorm its work back, in place: the network computes the same, and hooks see what they used to.

    For exporters and for hooks on BatchNorm; activations that moved into a quantizer stay there. Returns how many
    BatchNorms were given back.

    Raises:
        TypeError: no model.
    """
    check_module(model)
    swaps = {m: m.restore() for m in model.modules() if isinstance(m, StandIn)}
    for layer in model.modules():
        if isinstance(layer, QuantConv2d):
            layer.set_norm(None)
    swap_modules(model, swaps)
    return len(swaps)
