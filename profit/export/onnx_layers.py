"""Layers in ONNX: the exact form, and the one that onnxruntime runs with integer kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .bits import pack
from .network import INT32_MAX, ActivationCodes, Layer, Network, Step
from .onnx_operators import Graph, bound, clip, hardswish, pad
from .pairs import has_signed_weights, stored

_FIRST_OPSET = {4: 21, 2: 25}  # of the types narrower than a byte
# How far from a rounding edge, in steps, float32 sums may move a value. Measured: below 2e-6 at 4 bits (docs/export.md); at
# 8 bits a step is 17 times smaller.
FLOAT32_STEPS = 1e-3
# A layer keeps float sums where a bias rounded to integers could move the next codes' values further than this, in steps.
MAX_BIAS_STEPS = 0.05
# Of unsigned weights in the file; QLinearConv wants the same one for all channels.
WEIGHT_ZERO = 128


def container(bits: int, opset: int) -> int:
    """Width of the narrowest ONNX type that holds codes of `bits` bits."""
    return next((width for width in (2, 4) if bits <= width and opset >= _FIRST_OPSET[width]), 8)


class ExactLayers:
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
            # Clipping to both ranges at once, behind the shift: their lower ends are met by max, their upper ones by min.
            low = max(low, 0.0 - q.offset)
            high = min(high, 6.0 - q.offset) if layer.activation == "relu6" else high
        if q.offset:
            x = graph.add("Sub", [x, graph.constant(f"{run}/offset", q.offset)], f"{run}/shifted")
        saturates = high == q.interval and self.saturates(q)  # at the upper end; the lower may be one code off
        x = bound(graph, x, low, None if saturates else high, f"{run}/clipped")
        return self.dequantize(self.quantize(x, f"{run}/codes", run, q), run, layer)

    def saturates(self, q: ActivationCodes) -> bool:
        """Whether the largest code is that of its type."""
        return q.bits == self.width(q.bits)

    def zero(self, run: str, q: ActivationCodes) -> str:
        """What stands for code 0, in the type of the codes."""
        return self.graph.typed(f"{run}/zero", f"{'INT' if q.signed else 'UINT'}{self.width(q.bits)}", [], b"\0")

    def quantize(self, x: str, output: str, run: str, q: ActivationCodes) -> str:
        """Codes as `output`: rounded half to even and saturated."""
        scale = self.graph.constant(f"{run}/A", q.interval / q.steps)
        return self.graph.add("QuantizeLinear", [x, scale, self.zero(run, q)], output)

    def dequantize(self, codes: str, run: str, layer: Layer) -> str:
        """C/s times the codes; plus d where the border is real 0 (padding="zero")."""
        graph, q = self.graph, layer.codes
        x = graph.add("DequantizeLinear", [codes, graph.constant(f"{run}/C", q.step), f"{run}/zero"], f"{run}/values")
        if layer.real_zero_border:
            x = graph.add("Add", [x, graph.constant(f"{run}/offset", q.offset)], f"{run}/unshifted")
        return x

    def weight(self, layer: Layer) -> str:
        """[C_out, ...] floats: per-channel scale times codes (typed as narrowly as the opset can), or plain floats."""
        if layer.weight_bits is None:
            return self.float_weight(layer)
        codes, scale = positive_scales(layer.weight, input_free_scale(layer))
        return self.typed_weight(layer, codes, scale)

    def float_weight(self, layer: Layer) -> str:
        """Plain floats in the file, shaped as :meth:`typed_weight` gives them."""
        weight = layer.weight.double() * _along_channels(input_free_scale(layer), layer.weight)
        return self.graph.constant(f"{layer.name}/weight", weight if layer.type == "conv" else weight.T)

    def typed_weight(self, layer: Layer, codes: Tensor, scale: Tensor) -> str:
        """Codes in the file, dequantized per output channel: dimension 0, or 1 of a linear layer's [C_in, C_out]."""
        graph, name = self.graph, f"{layer.name}/weight"
        if f"{name}/scale" not in graph.initializers:  # else the layer runs a second time
            codes = codes if layer.type == "conv" else codes.T
            inputs = [self.weight_codes(layer, codes), graph.constant(f"{name}/scale", scale), *self.weight_zero(layer)]
            graph.add("DequantizeLinear", inputs, name, axis=0 if layer.type == "conv" else 1)
        return name

    def weight_codes(self, layer: Layer, codes: Tensor) -> str:
        width = self.width(layer.weight_bits)
        data = pack(codes, width).numpy().tobytes()
        return self.graph.typed(f"{layer.name}/weight/codes", f"INT{width}", list(codes.shape), data)

    def weight_zero(self, layer: Layer) -> list[str]:
        """What stands for weight code 0 in each channel; nothing where it is 0."""
        return []

    def bias(self, layer: Layer) -> str:
        return self.graph.constant(f"{layer.name}/bias", layer.bias)

    def product(self, step: Step, run: str, layer: Layer, x: str, weight: str, bias: str) -> None:
        """Conv, or MatMul and Add."""
        graph = self.graph
        if layer.type == "linear":
            graph.add("Add", [graph.add("MatMul", [x, weight], f"{run}/product"), bias], step.output)
            return
        left, right, top, bottom = layer.pads
        if layer.pad_value and any(layer.pads):
            x = pad(graph, x, list(layer.pads), layer.pad_value, 4, f"{run}/padded")
            left = right = top = bottom = 0
        graph.add("Conv", [x, weight, bias], step.output, strides=layer.stride, pads=[top, left, bottom, right],
                  dilations=layer.dilation, group=layer.groups)  # fmt: skip


