"""Which layers a stage freezes, and that frozen means not trained at all."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import nn

from profit.freezing import ProgressiveFreezer, freeze_all, release_all
from profit.nn.conv import QuantConv2d
from profit.optim import param_groups
from tests.profit.tiny_net import batch, tiny_net, train_step


def many_convs(count):
    return nn.Sequential(*(QuantConv2d(1, 1, 1, ranked=True) for _ in range(count)))


def frozen_layers(model):
    return {name for name, m in model.named_modules() if isinstance(m, QuantConv2d) and not m.weight.requires_grad}


@pytest.mark.parametrize(
    ("count", "stages", "expected"), [(52, 3, [0, 17, 34, 52]), (53, 4, [0, 13, 26, 39, 53]), (2, 3, [0, 0, 1, 2])]
)
def test_numbers_and_order(count, stages, expected):
    model = many_convs(count)
    scores = {str(i): float(score) for i, score in enumerate(random.sample(range(1000), count))}
    freezer = ProgressiveFreezer(model, scores, stages)
    for stage, number in enumerate(expected):
        names = freezer.apply(stage)
        assert len(names) == number and frozen_layers(model) == set(names)
        kept = set(scores) - set(names)
        assert all(scores[a] > scores[b] for a, b in itertools.product(names, kept))
        assert [scores[n] for n in names] == sorted((scores[n] for n in names), reverse=True)


def test_ties_go_by_name_and_names_match_exactly():
    model = many_convs(12)
    freezer = ProgressiveFreezer(model, dict.fromkeys(["1", "10", "11", "2"], 0.5), stages=4)
    assert freezer.order == ["1", "10", "11", "2"]
    assert freezer.apply(1) == ["1"]
    assert frozen_layers(model) == {"1"}  # not "10" and "11", which contain it


def test_any_order_of_stages_gives_the_same(rng):
    model = many_convs(9)
    scores = {str(i): float(torch.rand(1, generator=rng)) for i in range(9)}
    freezer = ProgressiveFreezer(model, scores)
    expected = [set(freezer.frozen_names(stage)) for stage in range(4)]
    for stage in random.choices(range(4), k=20):
        freezer.apply(stage)
        freezer.apply(stage)
        assert frozen_layers(model) == expected[stage] and freezer.stage == stage
    freezer.release()
    assert not frozen_layers(model) and freezer.stage is None


@pytest.mark.parametrize("freeze", ["weights", "weights+intervals"])
def test_frozen_weights_do_not_move(rng, freeze):
    net = tiny_net(rng)
    frozen = ProgressiveFreezer(net, {"stem": 0.1, "dw": 0.3, "pw": 0.2}, freeze=freeze).apply(1)
    assert frozen == ["dw"]
    optimizer = torch.optim.SGD(param_groups(net, 0.1, 1e-2), momentum=0.9, nesterov=True)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    quantized = net.dw.quantized_weight().detach().clone()
    for _ in range(3):
        train_step(net, optimizer, *batch(rng))
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert net.dw.weight.grad is None and "dw.weight" not in moved
    assert {"stem.weight", "pw.weight", "head.weight", "bn2.weight", "dw.input_quantizer.a"} <= moved
    if freeze == "weights":
        # BatchNorm takes the scale out again, so the gradient of c is all but zero: it exists, but need not move c.
        assert "dw.weight_quantizer.a" in moved and net.dw.weight_quantizer.c.grad is not None
    else:
        assert net.dw.weight_quantizer.a.grad is None
        assert torch.equal(net.dw.quantized_weight(), quantized) and net.dw.cached_weight() is not None


def test_left_over_gradient_is_dropped(rng):
    net = tiny_net(rng)
    optimizer = torch.optim.SGD(param_groups(net, 0.1, 0.0))
    train_step(net, optimizer, *batch(rng))
    before = net.dw.weight.detach().clone()
    ProgressiveFreezer(net, {"dw": 1.0}, stages=1).apply(1)
    optimizer.step()  # an optimizer built before, whose gradients were not cleared
    assert torch.equal(net.dw.weight, before)


def test_shared_weight_stays_frozen_whatever_the_order_of_names():
    for order in (("a", "b"), ("b", "a")):
        model = nn.ModuleDict({name: QuantConv2d(1, 1, 1, ranked=True) for name in "ab"})
        model["a"].weight = model["b"].weight
        freezer = ProgressiveFreezer(model, {order[0]: 2.0, order[1]: 1.0}, stages=2)
        freezer.apply(2)
        freezer.apply(1)
        assert not model["a"].weight.requires_grad


def test_state_dict_round_trip(rng):
    net = tiny_net(rng)
    freezer = ProgressiveFreezer(net, {"stem": 0.1, "dw": 0.3, "pw": 0.2})
    freezer.apply(2)
    fresh = tiny_net(rng)
    other = ProgressiveFreezer(fresh, {"stem": 1.0})
    other.load_state_dict(freezer.state_dict())
    assert frozen_layers(fresh) == {"dw", "pw"} and other.order == freezer.order and other.stage == 2
    freezer.release()
    other.load_state_dict(freezer.state_dict())
    assert not frozen_layers(fresh)
    with pytest.raises(ValueError, match="stages=3"):
        ProgressiveFreezer(fresh, {"stem": 1.0}, stages=2).load_state_dict(freezer.state_dict())


@pytest.mark.parametrize("intervals", [False, True])
def test_freeze_all_leaves_batchnorm_and_biases(rng, intervals):
    net = tiny_net(rng)
    net.append(nn.Linear(5, 5))  # an ordinary layer counts too
    train_step(net, torch.optim.SGD(net.parameters(), 0.0), *batch(rng))
    assert freeze_all(net, intervals) == ["stem", "dw", "pw", "head", "9"]
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    norm_bias = {f"bn{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")} | {"head.bias", "9.bias"}
    if intervals:
        assert trains == norm_bias
    else:
        assert trains > norm_bias and not any(
            name.endswith(("stem.weight", "dw.weight", "head.weight")) for name in trains
        )
        assert {"dw.weight_quantizer.a", "dw.input_quantizer.c"} <= trains
    assert net.dw.weight.grad is None and net[-1].weight.grad is None
    release_all(net)
    image = {"stem.input_quantizer.a", "stem.input_quantizer.c"}
    assert {name for name, p in net.named_parameters() if not p.requires_grad} == image


def test_bad_scores_and_stages(rng):
    net = tiny_net(rng)
    for scores, message in (
        ({}, "no scores"),
        ({"module.dw": 1.0, "dw": 0.5}, "module.dw"),
        ({"bn1": 1.0}, "bn1"),
        ({"dw": float("nan")}, "not finite.*dw"),
    ):
        with pytest.raises(ValueError, match=message):
            ProgressiveFreezer(net, scores)
    with pytest.raises(ValueError, match="stages"):
        ProgressiveFreezer(net, {"dw": 1.0}, stages=0)
    with pytest.raises(ValueError, match="freeze"):
        ProgressiveFreezer(net, {"dw": 1.0}, freeze="all")
    for stage in (-1, 4):
        with pytest.raises(ValueError, match="0..3"):
            ProgressiveFreezer(net, {"dw": 1.0}).apply(stage)


@pytest.mark.parametrize("value", [2.5, "3", True, None])
def test_numbers_that_are_no_stage(rng, value):
    net = tiny_net(rng)
    with pytest.raises(ValueError, match="stages must be a whole number, at least 1; got"):
        ProgressiveFreezer(net, {"dw": 1.0}, stages=value)
    freezer = ProgressiveFreezer(net, {"dw": 1.0})
    for call in (freezer.apply, freezer.frozen_names):
        with pytest.raises(ValueError, match="stage must be a whole number, within 0..3; got"):
            call(value)
    assert freezer.stage is None and not frozen_layers(net)


@pytest.mark.parametrize(("scores", "error"), [
    (["dw"], TypeError), ("dw", TypeError), (None, TypeError), ({"dw": "high"}, ValueError), ({3: 1.0, "x": 1.0}, ValueError),
])  # fmt: skip
def test_scores_that_are_none(rng, scores, error):
    with pytest.raises(error) as caught:
        ProgressiveFreezer(tiny_net(rng), scores)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [
    None, {}, {"stages": 3}, {"stages": 3, "freeze": "weights", "scores": {"dw": 1.0}, "stage": "2"},
    {"stages": 3, "freeze": "weights", "scores": ["dw"], "stage": 2},
])  # fmt: skip
def test_damaged_state_changes_nothing(rng, state):
    net = tiny_net(rng)
    freezer = ProgressiveFreezer(net, {"pw": 1.0})
    freezer.apply(3)
    with pytest.raises(ValueError, match="^saved "):
        freezer.load_state_dict(state)
    assert freezer.order == ["pw"] and freezer.stage == 3 and frozen_layers(net) == {"pw"}
