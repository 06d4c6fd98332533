"""Rebuilding a converted model from its structure as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import profit
from profit import DuQConfig, calibrate_, layer_table, quant_layers, quantize_, set_bits
from profit.errors import CheckpointError
from tests.profit.conversion_nets import Mobile


@pytest.mark.parametrize("quantizer", ["duq", "lsq"])
def test_rebuilding_without_a_trace(quantizer, rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    config = DuQConfig(
        4, 3, weight_granularity="per_channel", quantizer=quantizer, overrides={"pw": {"weight_bits": 8}}
    )
    model = Mobile().eval()
    table = quantize_(model, config, x)
    calibrate_(model, [x])
    state = json.loads(json.dumps(profit.quantization_state(model)))
    fresh = Mobile().eval()
    rebuilt = profit.apply_quantization_state_(fresh, state)
    fresh.load_state_dict(model.state_dict())
    assert str(rebuilt) == str(table) and torch.equal(fresh(x), model(x))
    set_bits(fresh, 2)
    assert {row.name for row in layer_table(fresh) if row.weight_bits == 8} == {"pw"}
    assert profit.quantization_state(fresh)["layers"]["dw"]["fused_from"] == "act0"


def test_rebuilding_a_part_of_a_model(rng):
    x = torch.randn(4, 3, 16, 16, generator=rng)
    model = nn.Sequential(nn.Identity(), Mobile()).eval()
    quantize_(model[1], DuQConfig(4, 4), x)
    calibrate_(model, [x])
    fresh = nn.Sequential(nn.Identity(), Mobile()).eval()
    profit.apply_quantization_state_(fresh, profit.quantization_state(model))
    fresh.load_state_dict(model.state_dict())
    assert isinstance(fresh[1].act0, nn.Identity) and torch.equal(fresh(x), model(x))


def test_damaged_structure(rng):
    model = Mobile()
    quantize_(model, DuQConfig(4, 4), torch.randn(1, 3, 8, 8, generator=rng))
    state = profit.quantization_state(model)
    wrong = [
        ({**state, "format": 7}, "format"),
        ({**state, "layers": {"nowhere": state["layers"]["dw"]}}, "no module 'nowhere'"),
        ({**state, "layers": {"head": state["layers"]["dw"]}}, "'head' is a Linear"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "kind": "odd"}}}, "'dw' is damaged"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "weight_bits": 11}}}, "'dw' is damaged"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "fused_from": "gone"}}}, "no module 'gone'"),
        ({**state, "layers": {"dw": {**state["layers"]["dw"], "fused_from": "bn0"}}}, "'bn0' is no activation"),
        (
            {**state, "layers": {"dw": {k: v for k, v in state["layers"]["dw"].items() if k != "kind"}}},
            "'dw' is damaged",
        ),
    ]
    for damaged, message in wrong:
        fresh = Mobile()
        with pytest.raises(CheckpointError, match=message):
            profit.apply_quantization_state_(fresh, damaged)
        assert not quant_layers(fresh)
    with pytest.raises(CheckpointError, match="converted already"):
        profit.apply_quantization_state_(model, state)