class IntegerLayers(ExactLayers):
    """The form in 8-bit containers that onnxruntime turns into QLinearConv and MatMulIntegerToFloat.

    It does so for DequantizeLinear -> Conv -> QuantizeLinear with nothing in between. So ReLU and ReLU6 are left to the
    clipping of the codes behind QuantizeLinear (all three are monotone, so their order does not matter), and a convolution
    whose output goes anywhere else than into one quantizer stays float, with its weights dequantized in the file.

    QLinearConv takes its bias as a whole number of `sx * sw`. Weight codes are therefore multiplied by the largest whole
    number that keeps them within 8 bits, and sw divided by it: 18 for 4-bit codes, so that the bias is 18 times finer.

    The file is right on every x86 processor (:mod:`profit.export.pairs`). Input codes are unsigned, the smallest being 0:
    onnxruntime would turn signed ones into unsigned ones around 128, which are larger. Weights are signed, which is
    fastest, behind inputs of up to 7 bits, and unsigned behind 8 bits, where pairs of products could saturate.
    """

    def __init__(self, graph: Graph, network: Network) -> None:
        super().__init__(graph, network)
        self.readers: dict[str, list[Step]] = {}
        for step in network.steps:
            for name in step.inputs:
                self.readers.setdefault(str(name), []).append(step)
        self.refinement: dict[str, Tensor] = {}  # of the layers that are integer
        self.integer_sums: set[str] = set()

    def width(self, bits: int) -> int:
        return 8

    def saturates(self, q: ActivationCodes) -> bool:
        return stored(q.steps, q) == 255

    def zero(self, run: str, q: ActivationCodes) -> str:
        return self.graph.constant(f"{run}/zero", stored(0, q), np.uint8)

    def add(self, step: Step, run: str, layer: Layer) -> None:
        reason = self.why_float(step, run, layer)
        if reason is not None:
            self.float_layers[layer.name] = reason
        elif layer.type == "conv":
            self.refinement[layer.name] = bias_refinement(layer)
            self.integer_sums.add(step.output)
        super().add(step, run, layer)

    def why_float(self, step: Step, run: str, layer: Layer) -> str | None:
        """Why this layer's sums are not integers here; None where they are."""
        if not layer.is_integer:
            return f"its {'input' if layer.codes is None else 'weight'} is not quantized"
        if layer.type == "linear":
            return None
        if sum(other is layer for _, _, other in self.network.layer_runs()) > 1:
            return "it runs more than once"
        if layer.real_zero_border:
            return "its border is real 0, which is no code (padding='zero')"
        if bias_refinement(layer).min() < 1:
            return "its bias does not fit into 32-bit integers of its scale"
        readers = self.readers.get(step.output, [])
        if len(readers) != 1 or readers[0].op != "layer":
            return f"its sum goes into {' and '.join(r.settings.get('layer', r.op) for r in readers) or 'the output'}"
        reader = self.network.layers[readers[0].settings["layer"]]
        if reader.codes is None:
            return f"its sum goes into {reader.name}, whose input is not quantized"
        if _only_clips(reader):
            steps = rounded_bias_steps(layer, reader)
            return None if steps <= MAX_BIAS_STEPS else f"its rounded bias could move the next codes by {steps:.2f} steps"
        return f"{'an offset' if reader.activation == 'none' else reader.activation} stands before the next quantizer"

    def input(self, x: str, run: str, layer: Layer) -> str:
        if x not in self.integer_sums or layer.codes is None:
            return super().input(x, run, layer)
        graph, q = self.graph, layer.codes
        high = q.steps
        if layer.activation == "relu6":
            high = min(high, int(np.rint(np.float32(6.0) / np.float32(q.interval / q.steps))))
        if stored(high, q) == 255:
            return self.dequantize(self.quantize(x, f"{run}/codes", run, q), run, layer)
        codes = self.quantize(x, f"{run}/wide", run, q)
        ends = [graph.constant(f"{run}/{n}", stored(v, q), np.uint8) for n, v in (("low", q.low), ("high", high))]
        return self.dequantize(graph.add("Clip", [codes, *ends], f"{run}/codes"), run, layer)

    def weight(self, layer: Layer) -> str:
        if layer.name in self.float_layers:
            return self.float_weight(layer)
        codes, scale = positive_scales(layer.weight, input_free_scale(layer))
        if layer.type == "conv":
            finer = self.refinement[layer.name]
            codes, scale = (codes.long() * _along_channels(finer, codes)).to(torch.int8), scale / finer
        return self.typed_weight(layer, codes, scale)

    def weight_codes(self, layer: Layer, codes: Tensor) -> str:
        if has_signed_weights(layer):
            return super().weight_codes(layer, codes)
        return self.graph.constant(f"{layer.name}/weight/codes", codes.short() + WEIGHT_ZERO, np.uint8)

    def weight_zero(self, layer: Layer) -> list[str]:
        if has_signed_weights(layer):
            return []
        return [self.graph.constant(f"{layer.name}/weight/zero", np.full(len(layer.weight), WEIGHT_ZERO), np.uint8)]

    def bias(self, layer: Layer) -> str:
        if layer.name not in self.refinement:
            return super().bias(layer)
        graph, name = self.graph, f"{layer.name}/bias"
        # The product of the two scales as onnxruntime forms it, in float32.
        scale = self.onnx_array(f"{layer.name}/weight/scale")
        unit = np.float32(layer.codes.step) * scale
        whole = graph.constant(f"{name}/codes", np.round(layer.bias.numpy() / unit), np.int32)
        return graph.add("DequantizeLinear", [whole, graph.constant(f"{name}/scale", unit)], name, axis=0)

    def product(self, step: Step, run: str, layer: Layer, x: str, weight: str, bias: str) -> None:
        if layer.type == "conv":
            super().product(step, run, layer, x, weight, bias)
            return
        # Not Add: onnxruntime would make a float Gemm of it and of MatMul, and no MatMulIntegerToFloat.
        product = self.graph.add("MatMul", [x, weight], f"{run}/product")
        self.graph.add("Sub", [product, self.graph.constant(bias, -layer.bias)], step.output)

    def onnx_array(self, name: str) -> np.ndarray:
        return self.graph.onnx.numpy_helper.to_array(self.graph.initializers[name])


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


def rounded_bias_steps(layer: Layer, reader: Layer) -> float:
    """How far, in steps of the codes of `reader`, rounding the bias of `layer` to integers may move a value."""
    unit = (layer.multiplier.abs() / bias_refinement(layer).clamp(min=1)).max().item()
    return 0.5 * unit * reader.codes.steps / reader.codes.interval


def bias_rounding(network: Network) -> dict[str, float]:
    """By run of a layer: how far, in steps of its codes, the integer variant may move its input, float32 included."""
    producers = {step.output: layer for _, step, layer in network.layer_runs() if layer.is_integer and layer.type == "conv"}
    moved = {}
    for run, step, reader in network.layer_runs():
        producer = producers.get(step.inputs[0])
        if producer is not None and reader.codes is not None:
            steps = rounded_bias_steps(producer, reader)
            moved[run] = FLOAT32_STEPS + (steps if steps <= MAX_BIAS_STEPS else 0.0)
    return moved


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
