"""Bit widths, overrides and filters of a conversion, and the layer table."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import nn

from profit import DuQConfig, layer_table, quant_layers, quantize_, set_bits
from profit.nn import QuantConv2d
from tests import tolerances
from tests.profit.conversion_nets import Mobile, Whole

FULL = DuQConfig(weight_bits=None, act_bits=None, padding="zero")


def test_set_bits_follows_own_widths(rng):
    x = torch.randn(2, 3, 16, 16, generator=rng)
    overrides = {"gate.*": {"weight_bits": 6}, "pw": {"act_bits": 8}, "stem": {"act_bits": 5}}
    model = Mobile()
    quantize_(model, DuQConfig(None, None, first_last_bits=8, overrides=overrides), x)
    assert {row.weight_bits for row in layer_table(model)} == {None}
    set_bits(model, weight_bits=4)
    weights = {row.name: row.weight_bits for row in layer_table(model)}
    assert weights == {
        "stem": 8,
        "dw": 4,
        "gate.reduce": 6,
        "gate.expand": 6,
        "pw": 4,
        "expand": 4,
        "grouped": 4,
        "head": 8,
    }
    assert {row.act_bits for row in layer_table(model)} == {None}
    set_bits(model, act_bits=3)
    acts = {row.name: row.act_bits for row in layer_table(model)}
    assert acts.pop("stem") is None and acts.pop("pw") == 8 and set(acts.values()) == {3}
    set_bits(model, weight_bits=None, act_bits=None)
    assert {row.weight_bits for row in layer_table(model)} == {row.act_bits for row in layer_table(model)} == {None}


def test_edge_layers_start_from_their_own_width(rng):
    model = Mobile()
    quantize_(model, DuQConfig(4, None, first_last_bits=8), torch.randn(1, 3, 8, 8, generator=rng))
    peaks = {name: float(layer.weight.detach().abs().max()) for name, layer in quant_layers(model).items()}
    for name, factor in [("stem", 1.0), ("head", 1.0), ("pw", 0.9)]:
        interval = F.softplus(quant_layers(model)[name].weight_quantizer.a)
        torch.testing.assert_close(interval, torch.tensor([peaks[name] * factor]), **tolerances.SOFTPLUS)


def test_overrides_of_kind_and_padding(rng):
    overrides = {"dw": {"padding": "zero"}, "expand": {"kind": "offset", "offset": -1.5}, "head": {"kind": "raw"}}
    model = Mobile()
    rows = {
        row.name: row
        for row in quantize_(model, DuQConfig(overrides=overrides), torch.randn(1, 3, 8, 8, generator=rng))
    }
    assert rows["dw"].pad_value == 0 and rows["dw"].offset == -0.375
    assert (rows["expand"].kind, rows["expand"].offset, rows["expand"].pad_value) == ("offset", -1.5, 0)
    assert rows["head"].kind == "raw" and rows["head"].act_bits is None and rows["head"].weight_bits == 4


def test_skip_and_filter(rng):
    x = torch.randn(1, 3, 8, 8, generator=rng)
    config = DuQConfig(overrides={"gate.*": {"skip": True}})
    model = Mobile()
    table = quantize_(model, config, x, filter_fn=lambda module, name: not isinstance(module, nn.Linear))
    assert [row.name for row in table] == ["stem", "dw", "pw", "expand", "grouped"]
    assert type(model.head) is nn.Linear and type(model.gate.reduce) is nn.Conv2d


def test_shared_layer_is_one_layer_under_both_names(rng):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), conv, nn.ReLU(), conv)
    x = torch.randn(2, 3, 6, 6, generator=rng)
    expected = model(x)
    assert len(quantize_(model, FULL, x)) == 2
    assert model[2] is model[4] and isinstance(model[2], QuantConv2d)
    torch.testing.assert_close(model(x), expected, **tolerances.FUSED_ACTIVATION)
    decided = Whole(lambda net, x: net.b(net.b(F.relu(net.a(x)))))
    assert quantize_(decided, DuQConfig(overrides={"b": {"kind": "signed"}}), x)[1].kind == "signed"


def test_table_text_and_json(rng):
    model = Mobile()
    table = quantize_(model, DuQConfig(4, 3), torch.randn(1, 3, 16, 16, generator=rng))
    lines = str(table).splitlines()
    assert len(lines) == 9 and lines[0].split()[:2] == ["layer", "type"]
    assert "depthwise" in lines[2] and "-0.375" in lines[2] and "hardswish" in lines[2]
    row = json.loads(json.dumps(table[1].to_dict()))
    assert row["kernel"] == [3, 3] and row["stride"] == 2 and row["groups"] == 8 and row["macs"] == 8 * 8 * 8 * 9
    assert row["parameters"] == 72 and row["weight_bits"] == 4 and row["act_bits"] == 3
    assert layer_table(nn.Sequential()) == []
