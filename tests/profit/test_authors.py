"""Checkpoints of the method's authors: the names of their nets, and that a loaded model computes what theirs does."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit import DuQConfig, load_authors_checkpoint, quant_layers, quantize_, set_bits
from profit.errors import CheckpointError
from tests import tolerances

# ---- a net as theirs is put together: quantizers are modules in front of the layers, squeeze-and-excite before activation


def grid(x, a, c, steps, low, offset=0.0):
    return ((x - offset) / F.softplus(a)).clamp(low, 1).mul(steps).round() / steps * F.softplus(c) + offset


class Quantizer(nn.Module):
    """An activation quantizer of theirs: `a`, `c` and nothing else in the state_dict."""

    def __init__(self, function, bits=4):
        super().__init__()
        self.a, self.c = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(1))
        self.function, self.bits = function, bits

    def forward(self, x):
        if self.function == "signed":
            return grid(x, self.a, self.c, 2 ** (self.bits - 1) - 1, -1)
        if self.function == "hardswish":
            x = x * F.relu6(x + 3) / 6
        if "hardswish" in self.function:
            return grid(x, self.a, self.c, 2**self.bits - 1, 0, -0.375)
        return grid(F.relu(x), self.a, self.c, 2**self.bits - 1, 0)


class Weighted:
    def add_interval(self):
        with torch.no_grad():
            peak = 0.9 * self.weight.abs().max()
            self.a = nn.Parameter(torch.log(torch.expm1(peak)).view(1))
            self.c = nn.Parameter(self.a + 0.1)
        return self

    def quantized(self):
        return grid(self.weight, self.a, self.c, 7, -1)


class TheirConv(Weighted, nn.Conv2d):
    def __init__(self, *args, border=0.0, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.border = border
        self.add_interval()

    def forward(self, x):
        x = F.pad(x, [self.padding[0]] * 4, value=self.border)
        return F.conv2d(x, self.quantized(), None, self.stride, 0, self.dilation, self.groups)


class TheirLinear(Weighted, nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.add_interval()

    def forward(self, x):
        return F.linear(x, self.quantized(), self.bias)


class Named(nn.Module):
    """A chain of modules under the names given."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name.replace("minus", "-").removeprefix("m"), module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


class Excite(nn.Module):
    def __init__(self, layer, *, quantized):
        super().__init__()
        first, second = layer(8, 4), layer(4, 8)
        if quantized:
            self.fc = Named(minus0=Quantizer("signed"), m0=first, m1=Quantizer("relu"), m2=second)
        else:
            self.fc = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, x):
        gate = F.relu6(self.fc(x.mean((2, 3))) + 3) / 6
        return x * gate[:, :, None, None]


def their_net():
    block = Named(
        minus0=Quantizer("signed"), m0=TheirConv(4, 8, 1), m1=nn.BatchNorm2d(8), m2=Quantizer("hardswish"),
        m3=TheirConv(8, 8, 3, padding=1, groups=8, border=-0.375), m4=nn.BatchNorm2d(8), m5=Excite(TheirLinear, quantized=True),
        m6=Quantizer("hardswish"), m7=TheirConv(8, 4, 1), m8=nn.BatchNorm2d(4),
    )  # fmt: skip
    stem = Named(m0=TheirConv(3, 8, 3, padding=1), m1=nn.BatchNorm2d(8), m2=nn.Hardswish())
    down = Named(minus0=Quantizer("hardswish, activated"), m0=TheirConv(8, 4, 1), m1=nn.BatchNorm2d(4))
    classifier = Named(
        minus0=Quantizer("signed"), m0=TheirLinear(4, 6), m1=Quantizer("hardswish"), m2=TheirLinear(6, 5)
    )
    return Named(features=Named(m0=stem, m1=down, m2=Residual(block)), pool=Mean(), classifier=classifier)


