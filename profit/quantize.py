"""Conversion of a model to quantized layers, and what is done with a converted model: bit widths and the layer table."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection
from dataclasses import replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from .blocks import norm_to_defer, stand_ins, swap_modules
from .checks import brief, check_module
from .config import ACTIVATIONS, DuQConfig, check_bits
from .dataflow import LayerFlow, is_layer, trace
from .dataflow.refusal import leave_out, several
from .errors import CalibrationError, ConversionError
from .nn import DeferredBatchNorm, QuantConv2d, QuantLayer, QuantLinear, weight_batch
from .nn.conv import is_same_padded
from .nn.layer import check_own_parameters
from .nn.linear import check_plain_linear
from .table import LayerTable, make_table

FilterFn = Callable[[nn.Module, str], bool]


class _Unchanged(Enum):
    UNCHANGED = "unchanged"


UNCHANGED = _Unchanged.UNCHANGED


def quantize_(
    model: nn.Module, config: DuQConfig | None = None, example_inputs: Any = None, filter_fn: FilterFn | None = None
) -> LayerTable:
    """Replace every Conv2d and Linear of `model` by its quantized counterpart, in place.

    On a model that was converted with the same `config` this changes nothing and returns its layer table.

    The kind of each layer's input follows from the data flow (:func:`profit.dataflow.trace`). Parameters stay the same
    objects, so an optimizer built before keeps working; their names stay too. After conversion run `calibrate_` (unless
    act_bits is None) before the first forward.

    Args:
        model: in any mode; it may not be a Conv2d or Linear itself.
        config: None means DuQConfig().
        example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments for one forward; a batch of one
            image of the usual size will do.
        filter_fn: `filter_fn(module, name)` is true for the layers to convert; None converts all.

    Returns:
        The layer table, in the order in which the layers run.

    Warns:
        UserWarning: padding="negative" changes what convolutions of an already trained model compute.

    Raises:
        ConversionError: the model, or one named layer, cannot be converted. The model is unchanged then.
        CalibrationError: a layer whose weights are all zero or not finite. The model is unchanged then.
        TypeError: an argument of another type.
    """
    check_module(model)
    if config is not None and not isinstance(config, DuQConfig):
        raise TypeError(f"config must be a DuQConfig, got {brief(config)}; usage: quantize_(model, config, example_inputs)")
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of (module, name), got {brief(filter_fn)}")
    config = asked = DuQConfig() if config is None else config
    left_out = {name for name, module in model.named_modules() if _is_left_out(module, name, config, filter_fn)}
    if _is_converted(model, config, left_out):
        return layer_table(model)
    if example_inputs is None:
        raise TypeError("quantize_ needs example_inputs: one batch for a forward that shows what feeds each layer")
    layers = _layers_to_convert(model, config, left_out)
    settings = {name: config.for_layer(name) for name in layers}
    decided = [name for name, s in settings.items() if s.kind is not None or s.offset is not None]
    flows = trace(model, example_inputs, layers=layers, decided=decided, left_out=left_out)

    config = _with_edge_bits(config, flows)
    swaps: dict[nn.Module, nn.Module] = {}
    for order, flow in enumerate(flows):
        source = layers[flow.name]
        signed = config.input_kinds == "original" and flow.squeeze_excite and flow.kind != "raw"
        producer = _activation_to_fuse(model, config, flow)
        cls = QuantConv2d if isinstance(source, nn.Conv2d) else QuantLinear
        layer = cls.from_float(
            source, config, kind="signed" if signed else flow.kind, offset=0.0 if signed else flow.offset,
            activation="none" if producer is None else flow.activation, name=flow.name,
            ranked=flow.followed_by_bn is not None and isinstance(source, nn.Conv2d),
        )  # fmt: skip
        layer.macs, layer.order, layer.batch_norm = flow.macs, order, flow.followed_by_bn or ""
        layer.config = asked
        swaps[source] = layer
        if producer is not None:
            layer.fused_from = flow.producer
            swaps[producer] = nn.Identity().train(producer.training)
        norm = norm_to_defer(model, config, flow, layer, producer)
        if norm is not None:
            swaps[norm] = DeferredBatchNorm(norm)
            layer.set_norm(swaps[norm], flow.norm)
    _warn_of_padding(model, [layer for layer in swaps.values() if isinstance(layer, QuantConv2d)])
    swap_modules(model, swaps)
    if config.fuse:
        swap_modules(model, stand_ins(model))
    weight_batch.attach(model)
    return layer_table(model)


def _is_left_out(module: nn.Module, name: str, config: DuQConfig, filter_fn: FilterFn | None) -> bool:
    return config.for_layer(name).skip or (filter_fn is not None and not filter_fn(module, name))


def _is_converted(model: nn.Module, config: DuQConfig, left_out: Collection[str]) -> bool:
    """Whether `model` is already what this call would make of it.

    Raises:
        ConversionError: it is converted, but partly, or with another config (the first difference is named).
    """
    layers = quant_layers(model)
    if not layers:
        return False
    advice = "use set_bits for other bit widths, or convert a fresh model"
    for name, layer in layers.items():
        if layer.config != config:
            difference = config.difference(layer.config) if layer.config else "in a way that is not recorded"
            raise ConversionError(f"the model is converted already (layer {name!r}), {difference}; {advice}")
    for name, module in model.named_modules():
        if is_layer(module) and name not in left_out and name not in layers:
            raise ConversionError(f"the model is converted already, but layer {name!r} is not; {advice}")
    return True


def _layers_to_convert(model: nn.Module, config: DuQConfig, left_out: Collection[str]) -> dict[str, nn.Module]:
    """Name -> layer, after every refusal that needs no forward."""
    layers: dict[str, nn.Module] = {}
    other: dict[str, nn.Module] = {}  # convolutions that are no Conv2d
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule":
            raise ConversionError(f"{name or 'the model'} is compiled: convert the model first, then torch.compile it")
        if isinstance(module, torch.jit.ScriptModule) and any(p.dim() > 1 for p in module.parameters()):
            raise ConversionError(
                f"{name or 'the model'} is scripted, so its layers cannot be replaced; build it unscripted"
            )
        if name in left_out:
            continue
        if is_layer(module):
            layers[name] = module
        elif isinstance(module, nn.modules.conv._ConvNd):
            other[name] = module
    if other:
        names, kinds = list(other), [type(module).__name__ for module in other.values()]
        raise ConversionError(f"{several(names, kinds)}: Conv2d and Linear are supported, {kinds[0]} is not; "
                              f"{leave_out(names, kinds, layers)}")  # fmt: skip
    if "" in layers:
        raise ConversionError("the model is a single layer, which cannot be replaced in place: wrap it in nn.Sequential")
    for name, module in layers.items():
        check_own_parameters(module, name)
    odd = [name for name, module in layers.items() if _has_own_forward(module)]
    if odd:
        kinds = [type(layers[name]).__name__ for name in odd]
        base = "Conv2d" if isinstance(layers[odd[0]], nn.Conv2d) else "Linear"
        raise ConversionError(f"{several(odd, kinds)}: a {base} with a forward of its own, which conversion would replace; "
                              f"{leave_out(odd, kinds, [name for name in layers if name not in odd])}")  # fmt: skip
    _check_patterns(model, config)
    if not layers:
        raise ConversionError("the model has no convolution or linear layer to quantize")
    return layers


def _has_own_forward(layer: nn.Module) -> bool:
    try:
        is_same_padded(layer) if isinstance(layer, nn.Conv2d) else check_plain_linear(layer)
    except ConversionError:
        return True
    return False


def _check_patterns(model: nn.Module, config: DuQConfig) -> None:
    """Every override names a layer; one that skips may name any module, for it may hold a weight of its own."""
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))]
    for pattern, settings in config.overrides.items():
        candidates = modules if settings.get("skip") else names
        if not any(pattern == name or fnmatchcase(name, pattern) for name in candidates):
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; the nearest name is {near[0]!r}" if near else ""
            raise ConversionError(f"overrides: no layer is called {pattern!r}{hint}")


def _with_edge_bits(config: DuQConfig, flows: list[LayerFlow]) -> DuQConfig:
    """`first_last_bits` written out as overrides of the image-fed layers (or the first one) and of the last one."""
    if config.first_last_bits is None:
        return config
    edges = [flow.name for flow in flows if flow.kind == "raw"] or [flows[0].name]
    overrides = dict(config.overrides)
    for name in (*edges, flows[-1].name):
        if not config.for_layer(name).own_weight_bits:
            overrides[name] = {**overrides.get(name, {}), "weight_bits": config.first_last_bits}
    return replace(config, overrides=overrides)


def _activation_to_fuse(model: nn.Module, config: DuQConfig, flow: LayerFlow) -> nn.Module | None:
    """The activation module that moves into this layer's quantizer, or None where it has to stay."""
    if not (config.fuse_activations and flow.sole_reader and flow.producer) or flow.activation not in ACTIVATIONS:
        return None
    producer = model.get_submodule(flow.producer)
    has_state = any(True for _ in producer.parameters()) or any(True for _ in producer.buffers())
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is producer]
    return None if has_state or len(names) != 1 else producer


