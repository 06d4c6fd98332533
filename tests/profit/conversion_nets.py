"""Small nets for the conversion tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Between(nn.Module):
    """conv `a`, then `between(self, y)`, then conv `b`; extra modules by name. Input [N, 3, H, W]."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.between = between
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


class Whole(nn.Module):
    """A whole forward `run(self, x)` over conv `a` (3 to 4) and conv `b` (4 to 4)."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Gate(nn.Module):
    """Squeeze-and-excite over 1 x 1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, 4, 1)
        self.expand = nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(s))))


class Mobile(nn.Module):
    """Every kind of layer there is, with functional and module activations, and control flow that torch.fx cannot trace.

    Input [N, 3, H, W] from 8 x 8, output [N, 5].
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.act0 = nn.Hardswish(inplace=True)
        self.dw = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.gate = Gate(8)
        self.pw = nn.Conv2d(8, 6, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 12, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.act3 = nn.ReLU6()
        self.grouped = nn.Conv2d(12, 6, 3, padding=1, groups=3, bias=False)
        self.bn4 = nn.BatchNorm2d(6)
        self.act4 = nn.ReLU()
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.bn0(self.stem(x)))
        x = self.bn1(self.dw(x))
        x = self.gate(x * F.relu6(x + 3) / 6)
        x = self.bn2(self.pw(x))
        y = self.act3(self.bn3(self.expand(x)))
        y = self.bn4(self.grouped(y)) + x
        if y.shape[0] > 10**6 or not torch.compiler.is_compiling() and bool(y.isnan().any()):
            y = y * 0
        return self.head(self.act4(y).mean((2, 3)))

    KINDS = {
        "stem": ("raw", "none"), "dw": ("offset", "hardswish"), "gate.reduce": ("offset", "none"),
        "gate.expand": ("unsigned", "none"), "pw": ("offset", "none"), "expand": ("signed", "none"),
        "grouped": ("unsigned", "relu6"), "head": ("unsigned", "none"),
    }  # fmt: skip


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """`model` with the BatchNorm statistics of `x`, in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
