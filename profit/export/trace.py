"""From a converted model to a :class:`~profit.export.network.Network`.

A copy of the model runs once under `torch.export`, with every quantized layer replaced by an operator that carries its name.
What comes back is one flat list of operators, whatever the model's own Python looks like.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CalibrationError, ExportError
from ..nn import QuantConv2d, QuantLayer
from ..quantize import quant_layers, swap_modules
from .aten import CONVERTERS, Constant, Shapes, Unsupported
from .layers import float_layer, quantized_layer
from .network import BATCH, Layer, Network, Step

_BATCH_NORMS = ("batch_norm.default", "_native_batch_norm_legit_no_training.default")


@torch.library.custom_op("profit_export::layer", mutates_args=())
def _layer(x: Tensor, weight: Tensor, name: str, stride: list[int], pads: list[int], dilation: list[int], groups: int) -> Tensor:
    """A quantized layer in the traced graph; only its shape is ever computed."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups)


_layer.register_fake(_layer._init_fn)


class _Marked(nn.Module):
    """Stands for a quantized layer while the model is traced."""

    def __init__(self, layer: QuantLayer, name: str) -> None:
        super().__init__()
        self.weight, self.name = layer.weight, name
        self._layer = [layer]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        layer = self._layer[0]
        if not isinstance(layer, QuantConv2d):
            return _layer(x, self.weight, self.name, [], [], [], 1)
        pads = list(layer.padding4(x))
        return _layer(x, self.weight, self.name, list(layer.stride), pads, list(layer.dilation), layer.groups)


def trace_network(model: nn.Module, example_inputs: Any, *, allow_float: bool = False) -> Network:
    """The network that `model` computes in eval mode; the model is not changed.

    Args:
        model: converted by `quantize_`, calibrated, float32; in any mode, on any device.
        example_inputs: images [N, C, H, W], or a tuple of one such tensor. Height and width are fixed by it, N is not.
        allow_float: accept a model without any bit width (a full-precision yardstick).

    Raises:
        ExportError: nothing is quantized, or something (named) cannot be exported.
    """
    layers = _checked_layers(model, allow_float)
    images = _example(example_inputs)
    plain, sources = _traceable_copy(model)
    program = _export(plain, images)
    if any(_is_mutating(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # in-place operators become ordinary ones; nothing is decomposed
    builder = _Builder(program, {name: sources[name] for name in layers})
    return builder.network(tuple(images.shape[1:]))


def _checked_layers(model: nn.Module, allow_float: bool) -> dict[str, QuantLayer]:
    layers = quant_layers(model)
    if not layers:
        raise ExportError("the model is not quantized: it has no quantized layer; convert it with quantize_ first")
    if not allow_float and all(layer.weight_quantizer.bits is None for layer in layers.values()):
        raise ExportError(
            "the model is not quantized yet: every layer's weight is in full precision; "
            "set_bits(model, weight_bits=4, act_bits=4) sets bit widths"
        )
    for name, layer in layers.items():
        for quantizer in (layer.input_quantizer, layer.weight_quantizer):
            if quantizer.bits is not None and not quantizer.is_duq:
                raise ExportError(
                    f"layer {name!r}: its quantizer is {type(quantizer).__name__}; only DuQ can be exported "
                    "(DuQConfig(quantizer='duq'))"
                )
            try:
                quantizer.check_ready()
            except CalibrationError as error:
                raise ExportError(str(error)) from None
        if isinstance(layer, QuantConv2d) and layer.padding_mode != "zeros":
            raise ExportError(f"layer {name!r}: padding_mode={layer.padding_mode!r} cannot be exported, only 'zeros'")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ExportError(f"{name} is {tensor.dtype}: export a float32 model (model.float())")
    return layers


def _example(example_inputs: Any) -> Tensor:
    images = example_inputs[0] if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1 else example_inputs
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.numel():
        raise TypeError("example_inputs must be images [N, C, H, W], or a tuple of one such tensor")
    # Two images: torch.export takes a size of 1 for a constant.
    return images[:1].detach().to("cpu", torch.float32).repeat(2, 1, 1, 1)


def _traceable_copy(model: nn.Module) -> tuple[nn.Module, dict[str, QuantLayer]]:
    """A copy in eval mode on the CPU with its quantized layers marked, and these layers by name."""
    plain = copy.deepcopy(model).cpu().eval()
    for module in plain.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False
    sources = quant_layers(plain)
    swap_modules(plain, {layer: _Marked(layer, name) for name, layer in sources.items()})
    return plain, sources


def _export(plain: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(plain, (images,), dynamic_shapes=(batch,), strict=False)
    # torch.export raises RuntimeError and its subclasses for what it cannot follow, and the model's own errors as they are.
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(f"torch.export cannot follow the model with a free number of images: {first}") from error


def _is_mutating(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)


class _Builder:
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
            raise ExportError(f"the model returns {len(outputs)} values: only one tensor that depends on the images is exported")
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
            return args[0] if args[1] == 0 else self._refuse(node, "takes a further result of the operator before it")
        if name in ("conv2d.default", "conv2d.padding", "linear.default"):
            return self._float_layer(node, *args, **kwargs)
        if name not in CONVERTERS or isinstance(node.meta["val"], (tuple, list)):
            self._refuse(node, "is not among the operators that can be exported")
        if node.meta["val"].dtype != torch.float32:
            self._refuse(node, f"gives {node.meta['val'].dtype}; only float32 tensors are exported")
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
        self.layers[name] = float_layer(name, weight.tensor, None if bias is None else bias.tensor, stride, padding, dilation, groups)
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
        later = sum(n.target is torch.ops.profit_export.layer.default and n.args[2] == layer.name for n in self.program.graph.nodes)
        flat = layer.type == "conv" or len(producer.shape) == 2
        return len(node.args[0].users) == 1 and runs == 1 and later <= 1 and flat and not layer.batch_norm

    def _refuse(self, node: torch.fx.Node, why: str) -> Any:
        raise ExportError(f"{_place(node)}: {str(node.target).removeprefix('aten.')} {why}")


def _shape(node: torch.fx.Node) -> tuple[int, ...]:
    """Sizes of a node's tensor, -1 for the number of images."""
    value = node.meta["val"]
    return tuple(size if isinstance(size, int) else BATCH for size in value.shape)


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