def _warn_of_padding(model: nn.Module, convs: list[QuantConv2d]) -> None:
    """Warn where negative padding changes a network that was trained, told by BatchNorm statistics that moved."""
    padded = [conv for conv in convs if conv.pad_value != 0]
    means = [m.running_mean for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if padded and any(mean is not None and not mean.is_meta and bool(mean.any()) for mean in means):
        warnings.warn(
            f"{len(padded)} convolutions (the first is {padded[0].layer_name!r}) now pad with the lower bound of their input "
            f"({padded[0].pad_value:g}) instead of 0: train in full precision first, or convert with padding='zero'",
            UserWarning,
            stacklevel=3,
        )


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Name -> quantized layer, in the order in which they ran at conversion. Raises TypeError for what is no model."""
    check_module(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, QuantLayer)]
    return dict(sorted(found, key=lambda item: item[1].order))


def layer_table(model: nn.Module) -> LayerTable:
    """The layer table of a converted model as it stands now; empty if nothing is converted.

    Raises:
        TypeError: no model.
    """
    return make_table(quant_layers(model).items())


def set_bits(
    model: nn.Module, weight_bits: int | None | _Unchanged = UNCHANGED, act_bits: int | None | _Unchanged = UNCHANGED
) -> None:
    """Change the bit widths of a converted model; intervals are carried over from the previous width.

    Layers with a width of their own (`overrides`, `first_last_bits`) keep it, except that None (full precision) holds for
    all. The first weight width sets the weight intervals from the weights; activations need `calibrate_` once.

    Args:
        weight_bits, act_bits: 2 to 8, None for full precision; leave out to leave as it is.

    Raises:
        ValueError, TypeError: not a bit width, or no model. ConversionError: nothing is converted. CalibrationError: a
            layer's weights are all zero or not finite; bit widths are as before then.
    """
    for bits, what in ((weight_bits, "weight_bits"), (act_bits, "act_bits")):
        if bits is not UNCHANGED:
            check_bits(bits, what)
    layers = quant_layers(model).values()
    if not layers:
        raise ConversionError("the model has no quantized layer: convert it with quantize_ first")
    before = [(layer, layer.weight_quantizer.bits) for layer in layers]
    try:
        for layer in layers:
            if weight_bits is not UNCHANGED:
                layer.set_weight_bits(weight_bits)
    except CalibrationError:
        for layer, bits in before:
            layer.weight_quantizer.bits = bits
            layer.refresh_cache()
        raise
    for layer in layers:
        if act_bits is not UNCHANGED:
            layer.set_act_bits(act_bits)
