"""A converted model's structure as JSON: enough to convert the same architecture again without running it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .blocks import can_defer, stand_ins, swap_modules
from .checks import brief, check_module
from .config import QUANTIZERS, DuQConfig, check_bits
from .errors import CheckpointError, ConversionError
from .nn import DeferredBatchNorm, QuantConv2d, QuantLayer, QuantLinear, StandIn
from .nn.layer import quantizer_classes
from .quantize import layer_table, quant_layers
from .table import LayerTable

FORMAT = 1


def quantization_state(model: nn.Module) -> dict[str, Any]:
    """What conversion decided, as a JSON-able dict; numbers learned or calibrated are in the model's state_dict.

    Raises:
        ConversionError: nothing is converted. TypeError: no model.
    """
    layers = quant_layers(model)
    if not layers:
        raise ConversionError("the model has no quantized layer: convert it with quantize_ first")
    configs = [layer.config for layer in layers.values()]
    config = configs[0].to_dict() if configs[0] is not None and all(c == configs[0] for c in configs) else None
    fuse = any(isinstance(m, StandIn) for m in model.modules())
    states = {name: _layer_state(name, layer) for name, layer in layers.items()}
    return {"format": FORMAT, "config": config, "fuse": fuse, "layers": states}


def _layer_state(name: str, layer: QuantLayer) -> dict[str, Any]:
    q, w = layer.input_quantizer, layer.weight_quantizer
    # Names are relative to the model that was converted, which may be a part of this one.
    prefix = name.removesuffix(layer.layer_name) if name.endswith(layer.layer_name) else ""
    return {
        "type": "conv" if isinstance(layer, QuantConv2d) else "linear",
        "quantizer": next(n for n in QUANTIZERS if quantizer_classes(n) == (type(q), type(w))),
        "kind": q.kind,
        "offset": q.offset,
        "activation": q.activation,
        "fused_from": prefix + layer.fused_from if layer.fused_from else "",
        "norm": prefix + layer.norm_name if isinstance(layer, QuantConv2d) and layer.norm_name else "",
        "batch_norm": prefix + layer.batch_norm if layer.batch_norm else "",
        "act_bits": q.bits,
        "weight_bits": w.bits,
        "weight_granularity": "per_tensor" if w.channels is None else "per_channel",
        "own_bits": dict(layer.own_bits),
        "pad_value": layer.pad_value if isinstance(layer, QuantConv2d) else 0.0,
        "ranked": layer.ranked,
        "macs": layer.macs,
    }


def apply_quantization_state_(model: nn.Module, state: Mapping[str, Any]) -> LayerTable:
    """Convert `model`, in place, into what :func:`quantization_state` described; load its state_dict afterwards.

    Args:
        model: not converted, of the architecture the state was taken from.

    Raises:
        CheckpointError: the state is damaged or belongs to another architecture. The model is unchanged then.
        TypeError: no model.
    """
    check_module(model)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"a quantization state is what quantization_state returns, a mapping; got {brief(state)}")
    if state.get("format") != FORMAT or not isinstance(state.get("layers"), Mapping):
        raise CheckpointError(f"not a quantization state of format {FORMAT}: found format {state.get('format')!r}")
    if quant_layers(model):
        raise CheckpointError("the model is converted already: apply a quantization state to a fresh model")
    try:
        config = DuQConfig.from_dict(state["config"]) if state.get("config") is not None else None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration in the quantization state is damaged: {error}") from error
    swaps: dict[nn.Module, nn.Module] = {}
    for order, (name, values) in enumerate(state["layers"].items()):
        source = _find(model, name, values)
        try:
            layer = _build(name, source, values)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, ConversionError) as error:
            raise CheckpointError(f"quantization state of layer {name!r} is damaged: {error}") from error
        layer.order, layer.config = order, config
        swaps[source] = layer
        producer = None
        if layer.fused_from:
            producer = _submodule(model, layer.fused_from)
            if any(True for _ in producer.parameters()):
                raise CheckpointError(
                    f"quantization state of layer {name!r} is damaged: {layer.fused_from!r} is no activation"
                )
            swaps[producer] = nn.Identity().train(producer.training)
        # Absent in states written before there were blocks.
        norm_name = values.get("norm", "")
        if norm_name:
            norm = _submodule(model, norm_name)
            if not can_defer(norm, producer):
                raise CheckpointError(f"quantization state of layer {name!r} is damaged: {norm_name!r} is no BatchNorm2d")
            swaps[norm] = DeferredBatchNorm(norm)
            layer.set_norm(swaps[norm], norm_name)
    swap_modules(model, swaps)
    if state.get("fuse", False):
        swap_modules(model, stand_ins(model))
    return layer_table(model)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except (AttributeError, TypeError):
        raise CheckpointError(
            f"the model has no module {name!r}: the quantization state is of another architecture"
        ) from None


def _find(model: nn.Module, name: str, values: Any) -> nn.Module:
    source = _submodule(model, name)
    expected = values.get("type") if isinstance(values, Mapping) else None
    if not isinstance(source, {"conv": nn.Conv2d, "linear": nn.Linear}.get(expected, ())):
        raise CheckpointError(f"module {name!r} is a {type(source).__name__}, the quantization state says {expected!r}")
    return source


def _build(name: str, source: nn.Module, values: Mapping[str, Any]) -> QuantLayer:
    config = DuQConfig(
        weight_bits=None, act_bits=None, padding="zero", quantizer=values["quantizer"],
        weight_granularity=values["weight_granularity"],
    )  # fmt: skip
    cls = QuantConv2d if isinstance(source, nn.Conv2d) else QuantLinear
    layer = cls.from_float(
        source, config, kind=values["kind"], offset=float(values["offset"]), activation=values["activation"], name=name,
        ranked=bool(values["ranked"]),
    )  # fmt: skip
    if isinstance(layer, QuantConv2d):
        layer.pad_value = float(values["pad_value"])
    layer.own_bits = {side: check_bits(bits, side) for side, bits in values["own_bits"].items()}
    layer.fused_from, layer.batch_norm, layer.macs = values["fused_from"], values["batch_norm"], int(values["macs"])
    # Set directly: the intervals come with the state_dict, not from the weights as they are now.
    layer.weight_quantizer.bits = check_bits(values["weight_bits"], "weight_bits")
    layer.input_quantizer.bits = check_bits(values["act_bits"], "act_bits")
    return layer
