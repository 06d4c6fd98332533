"""A quantized net of a stem, a negative-padded depthwise block and a classifier, small enough for hand-written loops."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from profit.nn.conv import QuantConv2d
from profit.nn.linear import QuantLinear
from profit.nn.quantizer import InputQuantizer, WeightQuantizer


def conv(
    generator: torch.Generator, *args, kind="signed", activation="none", bits=4, act_bits=4, channels=None, **kwargs
):
    """A calibrated QuantConv2d with random weights."""
    offset = -0.375 if kind == "offset" else 0.0
    layer = QuantConv2d(
        *args,
        input_quantizer=InputQuantizer(kind=kind, offset=offset, activation=activation),
        weight_quantizer=WeightQuantizer(channels=channels),
        **kwargs,
    )
    _initialise(layer, generator, bits, act_bits)
    return layer


def _initialise(layer, generator, bits, act_bits):
    with torch.no_grad():
        layer.weight.normal_(0.0, 0.3, generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(0.0, 0.1, generator=generator)
    layer.input_quantizer.set_range(2.0)
    layer.set_weight_bits(bits)
    layer.set_act_bits(act_bits)


def tiny_net(generator: torch.Generator, bits: int | None = 4) -> nn.Sequential:
    """Input [N, 3, 8, 8], output [N, 5]; three ranked convolutions: stem, dw, pw."""
    block = {"bias": False, "ranked": True, "bits": bits}
    head = QuantLinear(6, 5)
    _initialise(head, generator, bits, 4)
    return nn.Sequential(
        OrderedDict(
            stem=conv(generator, 3, 8, 3, padding=1, kind="raw", **block),
            bn1=nn.BatchNorm2d(8),
            dw=conv(
                generator,
                8,
                8,
                3,
                padding=1,
                groups=8,
                kind="offset",
                activation="hardswish",
                pad_value=-0.375,
                **block,
            ),
            bn2=nn.BatchNorm2d(8),
            pw=conv(generator, 8, 6, 1, kind="offset", activation="hardswish", **block),
            bn3=nn.BatchNorm2d(6),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=head,
        )
    )


def train_step(net, optimizer, x, target):
    """One optimizer step on one batch."""
    loss = nn.functional.cross_entropy(net(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def batch(generator: torch.Generator, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images [n, 3, 8, 8] and classes [n]."""
    return torch.randn(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)
