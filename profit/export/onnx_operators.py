"""The operators between the layers in ONNX: `TRANSLATIONS[op](graph, step)` adds the nodes that compute `step.output`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import missing_extra
from .network import Step


def require(package: str) -> Any:
    """Import `onnx` or `onnxruntime`.

    Raises:
        ExportError: it is not installed; the message names the extra that brings it.
    """
    import importlib

    from ..errors import ExportError

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        raise ExportError(message) from None


class Graph:
    """Nodes and initializers of an ONNX graph under construction."""

    def __init__(self, opset: int) -> None:
        self.onnx = require("onnx")
        self.opset = opset
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append a node that computes `output`; the node is named after it."""
        self.nodes.append(self.onnx.helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        """An initializer."""
        if isinstance(value, Tensor):
            value = value.numpy()
        self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(value, dtype=dtype), name)
        return name

    def typed(self, name: str, type_name: str, shape: list[int], data: bytes) -> str:
        """An initializer of an ONNX type such as "INT4", from its raw bytes."""
        kind = getattr(self.onnx.TensorProto, type_name)
        self.initializers[name] = self.onnx.helper.make_tensor(name, kind, shape, data, raw=True)
        return name

    def operand(self, step: Step, index: int) -> str:
        """The name of a step's input; a number becomes an initializer."""
        value = step.inputs[index]
        return value if isinstance(value, str) else self.constant(f"{step.output}/operand{index}", value)


def _simple(op: str, **attributes: Any) -> Callable[[Graph, Step], None]:
    def translate(graph: Graph, step: Step) -> None:
        graph.add(op, [graph.operand(step, i) for i in range(len(step.inputs))], step.output, **attributes)

    return translate


def clip(graph: Graph, x: str, low: float | None, high: float | None, output: str) -> str:
    """Clip to [low, high]; Relu where that is the same."""
    if (low, high) == (0.0, None):
        return graph.add("Relu", [x], output)
    ends = ["" if v is None else graph.constant(f"{output}/{n}", v) for n, v in (("low", low), ("high", high))]
    return graph.add("Clip", [x, *ends], output)


def bound(graph: Graph, x: str, low: float, high: float | None, output: str) -> str:
    """Clip to [low, high] by Max and Min, which onnxruntime leaves alone.

    In front of a QuantizeLinear it fuses Clip and Relu away, fails on a 4-bit one, and takes a convolution that only they
    separate from QuantizeLinear as its own to quantize: it then rounds the bias to whole sums (docs/export.md).
    """
    x = graph.add("Max", [x, graph.constant(f"{output}/low", low)], f"{output}/above" if high is not None else output)
    return x if high is None else graph.add("Min", [x, graph.constant(f"{output}/high", high)], output)


def hardswish(graph: Graph, x: str, output: str) -> str:
    """x * relu6(x + 3) / 6."""
    if graph.opset >= 14:
        return graph.add("HardSwish", [x], output)
    gate = graph.add("HardSigmoid", [x], f"{output}/gate", alpha=1.0 / 6.0, beta=0.5)
    return graph.add("Mul", [x, gate], output)


def _clip(graph: Graph, step: Step) -> None:
    clip(graph, graph.operand(step, 0), step.settings["low"], step.settings["high"], step.output)


def _hardswish(graph: Graph, step: Step) -> None:
    hardswish(graph, graph.operand(step, 0), step.output)


def _silu(graph: Graph, step: Step) -> None:
    x = graph.operand(step, 0)
    graph.add("Mul", [x, graph.add("Sigmoid", [x], f"{step.output}/gate")], step.output)


def _gelu(graph: Graph, step: Step) -> None:
    x, out = graph.operand(step, 0), step.output
    if graph.opset >= 20:
        graph.add("Gelu", [x], out, approximate=step.settings["approximate"])
        return
    one = graph.constant(f"{out}/one", 1.0)
    if step.settings["approximate"] == "tanh":
        cube = graph.add("Pow", [x, graph.constant(f"{out}/three", 3.0)], f"{out}/cube")
        scaled = graph.add("Mul", [cube, graph.constant(f"{out}/cubic", 0.044715)], f"{out}/scaled")
        inner = graph.add("Add", [x, scaled], f"{out}/inner")
        bent = graph.add("Mul", [inner, graph.constant(f"{out}/root", (2.0 / np.pi) ** 0.5)], f"{out}/bent")
        curve = graph.add("Tanh", [bent], f"{out}/curve")
    else:
        bent = graph.add("Mul", [x, graph.constant(f"{out}/root", 0.5**0.5)], f"{out}/bent")
        curve = graph.add("Erf", [bent], f"{out}/curve")
    doubled = graph.add("Add", [curve, one], f"{out}/doubled")
    gate = graph.add("Mul", [doubled, graph.constant(f"{out}/half", 0.5)], f"{out}/gate")
    graph.add("Mul", [x, gate], out)


