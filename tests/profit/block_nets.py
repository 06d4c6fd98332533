"""Nets whose convolutions apply the BatchNorm in front of them, beside the same nets converted with fuse=False."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from profit import (
    DuQConfig,
    calibrate_,
    quant_layers,
    quantize_,
)
from tests.ops.conv.registered import registered

# In float64 a fused net then equals an unfused one to rounding.
exact = registered


class Chain(nn.Module):
    """conv - BN - ReLU6 - depthwise - BN - h-swish - pointwise - BN - pointwise, and a head. Input [N, 3, H, W]."""

    def __init__(self, **norm) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, **norm)
        self.act1 = nn.ReLU6(inplace=True)
        self.dw = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.bn2 = nn.BatchNorm2d(8, **norm)
        self.act2 = nn.Hardswish()
        self.pw = nn.Conv2d(8, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6, **norm)
        self.last = nn.Conv2d(6, 12, 1)
        self.bn4 = nn.BatchNorm2d(12, **norm)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.act1(self.bn1(self.stem(x)))
        x = self.act2(self.bn2(self.dw(x)))
        x = self.bn4(self.last(self.bn3(self.pw(x))))
        # Smooth: behind a BatchNorm without bias, codes that repeat put values exactly on its mean, which is the edge of ReLU.
        return self.head(F.softplus(x).mean((2, 3)))


CHAIN = {"dw": "bn1", "pw": "bn2", "last": "bn3"}


def blocks(model):
    """Convolution -> the BatchNorm it applies."""
    return {name: layer.norm_name for name, layer in quant_layers(model).items() if getattr(layer, "norm", None)}


def pair(make, x, config=None, **settings):
    """(fused, unfused): one net converted both ways, with one calibration."""
    torch.manual_seed(0)
    original = make().to(x.dtype)
    for module in original.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            # A channel that is the same everywhere would lie on the activation's kink, where the last bit decides.
            nn.init.uniform_(module.bias, -0.5, 0.5)
    config = {"weight_bits": 4, "act_bits": 4, "padding": "zero", **(config or {}), **settings}
    nets = []
    for fuse in (True, False):
        net = copy.deepcopy(original)
        quantize_(net, DuQConfig(**config, fuse=fuse), x[:2])
        nets.append(net)
    fused, unfused = nets
    if config["act_bits"] is not None:
        calibrate_(unfused, [x])
        fused.load_state_dict(unfused.state_dict())
    return fused.train(), unfused.train()


def data(rng, dtype=torch.float64, n=4):
    return torch.randn(n, 3, 16, 16, generator=rng, dtype=torch.float64).to(dtype)


def train(net, batches, steps=3, hook=lambda: None, lr=0.05):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=lr, momentum=0.9)
    for step in range(steps):
        loss = F.cross_entropy(net(batches[step]), torch.arange(len(batches[step])) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hook()
    return net


def assert_same_state(fused, unfused, tolerance):
    ours, theirs = fused.state_dict(), unfused.state_dict()
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