class Residual(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return x + self.conv(x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def our_net():
    """The same net in plain float modules, under other names."""

    def conv(*args, **kwargs):
        return nn.Conv2d(*args, bias=False, **kwargs)

    block = Named(
        expand=conv(4, 8, 1), bn1=nn.BatchNorm2d(8), act1=nn.Hardswish(), dw=conv(8, 8, 3, padding=1, groups=8),
        bn2=nn.BatchNorm2d(8), se=Excite(nn.Linear, quantized=False), act2=nn.Hardswish(), project=conv(8, 4, 1),
        bn3=nn.BatchNorm2d(4),
    )  # fmt: skip
    return Named(
        stem=conv(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), act=nn.Hardswish(), down=conv(8, 4, 1), bn_down=nn.BatchNorm2d(4),
        block=Residual(block), mean=Mean(), fc1=nn.Linear(4, 6), act_fc=nn.Hardswish(), fc2=nn.Linear(6, 5),
    )  # fmt: skip


def their_trained_net(rng):
    theirs = their_net()
    with torch.no_grad():
        for norm in (m for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.normal_(generator=rng)
            norm.running_var.uniform_(0.5, 2, generator=rng)
            norm.weight.uniform_(0.5, 2, generator=rng)
        for quantizer in (m for m in theirs.modules() if isinstance(m, Quantizer)):
            quantizer.a.uniform_(0.5, 4, generator=rng)
            quantizer.c.copy_(quantizer.a + 0.2)
    return theirs.double().eval()


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_loaded_model_computes_the_same(prefix, shuffled, rng):
    theirs = their_trained_net(rng)
    x = torch.randn(2, 3, 8, 8, generator=rng, dtype=torch.float64)
    ours = our_net().double().eval()
    quantize_(ours, DuQConfig(None, None), x)
    state = [(prefix + name, tensor) for name, tensor in theirs.state_dict().items()]
    if shuffled:  # an order that went through a format that sorts names
        random.Random(int(torch.randint(2**30, (), generator=rng))).shuffle(state)
    mapping = load_authors_checkpoint(ours, dict(state))
    set_bits(ours, 4, 4)
    torch.testing.assert_close(ours(x), theirs(x), **tolerances.CONV64)
    assert mapping["features.2.conv.-0"] == "block.conv.expand.input_quantizer"
    assert mapping["features.2.conv.6"] == "block.conv.project.input_quantizer"
    assert mapping["features.2.conv.5.fc.-0"] == "block.conv.se.fc.0.input_quantizer"
    assert mapping["features.0.1"] == "bn" and mapping["classifier.2"] == "fc2"
    assert {row["kind"] for row in kinds(ours).values()} == {"raw", "offset", "signed", "unsigned"}


def kinds(model):
    return {name: {"kind": layer.input_quantizer.kind} for name, layer in quant_layers(model).items()}


def their_mobilenetv2_state(model):
    """A state_dict with the names of their MobileNetV2 for a timm one: torchvision's numbers, `-n` quantizers, `relu6`."""
    names, block = {}, 1
    convs = [n for n, layer in quant_layers(model).items() if n not in ("conv_stem", "conv_head", "classifier")]
    names["conv_stem"] = ("features.0.0", "features.0.1", None)
    per_block = {}
    for name in convs:
        per_block.setdefault(name.rsplit(".", 1)[0], []).append(name)
    previous = "features.0.2"
    for members in per_block.values():
        stem = f"features.{block}.conv"
        for i, name in enumerate(members):
            last = i == len(members) - 1
            conv = f"{stem}.{i}" if last else f"{stem}.{i}.0"
            norm = f"{stem}.{i + 1}" if last else f"{stem}.{i}.1"
            quantizer = (previous if block == 1 else f"{stem}.-0") if i == 0 else f"{stem}.{i - 1}.2"
            names[name] = (conv, norm, quantizer)
        block += 1
    names["conv_head"] = ("features.18.0", "features.18.1", "features.-18")
    names["classifier"] = ("classifier.1", None, "relu6")
    state = {}
    for name, layer in quant_layers(model).items():
        conv, norm, quantizer = names[name]
        state[f"{conv}.weight"] = torch.randn_like(layer.weight)
        state[f"{conv}.a"], state[f"{conv}.c"] = torch.randn(1), torch.randn(1)
        if layer.bias is not None:
            state[f"{conv}.bias"] = torch.randn_like(layer.bias)
        if norm:
            for leaf, value in model.get_submodule(layer.batch_norm).state_dict().items():
                state[f"{norm}.{leaf}"] = torch.rand_like(value) if value.is_floating_point() else value + 7
        if quantizer:
            state[f"{quantizer}.a"], state[f"{quantizer}.c"] = torch.randn(1), torch.randn(1)
    return state, names


@pytest.fixture(scope="module")
def mobilenetv2():
    timm = pytest.importorskip("timm")
    model = timm.create_model("mobilenetv2_050", pretrained=False)
    quantize_(model, DuQConfig(None, None), torch.randn(1, 3, 32, 32))
    return model


def test_mobilenetv2_names(mobilenetv2):
    state, names = their_mobilenetv2_state(mobilenetv2)
    assert {
        "features.2.conv.-0.a",
        "features.1.conv.0.2.c",
        "features.-18.a",
        "relu6.c",
        "features.17.conv.2.a",
    } <= set(state)
    mapping = load_authors_checkpoint(mobilenetv2, state)
    for name, (conv, norm, quantizer) in names.items():
        layer = quant_layers(mobilenetv2)[name]
        assert mapping[conv] == name and torch.equal(layer.weight, state[f"{conv}.weight"])
        assert torch.equal(layer.weight_quantizer.a, state[f"{conv}.a"]) and layer.weight_quantizer.is_initialized
        if quantizer:
            assert mapping[quantizer] == f"{name}.input_quantizer"
            assert torch.equal(layer.input_quantizer.c, state[f"{quantizer}.c"]) and layer.input_quantizer.is_calibrated
        if norm:
            assert torch.equal(mobilenetv2.get_submodule(layer.batch_norm).running_var, state[f"{norm}.running_var"])
    assert len(mapping) == len({key.rsplit(".", 1)[0] for key in state})


def test_earlier_phases_leave_intervals_alone(mobilenetv2):
    state, names = their_mobilenetv2_state(mobilenetv2)
    layer = quant_layers(mobilenetv2)["conv_head"]
    before = layer.weight_quantizer.a.clone()
    state["features.18.0.a"].fill_(float("nan"))
    with pytest.raises(CheckpointError, match="features.18.0.a.*not finite.*weights_quantized"):
        load_authors_checkpoint(mobilenetv2, state)
    load_authors_checkpoint(mobilenetv2, state, weights_quantized=False)
    assert torch.equal(layer.weight_quantizer.a, before) and torch.equal(layer.weight, state["features.18.0.weight"])
    assert torch.equal(layer.input_quantizer.a, state["features.-18.a"])


def test_other_number_of_classes(mobilenetv2):
    state, _ = their_mobilenetv2_state(mobilenetv2)
    state["classifier.1.weight"], state["classifier.1.bias"] = torch.randn(7, 1280), torch.randn(7)
    with pytest.raises(CheckpointError, match=r"classifier.1.weight of the checkpoint has shape \(7, 1280\)"):
        load_authors_checkpoint(mobilenetv2, state)
    load_authors_checkpoint(
        mobilenetv2, state, allow_missing=["classifier"], allow_unexpected=["classifier.1", "relu6"]
    )


def test_what_does_not_correspond_is_refused_and_changes_nothing(mobilenetv2):
    state, _ = their_mobilenetv2_state(mobilenetv2)
    before = {k: v.clone() for k, v in mobilenetv2.state_dict().items()}
    without = {k: v for k, v in state.items() if not k.startswith("features.18.0")}
    wrong = [
        ({"model": state}, "'model' holds a dict.*training checkpoint"),
        (without, "52 layers, the model has 53"),
        ({**state, "backbone.weight": torch.randn(2, 2)}, "'backbone'.*top_level"),
        ({**state, "features.99.a": torch.zeros(1), "features.99.c": torch.zeros(1)}, "'features.-18'|'features.99'"),
        ({**state, "features.98.scale": torch.zeros(1)}, "'features.98'.*feeds no layer"),
        ({k: v for k, v in state.items() if k != "features.0.0.a"}, "no single interval features.0.0.a"),
        ({k: v for k, v in state.items() if not k.startswith("features.18.1.")}, "'conv_head'.*BatchNorm"),
        ({k: v for k, v in state.items() if not k.startswith("features.-18.")}, "'conv_head' is quantized here"),
        ({**state, "features.18.0.weight": torch.randn(8, 8, 1, 1)}, r"features.18.0.weight.*\(8, 8, 1, 1\)"),
    ]
    for damaged, message in wrong:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_authors_checkpoint(mobilenetv2, damaged)
        assert "\n" not in str(caught.value)
        after = mobilenetv2.state_dict()
        assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_warns_where_squeeze_and_excite_stands_elsewhere(rng):
    theirs = their_trained_net(rng)
    ours = our_net()
    block = ours.block.conv  # the usual place: behind the activation
    children = dict(block.named_children())
    for name in ("se", "act2", "project", "bn3"):
        delattr(block, name)
    for name in ("act2", "se", "project", "bn3"):
        block.add_module(name, children[name])
    ours = ours.double().eval()
    quantize_(ours, DuQConfig(None, None), torch.randn(1, 3, 8, 8, generator=rng, dtype=torch.float64))
    with pytest.warns(UserWarning, match="before the activation; layer 'block.conv.project'"):
        load_authors_checkpoint(ours, theirs.state_dict())
