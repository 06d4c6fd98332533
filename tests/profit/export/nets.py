"""Quantized nets for the export tests: converted, calibrated, with BatchNorm statistics of their own data."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profit
from tests.profit.conversion_nets import Gate, trained


class Edges(nn.Module):
    """What an exporter must get right, small: a raw stem, an offset depthwise 3 x 3 with stride 2, a 5 x 5 with a larger
    border than image margin, squeeze-and-excite, a residual sum, ReLU6 and ReLU, a BatchNorm with negative factors, two
    readers of one output, and a linear head. Input [N, 3, 12, 12], output [N, 5]."""

    def __init__(self) -> None:
        super().__init__()
        plain = {"bias": False}
        layers = {
            "stem": nn.Conv2d(3, 8, 3, padding=1, **plain),
            "dw": nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),
            "gate": Gate(8),
            "pw": nn.Conv2d(8, 6, 1, **plain),
            "expand": nn.Conv2d(6, 12, 1, **plain),
            "wide": nn.Conv2d(12, 12, 5, padding=2, groups=12, **plain),
            "project": nn.Conv2d(12, 6, 1, **plain),
            "last": nn.Conv2d(6, 10, 1),
            "head": nn.Linear(10, 5),
        }
        norms = {f"bn{i}": nn.BatchNorm2d(channels) for i, channels in enumerate((8, 8, 6, 12, 12, 6))}
        kinds = {0: nn.Hardswish, 1: nn.Hardswish, 3: nn.ReLU6, 4: nn.ReLU, 5: nn.Hardswish}
        for name, module in {**layers, **norms, **{f"act{i}": kind() for i, kind in kinds.items()}}.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.bn0(self.stem(x)))
        x = self.gate(self.act1(self.bn1(self.dw(x))))
        x = self.bn2(self.pw(x))
        y = self.act3(self.bn3(self.expand(x)))
        y = self.act4(self.bn4(self.wide(y)))
        x = x + self.bn5(self.project(y))
        return self.head(F.adaptive_avg_pool2d(self.act5(self.last(x)), 1).flatten(1))


def randomised(model: nn.Module, rng: torch.Generator) -> nn.Module:
    """`model` with random parameters; BatchNorm factors of both signs."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.normal_(0.0, module.weight[0].numel() ** -0.5, generator=rng)
                if module.bias is not None:
                    module.bias.normal_(0.0, 0.3, generator=rng)
            elif isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.7, generator=rng)
                module.bias.normal_(0.0, 0.5, generator=rng)
    return model


def quantized(model: nn.Module, x: Tensor, weight_bits: int = 4, act_bits: int = 4, **config) -> nn.Module:
    """`model` converted on images `x`, its ranges calibrated on them, in eval mode. The input scales C differ from the
    intervals A, as they do after training."""
    trained(model, x)
    config = profit.DuQConfig(weight_bits=None, act_bits=None, **{"padding": "negative", **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of padding, and of gates that random weights hold shut
        profit.quantize_(model, config, example_inputs=(x[:1],))
        profit.set_bits(model, act_bits=act_bits)
        profit.calibrate_(model, [x], batches=1)
    profit.set_bits(model, weight_bits=weight_bits)
    with torch.no_grad():
        for layer in profit.quant_layers(model).values():
            for quantizer in (layer.input_quantizer, layer.weight_quantizer):
                quantizer.c.mul_(1.1).add_(0.01)
    return model.eval()


def images(rng: torch.Generator, n: int = 32, size: int = 12) -> Tensor:
    """Random images [n, 3, size, size]."""
    return torch.randn(n, 3, size, size, generator=rng)
