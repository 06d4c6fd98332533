"""Quantized layers and quantizers against the formulas spelled out, and the state around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit.config import DuQConfig
from profit.nn import QuantConv2d, QuantLinear
from tests import tolerances


def choice(rng, items):
    return items[int(torch.randint(len(items), (), generator=rng))]


def oracle_quantize(x, interval, scale, steps, low, offset):
    """The formulas of docs/maths.md, section 1, for given A, C and s."""
    return torch.clamp((x - offset) / interval, low, 1.0).mul(steps).round().div(steps) * scale + offset


def oracle_activation(x, name):
    return {"none": lambda x: x, "relu": lambda x: x.clamp(min=0), "relu6": lambda x: x.clamp(0, 6),
            "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6}[name](x)  # fmt: skip


def softplus64(raw):
    return torch.log1p(torch.exp(raw.detach().double()))


def oracle_weight(layer):
    w, q = layer.weight.detach().double(), layer.weight_quantizer
    if q.bits is None:
        return w
    shape = [-1] + [1] * (w.dim() - 1)
    return oracle_quantize(
        w, softplus64(q.a).view(shape), softplus64(q.c).view(shape), 2 ** (q.bits - 1) - 1, -1.0, 0.0
    )


def oracle_input(layer, x):
    q = layer.input_quantizer
    h = oracle_activation(x.double(), q.activation)
    if q.bits is None:
        return h
    signed = q.kind == "signed"
    steps = 2 ** (q.bits - 1) - 1 if signed else 2**q.bits - 1
    return oracle_quantize(h, softplus64(q.a), softplus64(q.c), steps, -1.0 if signed else 0.0, q.offset)


def random_layer(rng, negative_depthwise=False):
    """A converted float64 convolution (so that no code depends on rounding) of random geometry and settings.

    With `negative_depthwise`, random among the depthwise ones that pad negatively.
    """
    groups_of = choice(rng, ["depthwise", "multiplier"] + ([] if negative_depthwise else ["dense", "grouped"]))
    cin, cout, groups = {"dense": (3, 5, 1), "grouped": (4, 6, 2), "depthwise": (4, 4, 4), "multiplier": (3, 6, 3)}[
        groups_of
    ]
    kernel = (choice(rng, [1, 2, 3, 5]), choice(rng, [1, 3]))
    paddings = [1, (2, 1)] + ([] if negative_depthwise else [0])
    conv = nn.Conv2d(
        cin, cout, kernel, stride=choice(rng, [1, 2]), padding=choice(rng, paddings),
        dilation=choice(rng, [1, 2]), groups=groups, bias=choice(rng, [True, False]),
    ).double()  # fmt: skip
    activation = "hardswish" if negative_depthwise else choice(rng, ["none", "relu", "relu6", "hardswish"])
    kind = {"none": choice(rng, ["raw", "signed"]), "hardswish": "offset"}.get(activation, "unsigned")
    padding = "negative" if negative_depthwise else choice(rng, ["negative", "zero"])
    config = DuQConfig(
        weight_bits=choice(rng, [None, 2, 4, 8]), act_bits=choice(rng, [None, 2, 5, 8]),
        weight_granularity=choice(rng, ["per_tensor", "per_channel"]), padding=padding,
    )  # fmt: skip
    layer = QuantConv2d.from_float(conv, config, kind=kind, offset=-0.375 * (kind == "offset"), activation=activation)
    layer.input_quantizer.set_range(float(torch.rand((), generator=rng)) + 0.5)
    with torch.no_grad():
        for q in (layer.input_quantizer, layer.weight_quantizer):
            q.c += torch.randn(q.c.shape, generator=rng) / 4
    return layer


@pytest.mark.parametrize("case", range(60))
def test_convolution_is_the_formula(case, rng):
    layer = random_layer(rng, negative_depthwise=case % 4 == 0)
    assert case % 4 or (layer.pad_value == -0.375 and layer.is_depthwise)
    x = torch.randn(2, layer.in_channels, 9, 10, generator=rng, dtype=torch.float64) * 3
    negative = layer.input_quantizer.kind == "offset" and layer.pad_value != 0
    ph, pw = layer.padding
    padded = F.pad(oracle_input(layer, x), (pw, pw, ph, ph), value=-0.375 if negative else 0.0)
    bias = None if layer.bias is None else layer.bias.detach()
    expected = F.conv2d(padded, oracle_weight(layer), bias, layer.stride, 0, layer.dilation, layer.groups)
    torch.testing.assert_close(layer(x), expected, **tolerances.CONV64)


@pytest.mark.parametrize("padding", ["negative", "zero"])
@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("case", range(8))
def test_tensorflow_same_padding(case, groups, padding, rng):
    layers = pytest.importorskip("timm.layers")
    kernel, stride, dilation = choice(rng, [2, 3, 5]), choice(rng, [1, 2, 3]), choice(rng, [1, 2])
    conv = layers.Conv2dSame(6, 6, kernel, stride=stride, dilation=dilation, groups=groups)
    config = DuQConfig(weight_bits=None, act_bits=None, padding=padding)
    layer = QuantConv2d.from_float(conv, config, kind="offset", offset=-0.375)
    assert layer.same_padding and layer.pad_value == (-0.375 if padding == "negative" else 0)
    x = torch.randn(2, 6, *(int(n) for n in torch.randint(7, 15, (2,), generator=rng)), generator=rng)
    if padding == "zero":
        expected = conv(x)
    else:
        bordered = layers.pad_same(x, conv.kernel_size, conv.stride, conv.dilation, value=-0.375)
        expected = F.conv2d(bordered, conv.weight, conv.bias, conv.stride, 0, conv.dilation, groups)
    torch.testing.assert_close(layer(x), expected, **tolerances.CONV)


@pytest.mark.parametrize("padding, mode", [("same", "zeros"), ("valid", "zeros"), (1, "reflect"), ((1, 2), "circular")])
@pytest.mark.parametrize("groups", [1, 4])
def test_other_paddings(padding, mode, groups, rng):
    conv = nn.Conv2d(4, 4, 3, padding=padding, padding_mode=mode, groups=groups)
    x = torch.randn(2, 4, 7, 8, generator=rng)
    full = DuQConfig(weight_bits=None, act_bits=None)
    torch.testing.assert_close(QuantConv2d.from_float(conv, full)(x), conv(x), **tolerances.CONV)
    layer = QuantConv2d.from_float(conv, full, kind="offset", offset=-0.5)
    if padding == "same":
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1), value=-0.5), conv.weight, conv.bias, groups=groups)
    else:
        expected = conv(x)  # no border, or one that mirrors the data
        assert layer.pad_value == 0
    torch.testing.assert_close(layer(x), expected, **tolerances.CONV)


@pytest.mark.parametrize("groups", [1, 4])
def test_weight_gradient_includes_the_padded_taps(groups, rng):
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups).double()
    layer = QuantConv2d.from_float(conv, DuQConfig(None, None), kind="offset", offset=-0.375, activation="hardswish")
    x = torch.randn(2, 4, 5, 5, generator=rng, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 4, 5, 5, generator=rng, dtype=torch.float64)
    ours = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], upstream)
    border = F.pad(F.hardswish(x), (1, 1, 1, 1), value=-0.375)
    reference = F.conv2d(border, conv.weight, conv.bias, groups=groups)
    for got, want in zip(ours, torch.autograd.grad(reference, [x, conv.weight, conv.bias], upstream), strict=True):
        torch.testing.assert_close(got, want, **tolerances.CONV64)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_linear_is_the_formula(granularity, rng):
    linear = nn.Linear(7, 5).double()
    layer = QuantLinear.from_float(
        linear, DuQConfig(3, 4, weight_granularity=granularity), kind="unsigned", activation="relu"
    )
    layer.input_quantizer.set_range(1.7)
    x = torch.randn(3, 2, 7, generator=rng, dtype=torch.float64)
    expected = F.linear(oracle_input(layer, x), oracle_weight(layer), linear.bias)
    torch.testing.assert_close(layer(x), expected, **tolerances.CONV64)


def test_integer_arithmetic_with_a_constant_per_channel(rng):
    """Section 2 of docs/maths.md: zero padding of integer codes plus d * sw * sum(codes) per output channel."""
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False).double()
    layer = QuantConv2d.from_float(conv, DuQConfig(4, 4), kind="offset", offset=-0.375, activation="hardswish")
    layer.input_quantizer.set_range(2.5)
    x = torch.randn(2, 4, 6, 6, generator=rng, dtype=torch.float64) * 2
    a_in, c_in = softplus64(layer.input_quantizer.a), softplus64(layer.input_quantizer.c)
    a_w, c_w = softplus64(layer.weight_quantizer.a), softplus64(layer.weight_quantizer.c)
    qx = ((oracle_activation(x, "hardswish") + 0.375) / a_in).clamp(0, 1).mul(15).round()
    qw = (conv.weight.detach() / a_w).clamp(-1, 1).mul(7).round()
    product = F.conv2d(qx, qw, padding=1, groups=4) * (c_in / 15) * (c_w / 7)
    constant = -0.375 * (c_w / 7) * qw.sum((1, 2, 3))
    torch.testing.assert_close(layer(x), product + constant.view(1, -1, 1, 1), **tolerances.CONV64)
