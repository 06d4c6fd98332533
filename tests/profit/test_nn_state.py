"""Intervals, copies, precision and freezing of the quantized layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit.config import DuQConfig
from profit.errors import CalibrationError, ConversionError
from profit.nn import InputQuantizer, QuantConv2d, QuantLinear, WeightQuantizer
from profit.nn.quantizer import inverse_softplus
from profit.quantize import quantize_, set_bits
from tests import tolerances


@pytest.mark.parametrize("value", [1e-6, 0.01, 1.0, 20.0, 89.0, 1e4])
def test_inverse_softplus(value):
    raw = inverse_softplus(torch.tensor(value, dtype=torch.float32))
    assert torch.isfinite(raw)
    torch.testing.assert_close(F.softplus(raw), torch.tensor(value), **tolerances.SOFTPLUS)


@pytest.mark.parametrize("bits, factor", [(2, 0.9), (4, 0.9), (5, 0.9), (6, 1.0), (8, 1.0)])
@pytest.mark.parametrize("channels", [None, 6])
def test_weight_interval_from_the_weight(bits, factor, channels, rng):
    weight = torch.randn(6, 3, 3, 3, generator=rng)
    weight[2] = 0  # a channel pruned away takes the interval of the tensor
    quantizer = WeightQuantizer(channels=channels, bits=bits)
    quantizer.initialize(weight)
    peak = [weight.abs().max()] if channels is None else [w.abs().max() if i != 2 else weight.abs().max()
                                                          for i, w in enumerate(weight)]  # fmt: skip
    expected = torch.stack(peak) * factor
    torch.testing.assert_close(F.softplus(quantizer.a), expected, **tolerances.SOFTPLUS)
    torch.testing.assert_close(quantizer.c, quantizer.a)


def test_intervals_are_set_once_and_carried_on(rng):
    layer = QuantConv2d.from_float(nn.Conv2d(3, 4, 3), DuQConfig(None, None))
    assert not layer.weight_quantizer.is_initialized
    layer.set_weight_bits(8)
    first = layer.weight_quantizer.a.clone()
    torch.testing.assert_close(F.softplus(first), layer.weight.abs().max().view(1), **tolerances.SOFTPLUS)
    with torch.no_grad():
        layer.weight.mul_(2)
    for bits in (4, None, 2):
        layer.set_weight_bits(bits)
        assert torch.equal(layer.weight_quantizer.a, first)
    assert layer.quantized_weight().unique().numel() <= 3  # ternary


def test_own_bits():
    config = DuQConfig(4, 4, overrides={"x": {"weight_bits": 8, "act_bits": None}, "z*": {"weight_bits": None}})
    layer = QuantConv2d.from_float(nn.Conv2d(3, 4, 3), config, name="x")
    assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (8, None)
    layer.set_weight_bits(2)
    layer.set_act_bits(2)
    assert (layer.weight_quantizer.bits, layer.input_quantizer.bits) == (8, None)
    layer.set_weight_bits(None)  # full precision holds for every layer
    assert layer.weight_quantizer.bits is None
    assert QuantConv2d.from_float(nn.Conv2d(3, 4, 3), config, name="zz").weight_quantizer.bits is None


def test_uncalibrated_forward_is_refused(rng):
    for layer, x in [
        (QuantConv2d.from_float(nn.Conv2d(3, 4, 3), name="stem"), torch.randn(1, 3, 5, 5)),
        (QuantConv2d.from_float(nn.Conv2d(3, 3, 3, groups=3), name="stem"), torch.randn(1, 3, 5, 5)),
        (QuantLinear.from_float(nn.Linear(3, 4), name="stem"), torch.randn(1, 3)),
    ]:
        with pytest.raises(CalibrationError, match="'stem' has no range yet.*calibrate_"):
            layer(x)
        layer.set_act_bits(None)
        layer.weight_quantizer.bits, layer.weight_quantizer._ready = 4, False
        layer.weight_quantizer.initialized.fill_(0)
        with pytest.raises(CalibrationError, match="weight interval of layer 'stem'"):
            layer(x)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_impossible_range(value):
    quantizer = InputQuantizer("unsigned", bits=4)
    with pytest.raises(CalibrationError, match="positive and finite"):
        quantizer.set_range(value)
    assert not quantizer.is_calibrated


@pytest.mark.parametrize("weight", [torch.zeros(2, 2, 1, 1), torch.full((2, 2, 1, 1), math.nan)])
def test_weights_without_interval(weight):
    conv = nn.Conv2d(2, 2, 1)
    conv.weight.data = weight
    with pytest.raises(CalibrationError, match="'dead'.*all zero or not finite"):
        QuantConv2d.from_float(conv, name="dead")


def test_wrong_settings_of_a_quantizer():
    for arguments in [{"kind": "odd"}, {"activation": "silu"}, {"bits": 1}, {"kind": "offset"}, {"offset": -0.5}]:
        with pytest.raises(ValueError):
            InputQuantizer(**arguments)
    with pytest.raises(ValueError):
        WeightQuantizer(bits=9)


def ready_layer(rng, groups=4, bits=4):
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
    layer = QuantConv2d.from_float(conv, DuQConfig(bits, bits), kind="offset", offset=-0.375, activation="hardswish")
    layer.input_quantizer.set_range(2.0)
    return layer, torch.randn(2, 4, 6, 6, generator=rng)


@pytest.mark.parametrize("groups", [1, 4])
def test_copies_and_state_dict(groups, rng):
    layer, x = ready_layer(rng, groups)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    other, _ = ready_layer(rng, groups)
    other.input_quantizer._ready = False
    other.input_quantizer.calibrated.fill_(False)
    other.load_state_dict(layer.state_dict())
    assert other.input_quantizer.is_calibrated and torch.equal(other(x), y)
    assert {"weight", "bias"} <= set(layer.state_dict())


@pytest.mark.parametrize("groups", [1, 4])
def test_intervals_stay_in_float32_in_a_half_precision_model(groups, rng):
    layer, x = ready_layer(rng, groups)
    a = layer.input_quantizer.a.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and torch.equal(layer.input_quantizer.a, a)
    y = layer(x.bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight_quantizer.a.grad.dtype == torch.float32
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def test_from_float_shares_parameters_and_leaves_the_random_state(rng):
    conv, calls = nn.Conv2d(3, 4, 3).eval(), []
    handle = conv.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    layer = QuantConv2d.from_float(conv, DuQConfig(None, None))
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.weight is conv.weight and layer.bias is conv.bias and not layer.training
    layer(torch.randn(1, 3, 4, 4))
    handle.remove()
    layer(torch.randn(1, 3, 4, 4))
    assert calls == [1]


class Odd(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class OddLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_unknown_layers_are_refused():
    with pytest.raises(ConversionError, match="'x'.*Odd is a Conv2d with a forward of its own"):
        QuantConv2d.from_float(Odd(3, 4, 1), name="x")
    with pytest.raises(ConversionError, match="'x'.*OddLinear is a Linear with a forward of its own"):
        QuantLinear.from_float(OddLinear(3, 4), name="x")
    with pytest.raises(ConversionError, match="'x'.*lazy"):
        QuantLinear.from_float(nn.LazyLinear(4), name="x")
    with pytest.raises(ConversionError, match="weight is computed"):
        QuantConv2d.from_float(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), name="x")


# ---- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 4])
def test_frozen_weight_has_no_gradient_and_is_quantized_once(groups, rng, monkeypatch):
    layer, x = ready_layer(rng, groups)
    y = layer(x)
    layer.freeze_weight()
    layer(x).sum().backward()
    assert layer.frozen and layer.weight.grad is None and layer.weight_quantizer.a.grad is not None
    assert layer.cached_weight() is None  # its intervals still train
    layer.freeze_weight(intervals=True)
    monkeypatch.setattr(layer.weight_quantizer, "fake_quantize", lambda w: pytest.fail("quantized again"))
    layer.weight_quantizer.a.grad = None
    frozen = layer(x)
    frozen.sum().backward()
    assert torch.equal(frozen, y) and layer.weight_quantizer.a.grad is None
    assert not layer.quantized_weight().requires_grad
    monkeypatch.undo()
    layer.unfreeze_weight()
    layer(x).sum().backward()
    assert not layer.frozen and layer.weight.grad is not None and torch.equal(layer(x), y)


@pytest.mark.parametrize("groups", [1, 4])
def test_cache_follows_every_change(groups, rng):
    layer, x = ready_layer(rng, groups)
    layer.freeze_weight(intervals=True)

    def fresh():
        plain = copy.deepcopy(layer)
        plain.unfreeze_weight()
        return plain(x)

    layer.set_weight_bits(2)
    assert torch.equal(layer(x), fresh())
    with torch.no_grad():
        layer.weight.lerp_(torch.ones_like(layer.weight), 0.5)  # as an EMA does
    assert torch.equal(layer(x), fresh())
    other, _ = ready_layer(rng, groups)
    other.set_weight_bits(2)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), fresh()) and torch.equal(layer(x), other(x))
    layer.double()
    assert layer.quantized_weight().dtype == torch.float64
    layer.float()
    layer.set_weight_bits(None)
    assert layer.cached_weight() is None and layer.quantized_weight() is layer.weight
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.parametrize("quantizer", ["duq", "pact", "qil", "lsq", "lsq+"])
@pytest.mark.parametrize("frozen", [False, True])
def test_to_empty_sets_nothing(quantizer, frozen, rng, monkeypatch):
    source, x = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8, generator=rng)
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        quantize_(model, DuQConfig(4, 4, quantizer=quantizer), torch.empty(1, 3, 8, 8))
    layer = model[0]
    if frozen:
        layer.freeze_weight(intervals=True)
    garbage = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kwargs: garbage(t, **kwargs).fill_(float("nan")))
    model.to_empty(device="cpu")
    monkeypatch.undo()
    layer.load_state_dict(source.state_dict(), strict=False)
    assert not layer.weight_quantizer.is_initialized and layer.weight_quantizer.initialized == 0
    assert not layer.input_quantizer.is_calibrated and all(p.isfinite().all() for p in layer.parameters())
    with pytest.raises(CalibrationError, match="weight interval of layer '0' is not set.*set_bits"):
        model(x)
    set_bits(model, 4)
    fresh = nn.Sequential(source)
    quantize_(fresh, DuQConfig(4, 4, quantizer=quantizer), x)
    assert torch.equal(model(x), fresh(x))
