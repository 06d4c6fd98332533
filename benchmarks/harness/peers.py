"""Other libraries for quantization-aware training, where they are installed: the same network with their 4-bit quantizers.

A peer has a quantizer of its own, so its numbers are not the reference's: it must give a finite loss and finite gradients.

Brevitas: every convolution and linear layer behind the first one becomes brevitas.nn's, weight and input at 4 bits per tensor,
with a learned scale. torchao: it has no layer for convolutions; they are given its fake quantizers, int4 per output channel for
the weight and, as for its linear layers, int4 per token (here: per pixel) with ranges of the moment for the input.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .children import Unavailable, WrongResult

BITS = 4
PEERS = ("brevitas", "torchao")


def why_missing(peer: str) -> str | None:
    """Why a peer cannot be measured here; None if it can."""
    if importlib.util.find_spec(peer) is None:
        return "not installed: pip install 'profit-kernels[peers]'"
    return None


def network(peer: str, model: nn.Module) -> nn.Module:
    """`model` with every convolution and linear layer but the first replaced, in place. Raises Unavailable."""
    reason = why_missing(peer)
    if reason is not None:
        raise Unavailable(reason)
    replace = {"brevitas": _brevitas_layer, "torchao": _torchao_layer}[peer]
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    for name, layer in layers[1:]:  # the first one reads images, which are not quantized
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, replace(layer).train(layer.training))
    return model


def quantizer(peer: str, device: str, signed: bool) -> nn.Module:
    """The peer's quantizer of activations [N, C, H, W] at BITS bits."""
    return _brevitas_quantizer(signed).to(device) if peer == "brevitas" else _TorchaoInput()


def _brevitas_quantizer(signed: bool) -> nn.Module:
    from brevitas.nn import QuantIdentity
    from brevitas.quant import Int8ActPerTensorFloat, Uint8ActPerTensorFloat

    kind = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    return QuantIdentity(act_quant=kind, bit_width=BITS, collect_stats_steps=1)


def _brevitas_layer(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerTensorFloat

    settings = {
        "bias": layer.bias is not None, "weight_quant": Int8WeightPerTensorFloat, "weight_bit_width": BITS,
        "weight_scaling_impl_type": "parameter_from_stats", "input_quant": Int8ActPerTensorFloat, "input_bit_width": BITS,
        "input_collect_stats_steps": 1,  # the scale of the input is learned from the second step on
    }  # fmt: skip
    if isinstance(layer, nn.Linear):
        made = QuantLinear(layer.in_features, layer.out_features, **settings)
    else:
        made = QuantConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
            dilation=layer.dilation, groups=layer.groups, **settings,
        )  # fmt: skip
    made.load_state_dict(layer.state_dict(), strict=False)  # the quantizers have parameters that `layer` has not
    return made.to(layer.weight.device, memory_format=torch.channels_last)


class _TorchaoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        self.quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_token", is_symmetric=False))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return self.quantizer(x)
        return self.quantizer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # the channels of a pixel: a view in channels_last


class _TorchaoLayer(nn.Module):
    """A convolution or linear layer with torchao's fake quantizers."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

        self.layer = layer
        self.input = _TorchaoInput()
        self.weight_quantizer = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, "per_channel", is_symmetric=True))

    def forward(self, x: Tensor) -> Tensor:
        layer, x = self.layer, self.input(x)
        weight = self.weight_quantizer(layer.weight.flatten(1)).view_as(layer.weight)
        return F.linear(x, weight, layer.bias) if isinstance(layer, nn.Linear) else layer._conv_forward(x, weight, layer.bias)


def _torchao_layer(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    return _TorchaoLayer(layer)


def check(peer: str, model: nn.Module, loss: Callable[[], Tensor]) -> str:
    """One step: what was found, in words. Raises WrongResult for a loss or a gradient that is not finite."""
    value = loss()
    value.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    if not bool(value.isfinite()) or not found or not all(bool(grad.isfinite().all()) for grad in found):
        raise WrongResult(f"wrong result: loss {value.item():.4g}, or a gradient that is not finite")
    version = importlib.metadata.version(peer)
    return f"{peer} {version}, own quantizer: loss {value.item():.4g} and {len(found)} gradients finite"