def _affine(graph: Graph, step: Step) -> None:
    x, scale, shift = step.inputs
    shape = graph.constant(f"{step.output}/channels", [1, -1] + [1] * (len(step.shape) - 2), np.int64)
    scale, shift = (graph.add("Reshape", [c, shape], f"{step.output}/{n}") for n, c in (("scale", scale), ("shift", shift)))
    graph.add("Add", [graph.add("Mul", [x, scale], f"{step.output}/scaled"), shift], step.output)


def _mean(graph: Graph, step: Step) -> None:
    dims, keepdim = step.settings["dims"], step.settings["keepdim"]
    x = graph.operand(step, 0)
    if dims == [2, 3] and keepdim:
        graph.add("GlobalAveragePool", [x], step.output)
    elif graph.opset >= 18:
        axes = graph.constant(f"{step.output}/axes", dims, np.int64)
        graph.add("ReduceMean", [x, axes], step.output, keepdims=int(keepdim))
    else:
        graph.add("ReduceMean", [x], step.output, axes=dims, keepdims=int(keepdim))


def _pool_attributes(settings: dict[str, Any]) -> dict[str, Any]:
    return {"kernel_shape": settings["kernel"], "strides": settings["stride"], "pads": settings["padding"] * 2,
            "ceil_mode": int(settings["ceil_mode"])}  # fmt: skip


def _avg_pool(graph: Graph, step: Step) -> None:
    attributes = _pool_attributes(step.settings)
    attributes["count_include_pad"] = int(step.settings["count_include_pad"])
    graph.add("AveragePool", [graph.operand(step, 0)], step.output, **attributes)


def _max_pool(graph: Graph, step: Step) -> None:
    attributes = _pool_attributes(step.settings)
    graph.add("MaxPool", [graph.operand(step, 0)], step.output, dilations=step.settings["dilation"], **attributes)


def pad(graph: Graph, x: str, pads: list[int], value: float, rank: int, output: str) -> str:
    """torch's pads, last dimension first, in ONNX's order: all begins, then all ends."""
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)][::-1]
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs
    order = [begin for begin, _ in pairs] + [end for _, end in pairs]
    names = [graph.constant(f"{output}/pads", order, np.int64), graph.constant(f"{output}/value", value)]
    return graph.add("Pad", [x, *names], output)


def _pad(graph: Graph, step: Step) -> None:
    pad(graph, graph.operand(step, 0), step.settings["pads"], step.settings["value"], len(step.shape), step.output)


def _reshape(graph: Graph, step: Step) -> None:
    shape = graph.constant(f"{step.output}/shape", step.settings["shape"], np.int64)
    graph.add("Reshape", [graph.operand(step, 0), shape], step.output)


def _permute(graph: Graph, step: Step) -> None:
    graph.add("Transpose", [graph.operand(step, 0)], step.output, perm=step.settings["dims"])


def _cat(graph: Graph, step: Step) -> None:
    graph.add("Concat", [graph.operand(step, i) for i in range(len(step.inputs))], step.output, axis=step.settings["dim"])


def _slice(graph: Graph, step: Step) -> None:
    s, out = step.settings, step.output
    values = (("start", s["start"]), ("stop", s["stop"]), ("dim", s["dim"]), ("step", s["step"]))
    graph.add("Slice", [graph.operand(step, 0), *(graph.constant(f"{out}/{n}", [v], np.int64) for n, v in values)], out)


def _softmax(graph: Graph, step: Step) -> None:
    graph.add("Softmax", [graph.operand(step, 0)], step.output, axis=step.settings["dim"])


def _leaky_relu(graph: Graph, step: Step) -> None:
    graph.add("LeakyRelu", [graph.operand(step, 0)], step.output, alpha=step.settings["slope"])


TRANSLATIONS: dict[str, Callable[[Graph, Step], None]] = {
    "add": _simple("Add"), "sub": _simple("Sub"), "mul": _simple("Mul"), "div": _simple("Div"),
    "relu": _simple("Relu"), "clip": _clip, "hardswish": _hardswish, "sigmoid": _simple("Sigmoid"),
    "hardsigmoid": _simple("HardSigmoid", alpha=1.0 / 6.0, beta=0.5), "silu": _silu, "gelu": _gelu, "tanh": _simple("Tanh"),
    "leaky_relu": _leaky_relu, "softmax": _softmax, "affine": _affine, "mean": _mean, "avg_pool": _avg_pool,
    "max_pool": _max_pool, "pad": _pad, "reshape": _reshape, "permute": _permute, "cat": _cat, "slice": _slice,
}  # fmt: skip
