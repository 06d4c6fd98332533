"""ONNX files of standard operators: QuantizeLinear by A/s, DequantizeLinear by C/s, and a convolution between floats.

    x -> act -> Sub d -> Clip -> QuantizeLinear(A/s) -> DequantizeLinear(C/s) -> Conv(DequantizeLinear(codes), bias) -> y

The scale of a weight is per output channel, `Cw/s_w * g`, where g is the BatchNorm's factor: the codes are not touched by
the folding. Negative padding is the convolution's own zero padding (of `y - d`, which is 0 at code 0), with d in the bias.

`integer=True` writes the variant that onnxruntime runs with integer kernels: see :class:`IntegerLayers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import brief
from ..errors import ExportError
from ..files import write_atomic
from .network import Network
from .onnx_layers import ExactLayers, IntegerLayers
from .onnx_operators import TRANSLATIONS, Graph
from .trace import check_call, trace_network

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 13, 25, 21


@dataclass(frozen=True)
class OnnxSummary:
    """What was written: bytes of the file, and for the integer variant the layers that stay float, with the reason."""

    size: int
    opset: int
    layers: int
    float_layers: dict[str, str]


def export_onnx(
    model: nn.Module, path: str | Path, example_inputs: Any, *, opset: int = DEFAULT_OPSET, integer: bool = False
) -> OnnxSummary:
    """Write a quantized model as ONNX, with a free number of images.

    Usage::

        profit.export_onnx(model, "net.onnx", images)

    Args:
        model: converted and calibrated; it is not changed.
        path: replaced whole, or not at all.
        example_inputs: images [N, C, H, W] (or a tuple of one such tensor) of the size the network is for.
        opset: 13 to 25. INT4 weights and activations from 21, 2-bit ones from 25, 8-bit containers otherwise.
        integer: the variant in 8-bit containers whose convolutions onnxruntime runs as QLinearConv; their biases are
            rounded to integers, so codes may differ where they lie that close to a rounding edge (docs/export.md).

    Raises:
        ExportError: the model, or one named layer or operator of it, cannot be exported; an unsupported opset; onnx is
            missing. ProfitError: the file cannot be written. TypeError: an argument of another type.
    """
    check_call(model, path, "export_onnx")
    _check_opset(opset)
    network = trace_network(model, example_inputs)
    proto, float_layers = build_onnx(network, opset=opset, integer=integer)
    data = proto.SerializeToString()
    write_atomic(path, data)
    return OnnxSummary(len(data), opset, len(network.layers), float_layers)


def build_onnx(network: Network, *, opset: int = DEFAULT_OPSET, integer: bool = False) -> tuple[Any, dict[str, str]]:
    """(onnx.ModelProto, layers that stay float with the reason; empty unless `integer`)."""
    _check_opset(opset)
    graph = Graph(opset)
    layers = IntegerLayers(graph, network) if integer else ExactLayers(graph, network)
    for name, value in network.constants.items():
        graph.constant(name, value)
    runs = {step.output: (run, layer) for run, step, layer in network.layer_runs()}
    for step in network.steps:
        if step.op == "layer":
            layers.add(step, *runs[step.output])
        else:
            TRANSLATIONS[step.op](graph, step)
    onnx = graph.onnx
    images = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", *network.input_shape[1:]])
    shape = next((s.shape for s in network.steps if s.output == network.output), network.input_shape)
    logits = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, ["batch", *shape[1:]])
    graph.add("Identity", [network.output], "output")
    body = onnx.helper.make_graph(graph.nodes, "profit", [images], [logits], list(graph.initializers.values()))
    opsets = [onnx.helper.make_opsetid("", opset)]
    proto = onnx.helper.make_model(body, opset_imports=opsets, producer_name="profit-kernels")
    proto.ir_version = onnx.helper.find_min_ir_version_for(opsets)
    onnx.helper.set_model_props(proto, {"profit.variant": "integer" if integer else "exact"})
    onnx.checker.check_model(proto)
    return proto, layers.float_layers


def _check_opset(opset: int) -> None:
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise TypeError(f"opset must be a whole number, {MIN_OPSET} to {MAX_OPSET}; got {brief(opset)}")
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(
            f"ONNX opset {opset} is not supported: choose {MIN_OPSET} to {MAX_OPSET} "
            "(4-bit types need 21 or later, 2-bit types 25)"
        )
