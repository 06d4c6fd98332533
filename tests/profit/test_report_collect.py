"""What is recorded of a model: layers, histograms and sizes, against values counted by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from profit.config import DuQConfig
from profit.quantize import quantize_, set_bits
from profit.report import collect_layers, model_sizes, weight_histograms
from tests import tolerances


def small_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Hardswish(),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def converted(**config) -> nn.Module:
    model = small_net()
    quantize_(model, DuQConfig(**{"act_bits": None, **config}), example_inputs=(torch.zeros(1, 1, 8, 8),))
    return model


# by hand: conv 4*1*3*3, depthwise 4*1*3*3, linear 4*3
WEIGHTS = (36, 36, 12)
# two BatchNorms with weight, bias, mean, variance of 4 channels; bias of 3
REST = 4 * (2 * 4 * 4 + 3)
# a and c of two quantizers in three layers
INTERVALS = 4 * 2 * 2 * 3


def test_sizes_counted_by_hand():
    sizes = {entry["bits"]: entry["bytes"] for entry in model_sizes(converted())}
    assert sizes[32] == 4 * sum(WEIGHTS) + REST
    for bits in (8, 5, 4, 3, 2):
        assert sizes[bits] == sum(math.ceil(count * bits / 8) for count in WEIGHTS) + REST + INTERVALS
    assert [entry["label"] for entry in model_sizes(converted())] == ["W32", "W8", "W5", "W4", "W3", "W2"]


def test_sizes_follow_layers_with_bits_of_their_own_and_layers_left_out():
    model = converted(overrides={"0": {"weight_bits": 8}, "3": {"weight_bits": None}, "8": {"skip": True}})
    sizes = {entry["bits"]: entry["bytes"] for entry in model_sizes(model, bits=(32, 2))}
    assert sizes[2] == WEIGHTS[0] + 4 * WEIGHTS[1] + 4 * WEIGHTS[2] + REST + INTERVALS * 2 // 3
    assert sizes[32] == 4 * sum(WEIGHTS) + REST


def test_sizes_do_not_depend_on_the_present_bits():
    model = converted()
    before = model_sizes(model)
    set_bits(model, weight_bits=8)
    assert model_sizes(model) == before


def test_histogram_counts_every_weight_once_and_levels_are_the_grid(rng):
    model = converted(weight_bits=3)
    with torch.no_grad():
        model[3].weight.copy_(torch.randn(4, 1, 3, 3, generator=rng))
    entry = weight_histograms(model, bins=16)["3"]
    assert len(entry["edges"]) == 17 and len(entry["counts"]) == 16 and "unit" not in entry
    assert sum(entry["counts"]) == sum(entry["code_counts"]) == 36
    weight = model[3].weight.detach().double()
    for i in range(16):
        low, high = entry["edges"][i], entry["edges"][i + 1]
        inside = ((weight >= low) & (weight < high)).sum().item()
        assert abs(entry["counts"][i] - inside) <= 1  # one weight lies on the last edge, edges are rounded
    # 3 bits signed: codes -3 .. 3; the values are those the layer computes with
    values, counts = torch.unique(model[3].quantized_weight().detach(), return_counts=True)
    used = [(level, count) for level, count in zip(entry["grid"], entry["code_counts"], strict=True) if count]
    assert len(entry["grid"]) == 7
    assert torch.allclose(torch.tensor([v for v, _ in used]), values, **tolerances.GRAD_ELEMENT)
    assert [count for _, count in used] == counts.tolist()


def test_histogram_per_channel_is_in_units_of_the_interval():
    model = converted(weight_bits=4, weight_granularity="per_channel")
    entry = weight_histograms(model)["0"]
    # A starts at 0.9 max|w| of each channel: the largest weight lies at 1 / 0.9, the grid at code / 7
    assert max(map(abs, entry["edges"])) == pytest.approx(1 / 0.9, rel=tolerances.GRAD_ELEMENT["rtol"])
    assert entry["grid"] == pytest.approx([code / 7 for code in range(-7, 8)], rel=tolerances.GRAD_ELEMENT["rtol"])
    assert "A of its channel" in entry["unit"]


def test_histogram_in_full_precision_and_with_broken_weights():
    model = converted(weight_bits=None)
    assert all(entry["grid"] == entry["code_counts"] == [] for entry in weight_histograms(model).values())
    model = converted(weight_bits=4)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
        model[3].weight.fill_(math.inf)
        model[8].weight.fill_(0.25)
    entries = weight_histograms(model)
    assert sum(entries["0"]["counts"]) == 35 and entries["0"]["grid"] == []
    assert "3" not in entries and sum(entries["8"]["counts"]) == 12
    json.dumps(entries, allow_nan=False)
    with pytest.raises(ValueError, match="bins=0"):
        weight_histograms(model, bins=0)


@pytest.mark.parametrize("quantizer", ["lsq", "pact", "qil"])
def test_histogram_of_the_baseline_quantizers_has_their_own_levels(quantizer):
    model = converted(weight_bits=3, quantizer=quantizer)
    entry = weight_histograms(model)["0"]
    assert 1 < len(entry["grid"]) <= 8 and sum(entry["code_counts"]) == 36
    assert collect_layers(model)[0]["A_w"] is None


def test_layer_rows():
    model = converted(weight_bits=4, overrides={"0": {"weight_bits": 8}})
    with torch.no_grad():
        model[3].weight_quantizer.a.fill_(0.0)
        model[3].weight_quantizer.c.fill_(1.0)
    rows = collect_layers(model, {"0": 0.5, "3": 2.0, "8": math.nan}, {"3": 1})
    json.dumps(rows, allow_nan=False)
    first, depthwise, last = rows
    assert [row["name"] for row in rows] == ["0", "3", "8"]
    assert (first["kind"], depthwise["kind"], last["kind"]) == ("raw", "offset", "unsigned")
    assert (first["weight_bits"], depthwise["weight_bits"]) == (8, 4)
    assert depthwise["kernel"] == [3, 3] and depthwise["groups"] == 4 and depthwise["pad_value"] == -0.375
    # softplus(0) = ln 2, softplus(1) = ln(1 + e)
    assert depthwise["A_w"] == pytest.approx(math.log(2)) and depthwise["C_w"] == pytest.approx(math.log(1 + math.e))
    assert depthwise["A_x"] is None and depthwise["C_x"] is None
    assert [(row["aiwq"], row["rank"], row["frozen_stage"]) for row in rows] == [
        (0.5, 2, None),
        (2.0, 1, 1),
        (None, None, None),
    ]
