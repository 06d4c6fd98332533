"""All weights quantized at the start of a model's forward: the same numbers, and no trace outside of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import profit
from profit.nn import weight_batch
from profit.quantize import quant_layers
from tests import tolerances


@pytest.fixture
def net(rng):
    """Stem, depthwise, pointwise and classifier, with BatchNorm, converted; and a batch."""
    torch.manual_seed(rng.initial_seed() % 2**32)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.BatchNorm2d(8), nn.Hardswish(), nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    x = torch.randn(4, 3, 16, 16, generator=rng)
    profit.quantize_(model, profit.DuQConfig(weight_bits=4, act_bits=None), example_inputs=(x,))
    return model, x


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_same_gradients_as_layer_by_layer(net):
    model, x = net
    alone = copy.deepcopy(model)
    weight_batch.detach(alone)
    assert not alone._forward_pre_hooks and not alone._forward_hooks and not alone._forward_hooks_always_called
    calls = count_calls(model, x)
    assert calls["batched"] == len(quant_layers(model)) and count_calls(alone, x)["batched"] == 0
    for (name, mine), theirs in zip(gradients(model, x).items(), gradients(alone, x).values(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.CONV, msg=lambda text, name=name: f"{name}: {text}")


def count_calls(model, x):
    """How many layers took a weight from the batch in one forward."""
    seen = {"batched": 0}

    def look(module, args):
        seen["batched"] += module.batched_weight is not None and module.batched_weight.forward.active

    handles = [layer.register_forward_pre_hook(look) for layer in quant_layers(model).values()]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_outside_the_forward_a_layer_is_on_its_own(net):
    model, x = net
    model(x)
    name, layer = next(iter(quant_layers(model).items()))
    assert layer.ready_weight() is None
    before = layer.quantized_weight()
    with torch.no_grad():
        layer.weight.neg_()
    assert not torch.equal(layer.quantized_weight(), before), "a stale weight"


def test_a_frozen_layer_keeps_its_cache(net):
    model, x = net
    layer = next(iter(quant_layers(model).values()))
    layer.freeze_weight(intervals=True)
    model(x)
    assert not layer.needs_quantized_weight() and layer.ready_weight() is layer.cached_weight()


def test_an_error_in_the_forward_leaves_nothing_behind(net):
    model, x = net
    with pytest.raises(RuntimeError):
        model(x[:, :1])
    assert all(layer.ready_weight() is None for layer in quant_layers(model).values())
    model(x)


def test_copies_and_pickles_carry_no_weights(net):
    model, x = net
    y = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # of our own making
        assert all(layer.batched_weight is None for layer in quant_layers(other).values())
        other.train(model.training)
        torch.testing.assert_close(other(x), y, **tolerances.CONV)


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = model, copy.deepcopy(model), reentrant

    def forward(self, x):
        y = checkpoint(self.first, x, use_reentrant=self.reentrant)
        return y + checkpoint(self.second, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(rng, reentrant):
    torch.manual_seed(rng.initial_seed() % 2**32)
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1))  # noqa: E731
    model = Checkpointed(make(), reentrant)
    x = torch.randn(2, 3, 8, 8, generator=rng, requires_grad=True)
    config = profit.DuQConfig(weight_bits=4, act_bits=None)
    profit.quantize_(model, config, example_inputs=(x.detach(),))
    found = gradients(model, x)
    weight_batch.detach(model)
    for name, expected in gradients(model, x).items():
        torch.testing.assert_close(found[name], expected, **tolerances.CONV)


def test_compiles_in_one_graph(net):
    model, x = net
    expected = gradients(model, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        compiled(x).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, expected[name], **tolerances.CONV)
    assert all(layer.batched_weight is None for layer in quant_layers(model).values())
