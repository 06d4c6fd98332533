"""Checkpoints of the method's authors (their public repository `EunhyeokPark/PROFIT`, quant_op/duq.py).

There a quantized layer holds `weight`, `bias` and the raw weight interval as `a`, `c`; activation quantizers are modules of
their own, with `a`, `c` and nothing else, in front of the layer they feed. A quantizer that opens a block is named with a
minus sign (`features.2.conv.-0`), so that the layers keep torchvision's numbers. Names differ from those of other
implementations of the same nets, the order does not: layers are paired in the order in which they run.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .checks import brief, check_module
from .errors import CheckpointError
from .nn import QuantLayer
from .quantize import quant_layers

# Their MobileNetV2 registers `relu6` last and runs it before the classifier.
_TOP_LEVEL = ("features", "relu6", "classifier")
_BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass
class _TheirLayer:
    """One of their layers with the quantizer in front of it and the BatchNorm behind it (names; "" if there is none)."""

    name: str
    quantizer: str = ""
    batch_norm: str = ""


def load_authors_checkpoint(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    weights_quantized: bool = True,
    activations_quantized: bool = True,
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    top_level: Sequence[str] = _TOP_LEVEL,
) -> dict[str, str]:
    """Load a checkpoint of the authors' code into a converted model of the same architecture, in place.

    Nothing in a checkpoint tells how its net was wired. Their MobileNetV3 scales by squeeze-and-excite before the
    activation, timm's and torchvision's after it: the shapes agree, the function does not (a warning says so). Their
    MobileNetV2 ends in ReLU, average, ReLU6; the usual one in ReLU6, average.

    Args:
        model: converted by `quantize_`; its bit widths are not changed.
        state_dict: name -> tensor; names may start with "module.". Read it with `torch.load(path, weights_only=True)`,
            and take the entry "model" of a training checkpoint.
        weights_quantized, activations_quantized: False for a checkpoint of an earlier phase, in which that side's `a`, `c`
            were never set (they hold arbitrary memory): they are left out then.
        allow_missing: layers of `model` that may stay as they are.
        allow_unexpected: modules of the checkpoint to leave out.
        top_level: order in which the top-level parts of their net run.

    Returns:
        The map: their module name -> ours.

    Raises:
        CheckpointError: modules or shapes that do not correspond, by name; intervals that are not finite. The model is
            unchanged then. TypeError: no model, or a state_dict that is no mapping.
    """
    check_module(model)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must map names to tensors, got {brief(state_dict)}: read a file with "
                        "torch.load(path, weights_only=True)")  # fmt: skip
    tensors = _plain(state_dict)
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, leaf = key.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    modules = {name: modules[name] for name in modules if name not in allow_unexpected}
    names = sorted(modules, key=lambda name: _order(name, top_level))
    theirs = _their_layers(names, modules)
    ours = {name: layer for name, layer in quant_layers(model).items() if name not in allow_missing}
    if not ours:
        raise CheckpointError("the model has no quantized layer: convert it with quantize_ first")
    if len(theirs) != len(ours):
        raise CheckpointError(
            f"the checkpoint has {len(theirs)} layers, the model has {len(ours)}: not the same architecture "
            "(leave modules out with allow_missing, allow_unexpected)"
        )

    copies: list[tuple[Tensor, Tensor]] = []
    ready: list[nn.Module] = []
    mapping: dict[str, str] = {}
    for their, (name, layer) in zip(theirs, ours.items(), strict=True):
        mapping[their.name] = name
        _copy_layer(their, modules[their.name], name, layer, copies, ready if weights_quantized else None)
        has_quantizer = layer.input_quantizer.kind != "raw"
        if bool(their.quantizer) != has_quantizer:
            raise CheckpointError(f"the input of {name!r} is {'quantized' if has_quantizer else 'not quantized'} here, that of "
                                  f"{their.name!r} in the checkpoint is not alike")  # fmt: skip
        if their.quantizer:
            mapping[their.quantizer] = f"{name}.input_quantizer"
            if activations_quantized:
                _copy_interval(their.quantizer, modules[their.quantizer], layer.input_quantizer, copies)
                ready.append(layer.input_quantizer)
        if bool(their.batch_norm) != bool(layer.batch_norm):
            raise CheckpointError(f"{name!r} and {their.name!r} of the checkpoint differ in the BatchNorm behind them")
        if their.batch_norm:
            mapping[their.batch_norm] = layer.batch_norm
            _copy_batch_norm(their.batch_norm, modules[their.batch_norm], model.get_submodule(layer.batch_norm), copies)
    unused = [name for name in names if name not in mapping]
    if unused:
        raise CheckpointError(
            f"the checkpoint has {unused[0]!r}, which feeds no layer of the model (see allow_unexpected)"
        )

    _warn_of_squeeze_excite(theirs, list(ours.values()))
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
    for quantizer in ready:
        quantizer.mark_ready()
    for layer in ours.values():
        layer.refresh_cache()
    return mapping


def _plain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{key!r} holds a {type(value).__name__}, not a tensor: pass the state_dict itself "
                                  "(entry 'model' of a training checkpoint)")  # fmt: skip
    return {key.removeprefix("module."): value for key, value in state_dict.items()}


def _order(name: str, top_level: Sequence[str]) -> tuple[tuple[int, int, str], ...]:
    """Sort key: top-level parts as listed, numbers by value, and `-7` just before `7`."""
    first, *rest = name.split(".")
    if first not in top_level:
        raise CheckpointError(
            f"the checkpoint has a part {first!r} that is not one of {', '.join(top_level)} (see top_level)"
        )
    key = [(top_level.index(first), 0, "")]
    for part in rest:
        digits = part.removeprefix("-")
        key.append((int(digits), 0 if part.startswith("-") else 1, "") if digits.isdigit() else (0, 0, part))
    return tuple(key)


def _their_layers(names: Sequence[str], modules: Mapping[str, Mapping[str, Tensor]]) -> list[_TheirLayer]:
    """Their layers in order of execution, each with the last quantizer in front of it."""
    layers: list[_TheirLayer] = []
    waiting = ""
    for name in names:
        leaves = modules[name]
        if "running_mean" in leaves and layers:
            layers[-1].batch_norm = name
        elif "weight" in leaves and leaves["weight"].dim() > 1:
            layers.append(_TheirLayer(name, quantizer=waiting))
            waiting = ""
        elif set(leaves) == {"a", "c"}:
            waiting = name
    return layers


def _copy_layer(
    their: _TheirLayer, leaves: Mapping[str, Tensor], name: str, layer: QuantLayer, copies: list[tuple[Tensor, Tensor]],
    ready: list[nn.Module] | None,
) -> None:  # fmt: skip
    weight = leaves["weight"]
    while weight.dim() < layer.weight.dim() or (weight.dim() > layer.weight.dim() and weight.shape[-1] == 1):
        weight = weight.unsqueeze(-1) if weight.dim() < layer.weight.dim() else weight.squeeze(-1)
    _add(copies, their.name + ".weight", weight, name + ".weight", layer.weight)
    _add(copies, their.name + ".bias", leaves.get("bias"), name + ".bias", layer.bias)
    if ready is not None:
        _copy_interval(their.name, leaves, layer.weight_quantizer, copies)
        ready.append(layer.weight_quantizer)


def _copy_interval(
    name: str, leaves: Mapping[str, Tensor], quantizer: nn.Module, copies: list[tuple[Tensor, Tensor]]
) -> None:
    if not quantizer.is_duq:
        raise CheckpointError("the authors' checkpoints hold DuQ intervals: convert the model with quantizer='duq'")
    for leaf, target in (("a", quantizer.a), ("c", quantizer.c)):
        source = leaves.get(leaf)
        if source is None or source.numel() != 1:
            raise CheckpointError(f"the checkpoint has no single interval {name}.{leaf}")
        if not bool(torch.isfinite(source)):
            raise CheckpointError(f"{name}.{leaf} of the checkpoint is not finite: its phase did not quantize that side "
                                  "(see weights_quantized, activations_quantized)")  # fmt: skip
        copies.append((target, source.reshape(1).expand(target.shape)))


def _copy_batch_norm(
    name: str, leaves: Mapping[str, Tensor], module: nn.Module, copies: list[tuple[Tensor, Tensor]]
) -> None:
    for leaf in _BATCH_NORM:
        if leaf != "num_batches_tracked" or leaf in leaves:
            _add(copies, f"{name}.{leaf}", leaves.get(leaf), f"BatchNorm.{leaf}", getattr(module, leaf))


def _add(
    copies: list[tuple[Tensor, Tensor]], source_name: str, source: Tensor | None, name: str, target: Tensor | None
) -> None:
    shapes = [None if t is None else tuple(t.shape) for t in (source, target)]
    if shapes[0] != shapes[1]:
        raise CheckpointError(f"{source_name} of the checkpoint has shape {shapes[0]}, {name} of the model {shapes[1]}")
    if source is not None and target is not None:
        copies.append((target, source))


def _warn_of_squeeze_excite(theirs: Sequence[_TheirLayer], ours: Sequence[QuantLayer]) -> None:
    """Their layer behind a squeeze-and-excite reads an activation; one that does not is in a net wired differently."""
    for before, their, layer in zip(theirs, theirs[1:], ours[1:], strict=False):
        behind = ".fc." in before.name and ".fc." not in their.name
        if behind and layer.input_quantizer.activation == "none":
            warnings.warn(
                f"the checkpoint's net applies squeeze-and-excite before the activation; layer {layer.layer_name!r} of this "
                "model does not read an activation, so it may compute something else with the same weights",
                UserWarning,
                stacklevel=3,
            )
            return
