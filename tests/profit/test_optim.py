"""Every parameter in the right group, exactly once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from profit.freezing import freeze_all
from profit.nn.baselines import QILWeight
from profit.optim import param_groups
from tests.profit.tiny_net import conv, tiny_net


def by_name(model, groups):
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_groups_of_a_quantized_net(rng):
    net = tiny_net(rng)
    net.dw.weight_quantizer = QILWeight(bits=2)  # a quantizer with a third parameter
    groups = param_groups(net, lr=0.1, weight_decay=4e-5, interval_lr_mult=0.02)
    settings = {g["name"]: (g["lr"], g["weight_decay"], g["lr_mult"]) for g in groups}
    assert settings == {"intervals": (0.002, 0.0, 0.02), "weights": (0.1, 4e-5, 1.0), "norm_bias": (0.1, 0.0, 1.0)}
    names = by_name(net, groups)
    assert names["weights"] == {"stem.weight", "dw.weight", "pw.weight", "head.weight"}
    assert names["norm_bias"] == {f"bn{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")} | {"head.bias"}
    layers, quantizers = ("stem", "dw", "pw", "head"), ("input_quantizer", "weight_quantizer")
    expected = {f"{layer}.{q}.{p}" for layer in layers for q in quantizers for p in "ac"}
    image = {"stem.input_quantizer.a", "stem.input_quantizer.c"}  # not quantized, so without a gradient
    assert names["intervals"] == (expected | {"dw.weight_quantizer.gamma"}) - image
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters())) - 2


class Odd(nn.Module):
    """Shared weights, a scale per channel, an embedding, and a convolution that is transposed."""

    def __init__(self, rng):
        super().__init__()
        self.one, self.two = conv(rng, 3, 3, 1), conv(rng, 3, 3, 1)
        self.two.weight = self.one.weight
        self.alias = self.one
        self.embedding = nn.Embedding(7, 3)
        self.decoder = nn.Linear(3, 7)
        self.decoder.weight = self.embedding.weight
        self.up = nn.ConvTranspose2d(3, 3, 2)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))


def test_shared_parameters_appear_once_and_only_layers_decay(rng):
    model = Odd(rng)
    groups = param_groups(model, 0.1, 1e-4)
    everything = [id(p) for g in groups for p in g["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))
    weights = next(g["params"] for g in groups if g["name"] == "weights")
    assert {id(p) for p in weights} == {id(model.one.weight), id(model.up.weight), id(model.decoder.weight)}
    torch.optim.SGD(groups, momentum=0.9, nesterov=True)


def test_frozen_parameters_are_left_out(rng):
    net = tiny_net(rng)
    freeze_all(net)
    assert [g["name"] for g in param_groups(net, 0.1, 1e-4)] == ["intervals", "norm_bias"]
    freeze_all(net, intervals=True)
    assert [g["name"] for g in param_groups(net, 0.1, 1e-4)] == ["norm_bias"]
    with pytest.raises(ValueError, match="everything is frozen"):
        param_groups(net.requires_grad_(False), 0.1, 1e-4)


def test_ordinary_model_and_wrong_values():
    assert [g["name"] for g in param_groups(nn.Linear(2, 2), 0.1, 0.0)] == ["weights", "norm_bias"]
    assert param_groups(nn.Linear(2, 2), torch.tensor(0.5), 0.0)[0]["lr"] == 0.5


@pytest.mark.parametrize("name", ["lr", "weight_decay", "interval_lr_mult"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, "0.1", None, True, torch.tensor(math.nan)], ids=str)
def test_rates_that_are_none(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a finite number, at least 0; got"):
        param_groups(nn.Linear(2, 2), **({"lr": 0.1, "weight_decay": 0.0} | {name: value}))
