"""What conversion refuses: in one line, by name, and leaving no trace."""

from __future__ import annotations

import copy
import dataclasses
import json
import operator
import pickle
from types import MappingProxyType

import pytest
import torch
from torch import nn

import profit
from profit import DuQConfig, calibrate_, layer_table, quantize_, set_bits
from profit.errors import CalibrationError, ConversionError
from tests.profit.conversion_nets import Between, Mobile


def dead(model):
    nn.init.zeros_(model.b.weight)
    return model


REFUSED = {
    "nothing to convert": (lambda: nn.Sequential(nn.ReLU()), {}, ConversionError, "no convolution or linear layer"),
    "a layer itself": (lambda: nn.Conv2d(3, 4, 1), {}, ConversionError, "nn.Sequential"),
    "Conv1d": (lambda: Between(lambda net, y: y, c=nn.Conv1d(1, 1, 1)), {}, ConversionError, "'c' .Conv1d.*leave it out"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 1)), {}, ConversionError, "ConvTranspose2d is not"),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 1)), {}, ConversionError, "'0' .LazyConv2d.: a lazy layer"),
    "weight norm": (lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))), {}, ConversionError,
                    "'0' .*weight is computed.*remove_parametrizations"),
    "weight norm, old style": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Conv2d(3, 4, 1))), {}, ConversionError,
                               "'0' .*weight is computed.*remove_weight_norm"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), {}, ConversionError, "^0 is scripted"),
    "compiled": (lambda: torch.compile(Mobile(), backend="eager"), {}, ConversionError, "is compiled"),
    "unknown name": (Mobile, {"overrides": {"dww": {"skip": True}}}, ConversionError, "no layer is called 'dww'.*'dw'"),
    "unseen": (lambda: Between(lambda net, y: y, c=nn.Linear(2, 2)), {}, ConversionError, "'c' .Linear. was not seen"),
    "dead weights": (lambda: dead(Between(lambda net, y: y)), {}, CalibrationError, "'b' are all zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_unchanged(name, rng):
    build, settings, error, message = REFUSED[name]
    model = build()
    modules, hooks = list(model.modules()), [len(m._forward_pre_hooks) for m in model.modules()]
    state = {k: v for k, v in model.state_dict().items() if type(v) is torch.Tensor}
    with pytest.raises(error, match=message) as caught:
        quantize_(model, DuQConfig(**settings), torch.randn(1, 3, 8, 8, generator=rng))
    assert "\n" not in str(caught.value)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_converting_twice_changes_nothing(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    model, config = Mobile(), DuQConfig(4, 4, overrides={"stem": {"weight_bits": 8}}, first_last_bits=8)
    table = quantize_(model, config, x)
    modules = list(model.modules())
    again = quantize_(model, DuQConfig.from_dict(json.loads(json.dumps(config.to_dict()))))  # no forward: nothing to look for
    assert again == table and all(a is b for a, b in zip(modules, model.modules(), strict=True))
    set_bits(model, 2, 2)
    assert {row.weight_bits for row in quantize_(copy.deepcopy(model), config, x)} == {2, 8}  # as it stands, not put back
    rebuilt = Mobile()
    profit.apply_quantization_state_(rebuilt, json.loads(json.dumps(profit.quantization_state(model))))
    assert quantize_(rebuilt, config, x) == layer_table(model)


def test_converting_twice_otherwise_is_refused(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    model = Mobile()
    quantize_(model, DuQConfig(), x)
    with pytest.raises(ConversionError, match="converted already.*with padding='negative', not 'zero'.*set_bits"):
        quantize_(model, DuQConfig(padding="zero"), x)
    with pytest.raises(ConversionError, match="'0'.*is not recorded"):
        quantize_(nn.Sequential(profit.nn.QuantConv2d.from_float(nn.Conv2d(3, 4, 1))), DuQConfig(), x)
    with pytest.raises(ConversionError, match="converted already, but layer '1' is not"):
        quantize_(nn.Sequential(model, nn.Linear(5, 2)), DuQConfig(), x)
    skipping = DuQConfig(overrides={"head": {"skip": True}})
    partly = Mobile()
    quantize_(partly, skipping, x)
    assert quantize_(partly, skipping, x) == layer_table(partly)


def test_using_nothing(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    for call in (
        lambda: set_bits(Mobile(), 4),
        lambda: calibrate_(Mobile(), [x]),
        lambda: profit.quantization_state(Mobile()),
    ):
        with pytest.raises(ConversionError, match="quantize_ first"):
            call()
    with pytest.raises(TypeError, match="needs example_inputs"):
        quantize_(Mobile(), DuQConfig())


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_impossible_bits(bits, rng):
    for name in ("weight_bits", "act_bits", "first_last_bits"):
        with pytest.raises(ValueError, match=f"{name}={bits} is out of range: choose 2 to 8"):
            DuQConfig(**{name: bits})
    model = Mobile()
    quantize_(model, DuQConfig(4, 4), torch.randn(1, 3, 8, 8, generator=rng))
    with pytest.raises(ValueError, match="act_bits"):
        set_bits(model, 8, bits)
    assert {row.weight_bits for row in layer_table(model)} == {4}


def test_set_bits_is_all_or_nothing(rng):
    model = Between(lambda net, y: y)
    quantize_(model, DuQConfig(None, None), torch.randn(1, 3, 8, 8, generator=rng))
    nn.init.zeros_(model.b.weight)
    with pytest.raises(CalibrationError, match="'b'"):
        set_bits(model, 4)
    assert {row.weight_bits for row in layer_table(model)} == {None}


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": "reflect"}, {"quantizer": "dorefa"}, {"input_kinds": "auto"}, {"weight_granularity": "row"},
        {"overrides": {"a": {"bits": 4}}}, {"overrides": {"a": {"kind": "offset"}}}, {"overrides": {"a": {"offset": 0.5}}},
        {"overrides": {"a": {"kind": "signed", "offset": -0.5}}}, {"overrides": {"a": {"weight_bits": 1}}},
    ],
)  # fmt: skip
def test_impossible_settings(settings):
    with pytest.raises(ValueError) as caught:
        DuQConfig(**settings)
    assert "\n" not in str(caught.value)


def test_config_as_json():
    config = DuQConfig(3, None, overrides={"a*": {"kind": "offset", "offset": -0.2}})
    assert DuQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="unknown quantization setting 'bits'"):
        DuQConfig.from_dict({"bits": 4})


@pytest.mark.parametrize("wrap", [dict, MappingProxyType])
def test_overrides_are_copied_and_fixed(wrap):
    own = {"a": {"weight_bits": 3}}
    config, same = DuQConfig(overrides=wrap(own)), DuQConfig(overrides={"a": {"weight_bits": 3}})
    own["a"]["weight_bits"] = 99
    own["b"] = {"skip": True}
    assert config == same and hash(config) == hash(same) and config.for_layer("a").weight_bits == 3
    for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert copied == config and hash(copied) == hash(config)
    assert json.loads(json.dumps(dataclasses.asdict(config))) == config.to_dict()
    assert type(config.to_dict()["overrides"]) is dict and type(config.to_dict()["overrides"]["a"]) is dict
    for change in (
        lambda: config.overrides.update(b={}), lambda: config.overrides["a"].pop("weight_bits"),
        lambda: operator.setitem(config.overrides["a"], "weight_bits", 99), lambda: config.overrides.__ior__({}),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
