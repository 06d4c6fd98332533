"""ONNX files of standard operators: QuantizeLinear by A/s, DequantizeLinear by C/s, and a convolution between floats.

    x -> act -> Sub d -> Clip -> QuantizeLinear(A/s) -> DequantizeLinear(C/s) -> Conv(DequantizeLinear(codes), bias) -> y

The scale of a weight is per output channel, `Cw/s_w * g`, where g is the BatchNorm's factor: the codes are not touched by
the folding. Negative padding is the convolution's own zero padding (of `y - d`, which is 0 at code 0), with d in the bias.

`integer=True` writes the variant that onnxruntime runs with integer kernels: see :class:`_IntegerLayers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ExportError
from .bits import pack
from .network import INT32_MAX, ActivationCodes, Layer, Network, Step
from .onnx_operators import TRANSLATIONS, Graph, bound, clip, hardswish, pad
from .trace import trace_network

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 13, 25, 21
_FIRST_OPSET = {4: 21, 2: 25}  # of the types narrower than a byte


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

    Args:
        model: converted and calibrated; it is not changed.
        path: replaced whole, or not at all.
        example_inputs: images [N, C, H, W] (or a tuple of one such tensor) of the size the network is for.
        opset: 13 to 25. INT4 weights and activations from 21, 2-bit ones from 25, 8-bit containers otherwise.
        integer: the variant in 8-bit containers whose convolutions onnxruntime runs as QLinearConv; their biases are
            rounded to integers, so codes may differ where they lie that close to a rounding edge (docs/export.md).

    Raises:
        ExportError: the model, or one named layer or operator of it, cannot be exported; an unsupported opset; onnx is
            missing. ProfitError: the file cannot be written.
    """
    from ..train.files import write_atomic

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
    layers = _IntegerLayers(graph, network) if integer else _Layers(graph, network)
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
    if isinstance(opset, bool) or not isinstance(opset, int) or not MIN_OPSET <= opset <= MAX_OPSET:
        raise ExportError(
            f"ONNX opset {opset} is not supported: choose {MIN_OPSET} to {MAX_OPSET} (21 and later have 4-bit types, 25 2-bit ones)"
        )


def container(bits: int, opset: int) -> int:
    """Width of the narrowest ONNX type that holds codes of `bits` bits."""
    return next((width for width in (2, 4) if bits <= width and opset >= _FIRST_OPSET[width]), 8)


