"""`torch.export` of a converted model, its quantizers decomposed into ordinary operators: a .pt2 file needs torch alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from profit_kernels import use_backend

from ..errors import ExportError
from ..files import write_atomic
from ..nn import InputQuantizer, WeightQuantizer
from ..quantize import quant_layers
from .trace import check_call, checked_layers, example_images, export_program, plain_copy


def export_torch(model: nn.Module, path: str | Path, example_inputs: Any) -> int:
    """Write a quantized model as a .pt2 file of torch.export; returns its size in bytes.

    The program computes what the model computes on the reference backend, bit for bit, for any number of images. Inputs are
    quantized by ordinary operators; weights are stored as the floats that they quantize to.

    Usage::

        profit.export_torch(model, "net.pt2", images)

    Args:
        model: converted and calibrated; it is not changed.
        path: replaced whole, or not at all.
        example_inputs: images [N, C, H, W] (or a tuple of one such tensor) of the size the network is for.

    Raises:
        ExportError: nothing is quantized, a layer's numbers are not finite, or torch.export cannot follow the model.
        ProfitError: cannot be written. TypeError: an argument of another type.
    """
    check_call(model, path, "export_torch")
    checked_layers(model)
    plain = plain_copy(model)
    with torch.no_grad(), use_backend("reference"):  # plain operators, where a kernel would be an operator of this package
        for layer in quant_layers(plain).values():
            # Weights do not change any more: quantized here, not in every forward of the program.
            layer.weight.data = layer.quantized_weight().detach()
            layer.set_weight_bits(None)
        _check_finite(plain)
        program = export_program(plain, example_images(example_inputs))
    ours = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("profit_")})
    if ours:
        raise ExportError(f"{ours[0]} would need this package to run: it has no reference that torch.export decomposes")
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    data = buffer.getvalue()
    write_atomic(path, data)
    return len(data)


def _check_finite(plain: nn.Module) -> None:
    """Raise ExportError, by layer, where a number that the program computes with is not finite."""
    for name, module in plain.named_modules():
        if isinstance(module, InputQuantizer | WeightQuantizer) and module.bits is None:
            continue  # its parameters are not used
        for what, value in module.named_parameters(recurse=False):
            if not bool(torch.isfinite(value).all()):
                raise ExportError(f"layer {name!r}: its {what} is not finite, so it cannot be exported")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            deviation = torch.rsqrt(module.running_var + module.eps)
            for what, value in (("running_mean", module.running_mean), ("running_var", deviation)):
                if not bool(torch.isfinite(value).all()):
                    why = "is not finite or below 0" if what == "running_var" else "is not finite"
                    raise ExportError(f"layer {name!r}: its {what} {why}, so it cannot be exported")
