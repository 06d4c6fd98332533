"""The integer variant on the numbers that saturate in 16 bits: every code and weight the largest there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from profit.export.network import ActivationCodes, Layer, Network, Step
from profit.export.onnx_export import build_onnx
from profit.export.onnx_layers import bias_rounding
from profit.export.onnx_runtime import executed, run, session
from profit.export.runtime import IntegerRuntime
from tests.tolerances import ONNX_LINEAR

from .against_runtime import compared

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

# name -> (C_out, C_in / groups, kernel, groups); inputs have 32 channels
KINDS = {
    "pointwise": (24, 32, 1, 1),
    "dense": (17, 32, 3, 1),
    "grouped": (16, 8, 3, 4),
    "depthwise": (32, 1, 3, 32),
}
BITS = [(w, a, signed) for w, a in ((2, 8), (4, 4), (4, 8), (7, 7), (8, 7), (8, 8)) for signed in (False, True)]


def extreme_weights(shape, bits, rng):
    """Channels of the largest code, of the smallest, alternating, and random ones of those two."""
    largest = 2 ** (bits - 1) - 1
    weight = torch.where(torch.rand(shape, generator=rng) < 0.5, -largest, largest)
    weight[0::4], weight[1::4] = largest, -largest
    weight[2::4].flatten(1)[:, 1::2] *= -1
    return weight.to(torch.int8)


def layer(name, kind, weight, bits, codes, spread, rng, **settings):
    """A layer whose sums, of magnitudes up to the largest, fill a range of `spread`."""
    bound = weight.long().abs().flatten(1).sum(1).max() * codes.steps
    multiplier = (0.5 + torch.rand(len(weight), generator=rng).double()) * spread / bound
    bias = torch.randn(len(weight), generator=rng).double() * 0.1 * spread
    return Layer(name, kind, weight, bits, codes, "none", multiplier, bias, **settings)


def extreme_images(rng, codes):
    """Images whose codes are the largest, the smallest (or 0), alternating, and random ones; none near a rounding edge."""
    x = torch.randn(8, 32, 6, 6, generator=rng)
    x[0], x[1] = 9.0, -9.0
    x[2] = x[2].sign() * 9 if codes.signed else 9.0
    x[3, ::2], x[3, 1::2] = 9.0, 0.0
    step = codes.interval / codes.steps
    return (x / step).round() * step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("weight_bits", "act_bits", "signed"), BITS)
def test_convolutions(kind, weight_bits, act_bits, signed, rng, monkeypatch):
    monkeypatch.setattr("profit.export.onnx_layers.MAX_BIAS_STEPS", 1.0)  # the sums are looked at, not the bias
    outputs, inputs, size, groups = KINDS[kind]
    codes = ActivationCodes(act_bits, signed, 0.0, 2.0, 2.2)
    weight = extreme_weights((outputs, inputs, size, size), weight_bits, rng)
    first = layer("first", "conv", weight, weight_bits, codes, 3.0, rng, pads=(size // 2,) * 4, groups=groups)
    wide = ActivationCodes(8, signed, 0.0, 3.0, 3.1)
    if not signed:
        first = replace(first, bias=first.bias + 1.5)  # the middle of the range, so that neither end hides a wrong sum
    last = layer("last", "conv", torch.ones(1, outputs, 1, 1, dtype=torch.int8), 2, wide, 1.0, rng)
    steps = (
        Step("layer", ("input",), "y", (-1, outputs, 6, 6), {"layer": "first"}),
        Step("layer", ("y",), "z", (-1, 1, 6, 6), {"layer": "last"}),
    )
    network = Network((-1, 32, 6, 6), "z", steps, {"first": first, "last": last}, {})
    proto, float_layers = build_onnx(network, integer=True)
    assert "first" not in float_layers and executed(proto)["QLinearConv"] == 1
    types = {i.name: i.data_type for i in proto.graph.initializer}
    unsigned, weights = onnx.TensorProto.UINT8, types["first/weight/codes"]
    assert types["first/zero"] == unsigned and (weights == unsigned) == (act_bits == 8), "signed where no pair saturates"
    compared(network, extreme_images(rng, codes), proto, bias_rounding(network))


@pytest.mark.parametrize(("weight_bits", "act_bits", "signed"), BITS)
def test_linear_layers(weight_bits, act_bits, signed, rng):
    """One image is a product of a matrix and a vector, of which onnxruntime has kernels of its own."""
    codes = ActivationCodes(act_bits, signed, 0.0, 2.0, 2.2)
    head = layer("head", "linear", extreme_weights((13, 32 * 36), weight_bits, rng), weight_bits, codes, 1.0, rng)
    steps = (
        Step("reshape", ("input",), "flat", (-1, 32 * 36), {"shape": [-1, 32 * 36]}),
        Step("layer", ("flat",), "y", (-1, 13), {"layer": "head"}),
    )
    network = Network((-1, 32, 6, 6), "y", steps, {"head": head}, {})
    proto, _ = build_onnx(network, integer=True)
    assert executed(proto)["MatMulIntegerToFloat"] == 1
    running, x = session(proto), extreme_images(rng, codes)
    for images in (x, *x.split(1)):
        expected = IntegerRuntime(network)(images).numpy()
        np.testing.assert_allclose(run(running, images).numpy(), expected, **ONNX_LINEAR)
