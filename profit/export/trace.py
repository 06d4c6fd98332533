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

from ..blocks import swap_modules, unfuse_
from ..checks import check_module, check_path, first_line
from ..errors import CalibrationError, ExportError
from ..nn import QuantConv2d, QuantLayer, weight_batch
from ..quantize import quant_layers
from .builder import Builder
from .network import Network


def _product(
    x: Tensor, weight: Tensor, name: str, stride: list[int], pads: list[int], dilation: list[int], groups: int
) -> Tensor:
    """A quantized layer in the traced graph; only its shape is ever computed."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return F.conv2d(F.pad(x, pads), weight, None, stride, 0, dilation, groups)


_layer = torch.library.custom_op("profit_export::layer", _product, mutates_args=())
_layer.register_fake(_product)


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
    layers = checked_layers(model, allow_float)
    images = example_images(example_inputs)
    plain, sources = _marked_copy(model)
    program = export_program(plain, images)
    if any(_is_mutating(node) for node in program.graph.nodes):
        program = program.run_decompositions({})  # in-place operators become ordinary ones; nothing is decomposed
    builder = Builder(program, {name: sources[name] for name in layers})
    return builder.network(tuple(images.shape[1:]))


def check_call(model: object, path: object, name: str) -> None:
    """Raise TypeError where the arguments of the exporter `name` are of another type, or in another order."""
    usage = f"{name}(model, path, example_inputs)"
    check_module(model, usage)
    check_path(path, usage)


def checked_layers(model: nn.Module, allow_float: bool = False) -> dict[str, QuantLayer]:
    """The quantized layers by name. Raises ExportError where the model is not one that can be exported."""
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


def example_images(example_inputs: Any) -> Tensor:
    """Two images of the example's size, float32 on the CPU. Raises TypeError for anything but images."""
    images = example_inputs[0] if isinstance(example_inputs, (tuple, list)) and len(example_inputs) == 1 else example_inputs
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.numel():
        raise TypeError("example_inputs must be images [N, C, H, W], or a tuple of one such tensor")
    # Two images: torch.export takes a size of 1 for a constant.
    return images[:1].detach().to("cpu", torch.float32).repeat(2, 1, 1, 1)


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU whose layers work one by one, BatchNorm included, without in-place activations."""
    plain = copy.deepcopy(model).cpu().eval()
    weight_batch.detach(plain)
    unfuse_(plain)
    for module in plain.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False
    return plain


def _marked_copy(model: nn.Module) -> tuple[nn.Module, dict[str, QuantLayer]]:
    """A copy with its quantized layers marked, and these layers by name."""
    plain = plain_copy(model)
    sources = quant_layers(plain)
    swap_modules(plain, {layer: _Marked(layer, name) for name, layer in sources.items()})
    return plain, sources


def export_program(plain: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """torch.export with a free number of images. Raises ExportError where it cannot follow the model."""
    batch = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad():
            return torch.export.export(plain, (images,), dynamic_shapes=(batch,), strict=False)
    # torch.export raises RuntimeError and its subclasses for what it cannot follow, and the model's own errors as they are.
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        why = first_line(error)
        raise ExportError(f"torch.export cannot follow the model with a free number of images: {why}") from error


def _is_mutating(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", False)
