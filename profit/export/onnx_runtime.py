"""Running exported ONNX files under onnxruntime: their output, what it executes, and codes layer by layer."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import first_line
from ..errors import ExportError
from .compare import Codes
from .onnx_operators import require

# All that the exporter writes, and nothing that loops, or makes tensors of any size.
OPERATORS = frozenset(
    "Add AveragePool Clip Concat Conv DequantizeLinear Div Erf Gelu GlobalAveragePool HardSigmoid HardSwish Identity LeakyRelu "
    "MatMul Max MaxPool Min Mul Pad Pow QuantizeLinear ReduceMean Relu Reshape Sigmoid Slice Softmax Sub Tanh Transpose".split()
)


def load_onnx(path: str | Path) -> Any:
    """The onnx.ModelProto of a file.

    Raises:
        ExportError: no such file, not ONNX, or onnx is missing.
    """
    onnx = require("onnx")
    from google.protobuf.message import DecodeError

    path = Path(path)
    if not path.is_file():
        raise ExportError(f"there is no ONNX file {path}")
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        wrong = _foreign(proto)
        if wrong is not None:
            raise ExportError(f"{path} was not written by profit export: {wrong}")
        onnx.checker.check_model(proto)
    except (DecodeError, onnx.checker.ValidationError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{path} is not a readable ONNX file: {first_line(error)}") from None
    return proto


def _foreign(proto: Any) -> str | None:
    """What no exported file holds: parts that open other files, loop without an end, or take memory without a bound."""
    graph = proto.graph
    if proto.functions or graph.sparse_initializer or proto.training_info:
        return "it holds functions, sparse tensors or training"
    for tensor in _tensors(proto):
        if tensor.external_data or tensor.data_location:
            return f"its tensor {tensor.name!r} lies in another file"
    for node in graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            return f"its node {node.name!r} is a {node.domain or 'ONNX'} {node.op_type!r}"
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return f"its node {node.name!r} holds a graph"
    if [value.name for value in graph.input] != ["input"] or [value.name for value in graph.output] != ["output"]:
        return "its input and output are not 'input' and 'output'"
    return None


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto in a protobuf message, at any depth."""
    if message.DESCRIPTOR.full_name == "onnx.TensorProto":
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if isinstance(value, Sequence) else [value]:
                yield from _tensors(inner)


def session(proto: Any, threads: int = 0, optimized: str | None = None, config: dict[str, str] | None = None) -> Any:
    """An onnxruntime.InferenceSession on the CPU.

    Args:
        threads: 0 lets onnxruntime choose.
        optimized: where to write the graph that it will really run.
        config: session configuration entries.

    Raises:
        ExportError: onnxruntime is missing or refuses the model.
    """
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = optimized
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    with _refusals():
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextmanager
def _refusals() -> Iterator[None]:
    """What onnxruntime raises for a model, as ExportError."""
    ort = require("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    raised = (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception))
    try:
        yield
    except (*raised, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(f"onnxruntime {ort.__version__} refuses the model: {first_line(error)}") from None


def run(running: Any, images: Tensor) -> Tensor:
    """The output for float32 images. Raises ExportError where onnxruntime cannot compute it."""
    with _refusals():
        return torch.from_numpy(running.run(["output"], {"input": images.float().numpy()})[0])


def executed(proto: Any) -> Counter[str]:
    """How many nodes of each kind onnxruntime really runs, after its optimizations."""
    onnx = require("onnx")
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimized.onnx")
        session(proto, optimized=path)
        return Counter(node.op_type for node in onnx.load_model(path).graph.node)


def with_given_codes(proto: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
    """A copy of an exported model whose layers read codes that are given, and which returns the codes it would have used.

    Args:
        shapes: shape of each run's codes, the first size being that of the batch.

    Raises:
        ExportError: the model has no quantizer of a name given.
    """
    onnx = require("onnx")
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input}
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1), "given/one"))
    forced, seen = [], []
    for name, shape in shapes.items():
        codes = readers.get(f"{name}/codes")
        if codes is None:
            raise ExportError(f"the ONNX file has no quantizer {name!r}: it was not exported from this network")
        zero = f"{name}/zero"
        given = onnx.helper.make_tensor_value_info(f"{name}/given", onnx.TensorProto.FLOAT, ["batch", *shape[1:]])
        graph.input.append(given)
        graph.output.append(onnx.helper.make_tensor_value_info(f"{name}/seen", onnx.TensorProto.FLOAT, ["batch", *shape[1:]]))
        forced.append(onnx.helper.make_node("QuantizeLinear", [f"{name}/given", "given/one", zero], [f"{name}/forced"]))
        seen.append(onnx.helper.make_node("DequantizeLinear", [f"{name}/codes", "given/one", zero], [f"{name}/seen"]))
        codes.input[0] = f"{name}/forced"
    nodes = [*forced, *graph.node, *seen]
    del graph.node[:]
    graph.node.extend(nodes)
    return copy


def codes_on(running: Any, images: Tensor, given: Codes) -> Codes:
    """The codes of :func:`outputs_on` alone."""
    return outputs_on(running, images, given)[1]


def outputs_on(running: Any, images: Tensor, given: Codes) -> tuple[Tensor, Codes]:
    """(output, codes) that a session of :func:`with_given_codes` computes, every layer on the given codes in front of it."""
    names = list(given)
    feeds = {f"{name}/given": value.float().numpy() for name, value in given.items()}
    with _refusals():
        wanted = ["output", *(f"{name}/seen" for name in names)]
        output, *seen = running.run(wanted, {"input": images.float().numpy(), **feeds})
    codes = {name: torch.from_numpy(value).round().to(torch.int32) for name, value in zip(names, seen, strict=True)}
    return torch.from_numpy(output), codes


def describe(counts: Iterable[tuple[str, int]]) -> str:
    """"12 QLinearConv, 3 Conv", most frequent first."""
    return ", ".join(f"{count} {op}" for op, count in sorted(counts, key=lambda item: (-item[1], item[0])))
