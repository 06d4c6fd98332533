"""Conversion of what users write themselves: every odd construction converts rightly, or is refused with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import DuQConfig, calibrate_, layer_table, quant_layers, quantize_
from profit.dataflow.refusal import skip_patterns
from profit.errors import ConversionError
from tests import tolerances
from tests.profit.conversion_nets import Whole, trained

FULL = DuQConfig(None, None, padding="zero")


class Twins(nn.Module):
    """Two images and a number for each, through one shared stem that is registered under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.right = self.left
        self.mix = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, left, right, *, number):
        y = F.hardswish(self.mix(torch.cat([self.left(left), self.right(right)], 1)))
        return self.head(torch.cat([y.mean((2, 3)), number], 1))


class DictNet(nn.Module):
    """A batch as a dictionary goes in, a dictionary of two outputs comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, batch):
        y = F.relu6(self.stem(batch["image"]) + batch["shift"]).mean((2, 3))
        return {"a": self.a(y), "b": self.b(y)}


class Reflect(nn.Module):
    """Borders that are no constant, in front of an offset input."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
        self.dw = nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode=mode)
        self.wide = nn.Conv2d(4, 2, (1, 5), padding=(0, 2), padding_mode=mode)

    def forward(self, x):
        return self.wide(F.silu(self.dw(F.hardswish(self.stem(x)))))


def image(rng, size=8):
    return torch.randn(2, 3, size, size, generator=rng)


# name: (net, inputs for rng, kinds in the order of the layers)
NETS = {
    "shared module, two inputs": (
        Twins, lambda rng: {"left": image(rng), "right": image(rng), "number": torch.randn(2, 1, generator=rng)},
        ["raw", "unsigned", "signed"],
    ),
    "dict in, dict out": (
        DictNet, lambda rng: ({"image": image(rng), "shift": torch.ones(1)},), ["raw", "unsigned", "unsigned"],
    ),
    "reflect": (lambda: Reflect("reflect"), image, ["raw", "offset", "offset"]),
    "circular": (lambda: Reflect("circular"), image, ["raw", "offset", "offset"]),
    "replicate": (lambda: Reflect("replicate"), image, ["raw", "offset", "offset"]),
    "same": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, (3, 5), padding="same"), nn.SiLU(), nn.Conv2d(4, 4, 4, padding="same", dilation=2)
        ), image, ["raw", "offset"],
    ),
    "nested Sequential": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU6())), nn.Sequential(nn.Conv2d(4, 2, 1))),
        image, ["raw", "unsigned"],
    ),
    "decomposed h-swish, residual": (
        lambda: Whole(lambda net, x: (lambda y: net.b(y * (y + 3).clamp(0, 6) / 6) + y)(net.a(x))), image, ["raw", "offset"],
    ),
    "a conv used twice": (
        lambda: Whole(lambda net, x: net.b(F.relu(net.b(F.relu(net.a(x)))))), image, ["raw", "unsigned"],
    ),
    "one activation module everywhere": (
        lambda: Whole(lambda net, x: net.act(net.b(net.act(net.a(x)))), act=nn.Hardswish()), image, ["raw", "offset"],
    ),
    "weight norm, folded": (
        lambda: nn.Sequential(
            nn.utils.parametrize.remove_parametrizations(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), "weight"
            ), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ), image, ["raw", "unsigned"],
    ),
}  # fmt: skip