class _Layers:
    """The exact form: narrow types, convolutions between floats."""

    def __init__(self, graph: Graph, network: Network) -> None:
        self.graph, self.network = graph, network
        self.float_layers: dict[str, str] = {}

    def add(self, step: Step, run: str, layer: Layer) -> None:
        """The nodes of one layer; the last one computes `step.output`."""
        x = self.input(step.inputs[0], run, layer)
        self.product(step, run, layer, x, self.weight(layer), self.bias(layer))

    def width(self, bits: int) -> int:
        """Width of the type that holds codes of `bits` bits."""
        return container(bits, self.graph.opset)

    def input(self, x: str, run: str, layer: Layer) -> str:
        """What the convolution reads: `y - d` of the formulas, or the activation of x where that is not quantized."""
        graph, q = self.graph, layer.codes
        if q is None:
            return _activate(graph, x, layer.activation, f"{run}/act")
        low, high = -q.interval if q.signed else 0.0, q.interval
        if layer.activation == "hardswish":
            x = hardswish(graph, x, f"{run}/act")
        elif layer.activation in ("relu", "relu6"):
            # Clipping to both ranges at once: their lower ends are met by max, their upper ones by min.
            low, high = max(low, 0.0), min(high, 6.0) if layer.activation == "relu6" else high
        if q.offset:
            x = graph.add("Sub", [x, graph.constant(f"{run}/offset", q.offset)], f"{run}/shifted")
        saturates = high == q.interval and q.bits == self.width(q.bits)  # at the upper end; the lower may be one code off
        x = bound(graph, x, low, None if saturates else high, f"{run}/clipped")
        return self.dequantize(self.quantize(x, f"{run}/codes", run, q), run, layer)

    def quantize(self, x: str, output: str, run: str, q: ActivationCodes) -> str:
        """Codes as `output`: rounded half to even and saturated."""
        scale = self.graph.constant(f"{run}/A", q.interval / q.steps)
        zero = self.graph.typed(f"{run}/zero", f"{'INT' if q.signed else 'UINT'}{self.width(q.bits)}", [], b"\0")
        return self.graph.add("QuantizeLinear", [x, scale, zero], output)

    def dequantize(self, codes: str, run: str, layer: Layer) -> str:
        """C/s times the codes; plus d where the border is real 0 (padding="zero")."""
        graph, q = self.graph, layer.codes
        x = graph.add("DequantizeLinear", [codes, graph.constant(f"{run}/C", q.step), f"{run}/zero"], f"{run}/values")
        if layer.real_zero_border:
            x = graph.add("Add", [x, graph.constant(f"{run}/offset", q.offset)], f"{run}/unshifted")
        return x

    def weight(self, layer: Layer) -> str:
        """[C_out, ...] floats: per-channel scale times codes (typed as narrowly as the opset can), or plain floats."""
        graph, name = self.graph, f"{layer.name}/weight"
        scale = input_free_scale(layer)
        if layer.weight_bits is None:
            return graph.constant(name, layer.weight.double() * _along_channels(scale, layer.weight))
        codes, scale = positive_scales(layer.weight, scale)
        width = container(layer.weight_bits, graph.opset)
        data = pack(codes, width).numpy().tobytes()
        typed = graph.typed(f"{name}/codes", f"INT{width}", list(codes.shape), data)
        scales = graph.constant(f"{name}/scale", scale)
        if name not in {node.name for node in graph.nodes}:
            graph.add("DequantizeLinear", [typed, scales], name, axis=0)
        return name

    def bias(self, layer: Layer) -> str:
        return self.graph.constant(f"{layer.name}/bias", layer.bias)

    def product(self, step: Step, run: str, layer: Layer, x: str, weight: str, bias: str) -> None:
        """Conv, Gemm or MatMul."""
        graph = self.graph
        if layer.type == "conv":
            left, right, top, bottom = layer.pads
            if layer.pad_value and any(layer.pads):
                x = pad(graph, x, list(layer.pads), layer.pad_value, 4, f"{run}/padded")
                left = right = top = bottom = 0
            graph.add("Conv", [x, weight, bias], step.output, strides=layer.stride, pads=[top, left, bottom, right],
                      dilations=layer.dilation, group=layer.groups)  # fmt: skip
        elif len(step.shape) == 2:
            graph.add("Gemm", [x, weight, bias], step.output, transB=1)
        else:
            turned = graph.add("Transpose", [weight], f"{run}/turned", perm=[1, 0])
            graph.add("Add", [graph.add("MatMul", [x, turned], f"{run}/product"), bias], step.output)


