"""What the AIWQ tests share: a layer to watch, and a recorder that computes its KL by hand."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from profit.nn.conv import QuantConv2d
from tests.oracles import gaussian_kl
from tests.profit.tiny_net import conv


def sgd(net, lr=0.3):
    return torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)


class Recorder:
    """Output, padded quantized input and quantized weight of a layer's last forward, taken at that moment."""

    def __init__(self, layer: QuantConv2d, pad_value: float | None = None) -> None:
        self.layer, self.pad_value = layer, layer.pad_value if pad_value is None else pad_value
        layer.register_forward_hook(self.record)

    @torch.no_grad()
    def record(self, layer, args, y):
        self.y = y.detach().clone()
        self.padded = F.pad(layer.input_quantizer(args[0]), layer.padding4(args[0]), value=self.pad_value).double()
        self.weight = layer.weight_quantizer(layer.weight).clone()

    def kl(self, weight_old) -> np.ndarray:
        """KL per channel from the output that `weight_old` would have given, in numpy float64."""
        layer = self.layer
        bias = None if layer.bias is None else layer.bias.detach().double()
        old = F.conv2d(self.padded, weight_old.double(), bias, layer.stride, 0, layer.dilation, layer.groups)
        return gaussian_kl(self.y.double().numpy(), old.numpy())


def change(layer, rng, scale=0.1):
    """A random move of the weight, as an optimizer step would make."""
    with torch.no_grad():
        layer.weight += scale * torch.randn(layer.weight.shape, generator=rng)


def dw_layer(rng, **changes):
    settings = {
        "padding": 1,
        "groups": 8,
        "kind": "offset",
        "activation": "hardswish",
        "pad_value": -0.375,
        "ranked": True,
    }
    return conv(rng, 8, 8, 3, **(settings | changes))
