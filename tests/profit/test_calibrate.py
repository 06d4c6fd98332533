"""Ranges from data: against numpy on what each quantizer sees, in both modes, and with data that gives none."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import DuQConfig, calibrate_, quant_layers, quantize_, set_bits, unfuse_
from profit import calibrate as module_under_test
from profit.errors import CalibrationError
from tests import tolerances
from tests.profit.conversion_nets import Mobile, trained


def converted(rng, **settings):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = trained(Mobile(), x)
    quantize_(model, DuQConfig(**{"weight_bits": None, "act_bits": 4, "padding": "zero", **settings}), x)
    return model, x


def inputs_of(model, batches, mode):
    """What enters each layer of a full-precision run: by name, a numpy array per layer."""
    seen = {}
    plain = copy.deepcopy(model).eval()
    unfuse_(plain)
    for name, layer in quant_layers(plain).items():
        layer.set_act_bits(None)
        layer.register_forward_pre_hook(
            lambda m, args, name=name: seen.setdefault(name, []).append(args[0].double().numpy())
        )
    with torch.no_grad():
        for batch in batches:
            plain(batch)
    return {name: np.concatenate([a.ravel() for a in arrays]) for name, arrays in seen.items()}


def hardswish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def seen_by(quantizer, x):
    h = {"none": lambda x: x, "relu6": lambda x: np.clip(x, 0, 6), "hardswish": hardswish}[quantizer.activation](x)
    return {"unsigned": h, "offset": h - quantizer.offset, "signed": np.abs(h)}[quantizer.kind]


@pytest.mark.parametrize("percentile", [None, 50.0, 95, 99.9, 100, "max"])
@pytest.mark.parametrize("fuse", [True, False])
def test_percentile_of_what_the_quantizer_sees(percentile, fuse, rng):
    model, x = converted(rng, fuse_activations=fuse)
    batches = [x, torch.randn(3, 3, 16, 16, generator=rng) * 2, torch.full((2, 3, 16, 16), 50.0)]
    ranges = calibrate_(model, batches, batches=2, percentile=percentile)  # the third batch is not looked at
    layers = quant_layers(model)
    assert set(ranges) == set(layers) - {"stem"}
    for name, values in inputs_of(model, batches[:2], "corrected").items():
        if name == "stem":
            continue
        quantizer = layers[name].input_quantizer
        seen = seen_by(quantizer, values)
        rank = {"max": 100, None: 99.9}.get(percentile, percentile)
        # Whether a value within a rounding of 0 counts as positive moves the rank by a place: the one range and the other.
        edge = tolerances.PERCENTILE * np.abs(seen).max()
        both = [np.percentile(seen[seen > e], rank) if (seen > e).any() else 1.0 for e in (-edge, edge)]
        assert min(both) * (1 - tolerances.PERCENTILE) <= ranges[name] <= max(both) * (1 + tolerances.PERCENTILE)
        for raw in (quantizer.a, quantizer.c):
            target = torch.tensor([ranges[name]], dtype=torch.float64)
            torch.testing.assert_close(F.softplus(raw.double()), target, **tolerances.CALIBRATED)
        assert quantizer.is_calibrated and bool(quantizer.calibrated)


def test_original_mode_looks_at_the_input_of_the_module(rng):
    """Before the activation, the absolute value and the shift; at a rank, not between two; ReLU6 at most 6."""
    model, x = converted(rng)
    model.grouped.input_quantizer.activation = "relu6"
    big = x * 20
    ranges = calibrate_(model, [big], mode="original")
    for name, values in inputs_of(model, [big], "original").items():
        if name == "stem":
            continue
        positive = np.sort(values[values > 0])
        if len(positive) == 0:
            continue
        expected = positive[int(len(positive) * 0.95)]
        expected = min(expected, 6.0) if model.get_submodule(name).input_quantizer.activation == "relu6" else expected
        assert ranges[name] == pytest.approx(expected, rel=tolerances.PERCENTILE)
    corrected = calibrate_(model, [big], percentile=95)
    assert corrected["dw"] != pytest.approx(ranges["dw"], rel=10 * tolerances.PERCENTILE)


def test_model_is_otherwise_unchanged(rng):
    model, x = converted(rng, weight_bits=4)
    model.train()
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items() if "input_quantizer" not in k}
    modes = [m.training for m in model.modules()]
    hooks = [list(m._forward_pre_hooks) for m in model.modules()]
    calibrate_(model, [(x, torch.zeros(4))], batches=1)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == modes
    assert {layer.input_quantizer.bits for layer in quant_layers(model).values()} == {4, None}
    assert [list(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_forms_of_a_batch(rng):
    model, x = converted(rng)
    ranges = [calibrate_(model, loader) for loader in ([x], iter([(x, 1)]), [[x]], [{"x": x}], [x, x])]
    assert all(r == ranges[0] for r in ranges[:-1])
    assert set(ranges[-1]) == set(ranges[0])
    with pytest.raises(TypeError, match="a batch is a int"):
        calibrate_(model, [3])


def test_ranges_are_carried_on_to_lower_bit_widths(rng):
    model, x = converted(rng)
    calibrate_(model, [x])
    raw = model.dw.input_quantizer.a.clone()
    for bits in (8, 5, 2, None, 4):
        set_bits(model, act_bits=bits)
        model(x)
    assert torch.equal(model.dw.input_quantizer.a, raw)


def test_bounded_memory_keeps_the_percentile(rng, monkeypatch):
    """A uniform part of the values, whatever their order; the maximum stays exact, and twice the same is the same."""
    monkeypatch.setattr(module_under_test, "CAPACITY", 20_000)
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1))
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    values = torch.linspace(1e-3, 1, 64 * 1024).view(16, 1, 64, 64)  # sorted: a part taken from one end would show
    quantize_(model, DuQConfig(None, 4), values[:1])
    batches = list(values.split(2))
    first = calibrate_(model, batches, batches=8, percentile=90)["2"]
    assert first == pytest.approx(0.9, abs=tolerances.SUBSAMPLED_QUANTILE)
    assert calibrate_(model, batches, batches=8, percentile=90)["2"] == first
    assert calibrate_(model, batches, batches=8, percentile="max")["2"] == pytest.approx(1.0, rel=1e-6)


def test_empty_loader_and_bad_data(rng):
    model, x = converted(rng)
    before = model.dw.input_quantizer.a.clone()
    for loader, message in [
        ([], "gave no batch"),
        ([x * math.nan], "the input of layer 'dw' holds NaN or infinity"),
        ([torch.full_like(x, math.inf)], "NaN or infinity"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            calibrate_(model, loader)
    assert torch.equal(model.dw.input_quantizer.a, before) and not model.dw.input_quantizer.is_calibrated
    for arguments in [{"batches": 0}, {"percentile": 0}, {"percentile": 101}, {"mode": "best"}, {"empty_range": -1.0}]:
        with pytest.raises(ValueError):
            calibrate_(model, [x], **arguments)


def test_a_layer_that_sees_zeros_only(rng):
    model, x = converted(rng)
    nn.init.constant_(model.gate.reduce.bias, -100.0)  # a dead ReLU in front of gate.expand
    with pytest.warns(
        UserWarning, match="no positive value at the input of gate.expand; the range there is set to 1.0"
    ):
        ranges = calibrate_(model, [x])
    assert ranges["gate.expand"] == 1.0
    y = model(x)
    assert torch.isfinite(y).all()
    with pytest.warns(UserWarning, match="set to 0.5"):
        assert calibrate_(model, [x], empty_range=0.5)["gate.expand"] == 0.5
    with pytest.raises(CalibrationError, match="'gate.expand' has no positive value.*empty_range"):
        calibrate_(model, [x], empty_range=None)
    silent = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    quantize_(silent, DuQConfig(4, 4), x)
    with pytest.raises(CalibrationError, match="'2' has no positive value"):
        calibrate_(silent, [torch.zeros_like(x)])


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.first(x).relu()
        return self.third(self.second(x).relu() if x.shape[0] == 1 else x)


def test_a_layer_that_does_not_run(rng):
    model = Branch()
    quantize_(model, DuQConfig(4, 4), torch.randn(1, 3, 4, 4, generator=rng))
    with pytest.raises(CalibrationError, match="'second' did not run"):
        calibrate_(model, [torch.randn(2, 3, 4, 4, generator=rng)])


def test_one_sample_and_half_precision(rng):
    model, x = converted(rng)
    single = calibrate_(model, [x[:1]])
    assert all(value > 0 for value in single.values())
    half = calibrate_(model.to(torch.bfloat16), [x[:1].bfloat16()])
    assert half["dw"] == pytest.approx(single["dw"], rel=0.05)
    assert model.dw.input_quantizer.a.dtype == torch.float32


@pytest.mark.parametrize("quantizer", ["pact", "qil", "lsq", "lsq+"])
def test_baseline_quantizers_calibrate_too(quantizer, rng):
    model, x = converted(rng, quantizer=quantizer, weight_bits=4)
    calibrate_(model, [x])
    model.train()(x).sum().backward()
    assert all(layer.input_quantizer.is_calibrated for name, layer in quant_layers(model).items() if name != "stem")