class _IntegerLayers(_Layers):
    """The form in 8-bit containers that onnxruntime turns into QLinearConv and QGemm.

    It does so for DequantizeLinear -> Conv -> QuantizeLinear with nothing in between. So ReLU and ReLU6 are left to the
    clipping of the codes behind QuantizeLinear (all three are monotone, so their order does not matter), and a convolution
    whose output goes anywhere else than into one quantizer stays float, with its weights dequantized in the file.

    QLinearConv takes its bias as a whole number of `sx * sw`. Weight codes are therefore multiplied by the largest whole
    number that keeps them within 8 bits, and sw divided by it: 18 for 4-bit codes, so that the bias is 18 times finer.
    """

    def __init__(self, graph: Graph, network: Network) -> None:
        super().__init__(graph, network)
        readers = network.reader_counts()
        self.reader = {
            step.inputs[0]: layer for _, step, layer in network.layer_runs() if readers[step.inputs[0]] == 1 and layer.codes
        }
        self.refinement: dict[str, Tensor] = {}  # of the layers that are integer
        self.integer_sums: set[str] = set()

    def width(self, bits: int) -> int:
        return 8

    def add(self, step: Step, run: str, layer: Layer) -> None:
        reason = self.why_float(step, run, layer)
        if reason is None:
            self.refinement[layer.name] = bias_refinement(layer)
            self.integer_sums.add(step.output)
        else:
            self.float_layers[layer.name] = reason
        super().add(step, run, layer)

    def why_float(self, step: Step, run: str, layer: Layer) -> str | None:
        """Why this layer's sums are not integers here; None where they are."""
        if not layer.is_integer:
            return f"its {'input' if layer.codes is None else 'weight'} is not quantized"
        if sum(other is layer for _, _, other in self.network.layer_runs()) > 1:
            return "it runs more than once"
        if layer.real_zero_border:
            return "its border is real 0, which is no code (padding='zero')"
        if bias_refinement(layer).min() < 1:
            return "its bias does not fit into 32-bit integers of its scale"
        if layer.type == "linear":
            return None if len(step.shape) == 2 else "its input is not [N, features]"
        reader = self.reader.get(step.output)
        if reader is None:
            return "its output is read by something else than one quantizer"
        return None if _only_clips(reader) else f"{reader.activation if reader.activation != 'none' else 'a shift'} follows it"

    def input(self, x: str, run: str, layer: Layer) -> str:
        if x not in self.integer_sums or layer.codes is None:
            return super().input(x, run, layer)
        graph, q = self.graph, layer.codes
        low, high = q.low, q.steps
        if layer.activation == "relu6":
            high = min(high, int(np.rint(np.float32(6.0) / np.float32(q.interval / q.steps))))
        if (low, high) == (0, 255):
            return self.dequantize(self.quantize(x, f"{run}/codes", run, q), run, layer)
        codes = self.quantize(x, f"{run}/wide", run, q)
        ends = [graph.constant(f"{run}/{n}", v, np.int8 if q.signed else np.uint8) for n, v in (("low", low), ("high", high))]
        return self.dequantize(graph.add("Clip", [codes, *ends], f"{run}/codes"), run, layer)

    def weight(self, layer: Layer) -> str:
        graph, name = self.graph, f"{layer.name}/weight"
        scale = input_free_scale(layer)
        if layer.name not in self.refinement:
            return graph.constant(name, layer.weight.double() * _along_channels(scale, layer.weight))
        codes, scale = positive_scales(layer.weight, scale)
        finer = self.refinement[layer.name]
        codes = (codes.long() * _along_channels(finer, codes)).to(torch.int8)
        typed = graph.typed(f"{name}/codes", "INT8", list(codes.shape), codes.numpy().tobytes())
        self.scale = scale / finer
        return graph.add("DequantizeLinear", [typed, graph.constant(f"{name}/scale", self.scale)], name, axis=0)

    def bias(self, layer: Layer) -> str:
        if layer.name not in self.refinement:
            return super().bias(layer)
        graph, name = self.graph, f"{layer.name}/bias"
        # The product of the two scales as onnxruntime forms it, in float32.
        unit = np.float32(layer.codes.step) * self.scale.numpy().astype(np.float32)
        whole = graph.constant(f"{name}/codes", np.round(layer.bias.numpy() / unit), np.int32)
        return graph.add("DequantizeLinear", [whole, graph.constant(f"{name}/scale", unit)], name, axis=0)


def _only_clips(layer: Layer) -> bool:
    """Whether a layer's activation and quantizer are nothing but rounding and clipping, in any order."""
    q = layer.codes
    return not q.offset and (layer.activation == "none" or (layer.activation in ("relu", "relu6") and not q.signed))


def bias_refinement(layer: Layer) -> Tensor:
    """int64 [C_out]: by what whole number weight codes may be multiplied within 8 bits and with 32-bit sums; 0 where the
    bias alone exceeds them."""
    largest = layer.weight.long().abs().flatten(1).amax(1).clamp(min=1)
    room = 127 // largest
    sums = layer.weight.long().abs().flatten(1).sum(1) * layer.codes.steps
    unit = layer.multiplier.abs()
    bias = torch.where(unit > 0, (layer.bias.abs() / unit).ceil(), 0.0)
    limit = torch.floor(INT32_MAX / 2 / (sums + bias).clamp(min=1)).long()
    return torch.minimum(room, limit)


def input_free_scale(layer: Layer) -> Tensor:
    """float64 [C_out]: the multiplier without the step of the input's codes, which DequantizeLinear brings."""
    return layer.multiplier / (1.0 if layer.codes is None else layer.codes.step)


def positive_scales(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the same product with every scale above 0, as quantized operators expect; the range of the
    codes is symmetric, so a sign can move over. A channel of scale 0 becomes codes 0."""
    sign = torch.where(scale < 0, -1, 1) * (scale != 0)
    return (codes * _along_channels(sign, codes)).to(torch.int8), torch.where(scale == 0, 1.0, scale.abs())


def _along_channels(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *[1] * (weight.dim() - 1))


def _activate(graph: Graph, x: str, activation: str, output: str) -> str:
    if activation == "none":
        return x
    if activation == "hardswish":
        return hardswish(graph, x, output)
    return clip(graph, x, 0.0, 6.0 if activation == "relu6" else None, output)