def call(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def parts(output):
    return list(output.values()) if isinstance(output, dict) else [output]


@pytest.mark.parametrize("name", NETS)
def test_own_nets(name, rng):
    build, make, kinds = NETS[name]
    model, inputs = build(), make(rng)
    original = copy.deepcopy(model)
    table = quantize_(model, FULL, inputs)
    assert [row.kind for row in table] == kinds
    for ours, expected in zip(parts(call(model, inputs)), parts(call(original, inputs)), strict=True):
        torch.testing.assert_close(ours, expected, **tolerances.FUSED_ACTIVATION)
    negative = copy.deepcopy(original)
    quantize_(negative, DuQConfig(4, 4), inputs)
    for layer in quant_layers(negative).values():
        layer.input_quantizer.set_range(3.0) if layer.input_quantizer.kind != "raw" else None
    loss = sum(part.square().mean() for part in parts(call(negative, inputs)))
    loss.backward()
    assert all(bool(torch.isfinite(layer.weight.grad).all()) for layer in quant_layers(negative).values())
    copied = copy.deepcopy(negative)
    assert all(torch.equal(a, b) for a, b in zip(parts(call(copied, inputs)), parts(call(negative, inputs)), strict=True))


def test_a_border_that_is_no_constant_is_not_padded_with_the_offset(rng):
    table = quantize_(Reflect("reflect"), DuQConfig(4, 4), image(rng))
    assert [row.pad_value for row in table] == [0, 0, 0]


def test_a_shared_module_stays_shared(rng):
    model = Twins()
    inputs = {"left": image(rng), "right": image(rng), "number": torch.randn(2, 1, generator=rng)}
    quantize_(model, FULL, inputs)
    assert model.left[0] is model.right[0] and len(quant_layers(model)) == 3


class OwnWeight(nn.Module):
    """A convolution or a product with a weight that no layer of torch holds."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(4, 4, 1, 1))
        self.register_buffer("blur", torch.full((4, 1, 3, 3), 1 / 9))

    def forward(self, x):
        if self.how == "conv":
            return F.conv2d(x, self.weight)
        if self.how == "standardised":
            return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std())
        if self.how == "conditional":
            mixed = x.mean((0, 2, 3)).softmax(0) @ self.weight.flatten(1)
            return F.conv2d(x, mixed.view(1, 4, 1, 1).expand(4, 4, 1, 1))
        if self.how == "blur":
            return F.conv2d(x, self.blur, groups=4)
        if self.how == "attention":
            flat = x.flatten(2)
            return (flat @ (flat.transpose(1, 2) @ flat).softmax(-1)).view_as(x)
        return x * self.weight.mean() + self.weight.flatten(1).mean(1)[:, None, None]


def own_weight(how):
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), OwnWeight(how), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("how", ["conv", "standardised", "conditional"])
def test_a_weight_outside_of_the_layers_is_refused_or_left_out(how, rng):
    with pytest.raises(ConversionError, match="'2' .OwnWeight.: a .* outside of Conv2d and Linear.*'2': {'skip': True}"):
        quantize_(own_weight(how), FULL, image(rng))
    assert len(quantize_(own_weight(how), DuQConfig(overrides={"2": {"skip": True}}), image(rng))) == 2
    assert len(quantize_(own_weight(how), FULL, image(rng), filter_fn=lambda m, name: not isinstance(m, OwnWeight))) == 2


@pytest.mark.parametrize("how", ["blur", "attention", "scaling"])
def test_fixed_filters_attention_and_scaling_are_no_layers(how, rng):
    assert len(quantize_(own_weight(how), FULL, image(rng))) == 2


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 1)
        self.aux = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = F.relu(self.body(x))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_the_way_out_of_a_refusal_works(rng):
    """The overrides that a message proposes are evaluated as they stand, and the model converts."""
    for net, layers in ((Auxiliary(), 2), (nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1), nn.Conv2d(3, 4, 1)), 1)):
        with pytest.raises(ConversionError, match="and 1 more layer") as caught:
            quantize_(net, FULL, image(rng))
        text = str(caught.value).split("overrides=")[1].removesuffix(" or filter_fn")
        if isinstance(net, Auxiliary):
            assert len(quantize_(net, DuQConfig(None, None, overrides=eval(text)), image(rng))) == layers
        else:
            assert eval(text) == {"0": {"skip": True}, "1": {"skip": True}}


def test_skip_patterns_match_what_they_should_and_nothing_else():
    names = ["aux1.conv", "aux1.fc", "aux2.conv", "aux2.fc"]
    assert skip_patterns(names, ["body.conv", "fc"]) == ["aux1.*", "aux2.*"]
    assert skip_patterns(["a.attn.conv", "b.attn.conv"], ["a.conv", "b.conv"]) == ["*.attn.conv"]
    assert skip_patterns(["a.x", "b.y"], ["a.y"]) == ["a.x", "b.y"]
    assert skip_patterns(["only"], []) == ["only"]


def test_overrides_by_name_and_pattern_and_edge_bits(rng):
    net = nn.Sequential()
    for index, (cin, cout) in enumerate(((3, 4), (4, 4), (4, 4), (4, 2))):
        net.add_module(f"c{index}", nn.Conv2d(cin, cout, 1))
    overrides = {"c*": {"weight_bits": 5}, "c2": {"weight_bits": 3, "act_bits": None}, "c1": {"skip": True}}
    table = quantize_(net, DuQConfig(4, 4, first_last_bits=8, overrides=overrides), image(rng))
    assert {row.name: (row.weight_bits, row.act_bits) for row in table} == {
        "c0": (5, None), "c2": (3, None), "c3": (5, 4),
    }  # fmt: skip
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    assert [row.weight_bits for row in quantize_(plain, DuQConfig(4, 4, first_last_bits=8), image(rng))] == [8, 4, 8]


@pytest.mark.parametrize("when", ["before calibration", "after calibration"])
def test_averages_of_weights(when, rng):
    """torch's AveragedModel with buffers; it may have been made before the ranges were set."""
    x = image(rng)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 2, 1)), x)
    quantize_(model, DuQConfig(4, 4, padding="zero"), x)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True) if when.startswith("before") else None
    calibrate_(model, [x])
    average = average or torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    assert torch.equal(average.eval()(x), model(x))
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(average.module.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_timm_averages(rng):
    timm_utils = pytest.importorskip("timm.utils")
    x = image(rng)
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)), x)
    quantize_(model, DuQConfig(4, 4), x)
    calibrate_(model, [x])
    for make in (timm_utils.ModelEmaV2, timm_utils.ModelEmaV3):
        ema = make(model, decay=0.9)
        for _ in range(3):
            ema.update(model)
        fresh = copy.deepcopy(model)
        fresh.load_state_dict(ema.module.state_dict())
        torch.testing.assert_close(fresh.eval()(x), model.eval()(x), **tolerances.FUSED_ACTIVATION)
    assert layer_table(ema.module) == layer_table(model)
