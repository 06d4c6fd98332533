"""PACT, QIL, LSQ and LSQ+ in use: ranges, lower bit widths, quantized layers, half precision, refused values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit.config import DuQConfig
from profit.errors import CalibrationError
from profit.nn.baselines import BASELINES, PACTInput, QILInput, pact_penalty
from profit.nn.conv import QuantConv2d
from profit.optim import param_groups


def test_negative_ranges_are_lost_by_pact_and_qil_only():
    x = torch.linspace(-6, 3, 9001)
    worst = {}
    for name, (cls, _) in BASELINES.items():
        q = cls(kind="offset", offset=-0.375, activation="hardswish", bits=4)
        q.set_range(3.375)
        y = q(x)
        if name == "qil":
            y = y * 3
        worst[name] = (y - F.hardswish(x)).abs().max().item()
        assert (y.min() < -0.1) == (name in ("lsq", "lsq+"))
    # half a step everywhere, except where the negative part of -3/8 becomes 0
    assert worst["lsq+"] == pytest.approx(3.375 / 15 / 2, rel=0.01)
    assert worst["lsq"] == pytest.approx(3 / 7 / 2, rel=0.01)
    assert worst["pact"] == worst["qil"] == pytest.approx(0.375, rel=0.01)


@pytest.mark.parametrize("name", BASELINES)
def test_range_is_carried_on_to_lower_bits(name, rng):
    x = torch.rand(4, 50, generator=rng) * 2
    input_class, weight_class = BASELINES[name]
    q = input_class(kind="unsigned", bits=8)
    q.set_range(2.0)
    error = {}
    for bits in (8, 5, 4):
        q.bits = bits
        scale = 2.0 if name == "qil" else 1.0
        error[bits] = (q(x) * scale - x).abs().max().item()
        assert error[bits] <= 1.001 * (2.0 / (2**bits - 1)) / 2
    w = torch.randn(6, 5, 3, 3, generator=rng)
    for channels in (None, 6):
        q = weight_class(channels=channels, bits=8)
        q.initialize(w)
        q.bits = 4
        assert len(q(w).unique()) <= (16 if channels is None else 16 * 6)
        assert F.cosine_similarity(q(w).flatten(), w.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("name", BASELINES)
def test_through_a_quantized_layer(name, granularity, rng):
    float_conv = nn.Conv2d(6, 8, 3, padding=1)
    config = DuQConfig(weight_bits=8, act_bits=8, quantizer=name, weight_granularity=granularity, padding="zero")
    layer = QuantConv2d.from_float(
        float_conv, config, kind="offset", offset=-0.375, activation="hardswish", ranked=True
    )
    x = torch.randn(4, 6, 8, 8, generator=rng)
    with pytest.raises(CalibrationError):
        layer(x)
    layer.input_quantizer.set_range(1.5)  # clips some of the data, which PACT needs for a gradient
    net = nn.Sequential(layer, nn.BatchNorm2d(8))
    target = torch.randn(4, 8, 8, 8, generator=rng)
    optimizer = torch.optim.SGD(param_groups(net, lr=0.03, weight_decay=0.0))
    for bits in (8, 3):
        layer.set_weight_bits(bits)
        layer.set_act_bits(bits)
        losses = []
        for _ in range(4):
            loss = F.mse_loss(net(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert layer.input_quantizer.a.grad.abs().sum() > 0
    twin = copy.deepcopy(net)
    fresh = nn.Sequential(
        QuantConv2d.from_float(
            nn.Conv2d(6, 8, 3, padding=1), config, kind="offset", offset=-0.375, activation="hardswish"
        ),
        nn.BatchNorm2d(8),
    )
    fresh.load_state_dict(net.state_dict())
    fresh[0].set_weight_bits(3)
    fresh[0].set_act_bits(3)
    assert torch.equal(twin(x), net(x)) and torch.equal(fresh(x), net(x))
    layer.freeze_weight(intervals=True)
    assert torch.equal(layer.quantized_weight(), twin[0].quantized_weight()) and layer.cached_weight() is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASELINES)
def test_half_precision_and_special_values(name, dtype, rng):
    input_class, weight_class = BASELINES[name]
    q = input_class(kind="offset", offset=-0.375, bits=4)
    q.set_range(2.0)
    x = torch.randn(3, 70, generator=rng).to(dtype)
    assert torch.equal(q(x), q(x.float()).to(dtype)) and q(x).dtype == dtype
    special = q(torch.tensor([math.nan, math.inf, -math.inf]))
    assert special[0].isnan() and special[1:].isfinite().all()
    assert q(torch.empty(0, 3)).shape == (0, 3)
    w = weight_class(bits=4)
    w.initialize(torch.randn(4, 4, 3, 3, generator=rng).to(dtype))
    assert w(torch.randn(4, 4, 3, 3, generator=rng).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", BASELINES)
def test_impossible_ranges_are_refused(name):
    input_class, weight_class = BASELINES[name]
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(CalibrationError):
            input_class(bits=4).set_range(value)
    if name != "lsq+":
        with pytest.raises(CalibrationError, match="positive"):  # all data below 0
            input_class(kind="offset", offset=-0.375, bits=4).set_range(0.3)
    for bad in (torch.zeros(2, 2, 1, 1), torch.full((2, 2, 1, 1), math.inf)):
        with pytest.raises(CalibrationError):
            weight_class(bits=4).initialize(bad)


def test_pact_penalty(rng):
    net = nn.Sequential(
        QuantConv2d(2, 2, 1, input_quantizer=PACTInput(bits=4)), QuantConv2d(2, 2, 1, input_quantizer=PACTInput(bits=4))
    )
    net[0].input_quantizer.set_range(2.0)
    net[1].input_quantizer.set_range(3.0)
    penalty = pact_penalty(net)
    penalty.backward()
    assert penalty.item() == 2.0**2 + 3.0**2 and net[1].input_quantizer.a.grad.item() == 6.0
    with pytest.raises(ValueError, match="no active PACT"):
        pact_penalty(nn.Sequential(QuantConv2d(2, 2, 1, input_quantizer=QILInput())))
