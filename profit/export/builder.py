"""From PyTorch's exported graph to the steps of a :class:`~profit.export.network.Network`, BatchNorms folded on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from ..nn import QuantLayer
from .aten import CONVERTERS, Constant, Shapes, Unsupported
from .layers import float_layer, quantized_layer
from .network import BATCH, Layer, Network, Step

_BATCH_NORMS = ("batch_norm.default", "_native_batch_norm_legit_no_training.default")


class Builder:
    """Walks the exported graph once. Values are names (str), constants of the model, or plain numbers."""

    def __init__(self, program: torch.export.ExportedProgram, sources: dict[str, QuantLayer]) -> None:
        self.program, self.sources = program, sources
        self.steps: list[Step] = []
        self.layers: dict[str, Layer] = {}
        self.constants: dict[str, Tensor] = {}
        self.values: dict[torch.fx.Node, Any] = {}

    def network(self, image_shape: tuple[int, ...]) -> Network:
        signature, constants = self.program.graph_signature, self.program.constants
        names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                name = names.get(node.name)
                if name is None:
                    self.values[node] = "input"
                else:
                    tensor = self.program.state_dict[name] if name in self.program.state_dict else constants[name]
                    self.values[node] = Constant(name, tensor.detach())
            elif node.op == "call_function":
                self.values[node] = self._convert(node)
            elif node.op == "output":
                output = self._output(node)
            else:
                raise ExportError(f"{_place(node)}: {node.op} {node.target} cannot be exported")
        live = _live_steps(self.steps, output)
        used = {step.settings["layer"] for step in live if step.op == "layer"}
        named = {name for step in live for name in step.inputs if isinstance(name, str)}
        layers = {name: layer for name, layer in self.layers.items() if name in used}
        for layer in layers.values():
            layer.check()
        constants = {name: value for name, value in self.constants.items() if name in named}
        return Network((BATCH, *image_shape), output, tuple(live), layers, constants)

    def _output(self, node: torch.fx.Node) -> str:
        outputs = torch.utils._pytree.tree_leaves(node.args[0])
        values = [self.values[o] for o in outputs if isinstance(o, torch.fx.Node)]
        if len(outputs) != 1 or not values or not isinstance(values[0], str):
            raise ExportError(f"the model returns {len(outputs)} values: one tensor that depends on the images is exported")
        if _shape(outputs[0])[:1] != (BATCH,):
            raise ExportError("the model's output has no dimension for the images of the batch")
        return values[0]

    def _convert(self, node: torch.fx.Node) -> Any:
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return None  # sizes and arithmetic on them: shapes are taken from the tensors they shape
        if node.target is torch.ops.profit_export.layer.default:
            return self._quantized_layer(node)
        name = str(node.target).removeprefix("aten.")
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._operand)
        if name in _BATCH_NORMS:
            return self._batch_norm(node, *args)
        if name == "<built-in function getitem>":
            return args[0] if args[1] == 0 else None  # refused where something reads it
        if name in ("conv2d.default", "conv2d.padding", "linear.default"):
            return self._float_layer(node, *args, **kwargs)
        if name not in CONVERTERS:
            self._refuse(node, "is not among the operators that can be exported")
        result = _first(node)
        if result.dtype != torch.float32:
            self._refuse(node, f"gives {result.dtype}; only float32 tensors are exported")
        if not _keeps_images_apart(result):
            self._refuse(node, f"gives {list(result.shape)}: the images of the batch must stay dimension 0, all of it")
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), Tensor)]
        shapes = Shapes(_shape(tensors[0]) if tensors else (), _shape(node))
        # The result was checked to be float32, and memory formats do not change values.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("dtype", "memory_format")}
        try:
            converted = CONVERTERS[name](shapes, *args, **kwargs)
        except Unsupported as reason:
            self._refuse(node, f"cannot be exported {reason}")
        except TypeError as error:  # an argument that the converter does not know
            self._refuse(node, f"cannot be exported with these arguments ({error})")
        if not isinstance(converted, tuple):
            return converted
        op, inputs, settings = converted
        return self._emit(op, [self._input(node, x) for x in inputs], node, settings)

    def _operand(self, node: torch.fx.Node) -> Any:
        return self.values[node]

    def _input(self, node: torch.fx.Node, operand: Any) -> str | float:
        """A step's input: constants become numbers or named tensors."""
        if isinstance(operand, Constant):
            if operand.tensor.numel() == 1:
                return float(operand.tensor)
            return self._constant(operand.name, operand.tensor)
        if isinstance(operand, (str, float, int)) and not isinstance(operand, bool):
            return operand if isinstance(operand, str) else float(operand)
        self._refuse(node, f"cannot be exported with the argument {operand!r}")

    def _constant(self, name: str, tensor: Tensor) -> str:
        self.constants[f"constant.{name}"] = tensor.detach().double()
        return f"constant.{name}"

    def _emit(self, op: str, inputs: list[str | float], node: torch.fx.Node, settings: dict[str, Any]) -> str:
        output = f"v{len(self.steps)}"
        self.steps.append(Step(op, tuple(inputs), output, _shape(node), settings))
        return output

    def _quantized_layer(self, node: torch.fx.Node) -> str:
        x, _, name, stride, pads, dilation, groups = node.args
        source = self.sources[name]
        if name not in self.layers:
            geometry = {} if source.weight.dim() == 2 else {"stride": stride, "pads": pads, "dilation": dilation}
            self.layers[name] = quantized_layer(name, source, **geometry)
        elif self.layers[name].pads != tuple(pads or (0, 0, 0, 0)):
            raise ExportError(f"layer {name!r} runs on inputs of different sizes, so its 'same' padding is not one constant")
        return self._emit("layer", [self._input(node, self.values[x])], node, {"layer": name})

    def _float_layer(
        self, node: torch.fx.Node, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        """A convolution or linear layer that conversion skipped."""
        if not isinstance(weight, Constant) or not isinstance(bias, (Constant, type(None))):
            self._refuse(node, "has a weight that is computed")
        name = weight.name.removesuffix(".weight")
        if name in self.layers:
            self._refuse(node, f"uses the weight of {name} a second time")
        bias = None if bias is None else bias.tensor
        self.layers[name] = float_layer(name, weight.tensor, bias, stride, padding, dilation, groups)
        return self._emit("layer", [self._input(node, x)], node, {"layer": name})

    def _batch_norm(self, node: torch.fx.Node, x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *rest: Any) -> str:
        """Folded into the layer in front where that layer has no other reader, else an operator of its own."""
        if not isinstance(mean, Constant) or rest[0] is True:
            self._refuse(node, "uses the statistics of the batch")
        eps = rest[2] if str(node.target) == "aten.batch_norm.default" else rest[1]
        factor = 1.0 / torch.sqrt(variance.tensor.double() + eps)
        if weight is not None:
            factor = factor * weight.tensor.double()
        shift = -mean.tensor.double() * factor
        if bias is not None:
            shift = shift + bias.tensor.double()
        name = mean.name.removesuffix(".running_mean")
        producer = next((step for step in self.steps if step.output == x), None)
        if producer is not None and producer.op == "layer" and self._is_sole_use(node, producer):
            layer = self.layers[producer.settings["layer"]]
            self.layers[layer.name] = layer.followed_by(factor, shift, name)
            return x
        scale = self._constant(f"{name}.scale", factor)
        return self._emit("affine", [self._input(node, x), scale, self._constant(f"{name}.shift", shift)], node, {})

    def _is_sole_use(self, node: torch.fx.Node, producer: Step) -> bool:
        """Whether this node alone reads the layer, which runs once, and the channel is dimension 1."""
        layer = self.layers[producer.settings["layer"]]
        runs = sum(step.op == "layer" and step.settings["layer"] == layer.name for step in self.steps)
        calls = [n.args[2] for n in self.program.graph.nodes if n.target is torch.ops.profit_export.layer.default]
        channels_in_dim_1 = layer.type == "conv" or len(producer.shape) == 2
        alone = len(node.args[0].users) == 1 and runs == 1 and calls.count(layer.name) <= 1
        return alone and channels_in_dim_1 and not layer.batch_norm

    def _refuse(self, node: torch.fx.Node, why: str) -> Any:
        raise ExportError(f"{_place(node)}: {str(node.target).removeprefix('aten.')} {why}")


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Sizes of a node's tensor, -1 for the number of images."""
    return tuple(size if isinstance(size, int) else BATCH for size in _first(node).shape)


def _first(node: torch.fx.Node) -> Tensor:
    """The (fake) tensor an operator gives; its first one, where it also gives such as the places of maxima."""
    value = node.meta["val"]
    return value if isinstance(value, Tensor) else value[0]


def _keeps_images_apart(value: Tensor) -> bool:
    """Whether the number of images is a dimension of its own, the first one, or the tensor does not depend on it."""
    symbolic = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
    return not symbolic or (symbolic == [0] and value.shape[0].node.expr.is_symbol)


def _place(node: torch.fx.Node) -> str:
    """The module an operator belongs to, for messages."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    return f"module {path!r}" if path else "the model"


def _live_steps(steps: list[Step], output: str) -> list[Step]:
    """The steps that the output depends on."""
    needed, live = {output}, []
    for step in reversed(steps):
        if step.output in needed:
            live.append(step)
            needed.update(name for name in step.inputs if isinstance(name, str))
    return live[::-1]
