"""Kinds and bounds by data flow: every spelling of an activation, soundness on random programs, and what may not be missed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from profit.dataflow import trace
from profit.errors import ConversionError
from tests.profit.conversion_nets import Between, Gate, Mobile, Whole

HS, SILU, GELU, MISH = -0.375, -0.27846454, -0.16997121, -0.30884341


def in_place(x, change):
    """`change` applied to a view of x, then x itself: the alias that a naive record misses."""
    change(x.view(-1))
    return x


def set_item(x, value):
    x[:, 0] = value
    return x


FLOWS = {
    # name: (function of the first convolution's output, bound or None, activation)
    "identity": (lambda x: x, None, ""),
    "F.relu": (F.relu, 0, "relu"),
    "relu_": (lambda x: x.relu_(), 0, "relu"),
    "torch.relu": (torch.relu, 0, "relu"),
    "F.relu inplace": (lambda x: F.relu(x, True), 0, "relu"),
    "clamp(min=0)": (lambda x: x.clamp(min=0), 0, "relu"),
    "clamp_min": (lambda x: x.clamp_min(0), 0, "relu"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros(())), 0, "relu"),
    "clamp(0, 6)": (lambda x: x.clamp(0, 6), 0, "relu6"),
    "hardtanh": (lambda x: F.hardtanh(x, 0.0, 6.0), 0, "relu6"),
    "hardswish": (F.hardswish, HS, "hardswish"),
    "x*relu6(x+3)/6": (lambda x: x * F.relu6(x + 3) / 6, HS, "hardswish"),
    "x*(relu6(x+3)/6)": (lambda x: x * (F.relu6(3 + x) / 6), HS, "hardswish"),
    "hardtanh form": (lambda x: x * (F.hardtanh(x + 3, 0, 6) / 6), HS, "hardswish"),
    "in-place form": (lambda x: x.mul_(F.relu6(x + 3.0).div_(6.0)), HS, "hardswish"),
    "times 1/6": (lambda x: torch.clamp(x + 3, 0, 6) * (1 / 6) * x, HS, "hardswish"),
    "hardsigmoid": (lambda x: F.hardsigmoid(x) * x, HS, "hardswish"),
    "silu": (F.silu, SILU, "silu"),
    "x*sigmoid(x)": (lambda x: x * x.sigmoid(), SILU, "silu"),
    "gelu": (F.gelu, GELU, "gelu"),
    "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), -0.17004075, "gelu"),
    "mish": (F.mish, MISH, "mish"),
    "x*tanh(softplus(x))": (lambda x: x * torch.tanh(F.softplus(x)), MISH, "mish"),
    "elu": (lambda x: F.elu(x, 0.5), -0.5, ""),
    "leaky relu": (lambda x: F.leaky_relu(x, 0.1), None, ""),
    "tanh": (torch.tanh, -1, "tanh"),
    "1 - sigmoid": (lambda x: 1 - torch.sigmoid(x), 0, ""),
    "shifted": (lambda x: F.relu(x) - 0.25, -0.25, ""),
    "scaled": (lambda x: F.hardswish(x) * 2, 2 * HS, ""),
    "negated": (lambda x: -F.relu(x), None, ""),
    "negated twice": (lambda x: -(-2 * F.relu(x)), 0, ""),
    "gated": (lambda x: F.hardswish(x) * torch.sigmoid(x.mean((2, 3), keepdim=True)), HS, ""),
    "gated without bound": (lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)), None, ""),
    "residual": (lambda x: x + F.relu(x), None, ""),
    "sum of bounded": (lambda x: F.relu(x) + F.hardswish(x), HS, ""),
    "cat": (lambda x: torch.cat([F.relu(x)[:, :2], F.hardswish(x)[:, 2:]], 1), HS, ""),
    "average pool": (lambda x: F.avg_pool2d(F.hardswish(x), 2), HS, ""),
    "max pool": (lambda x: F.max_pool2d(F.relu(x), 2), 0, ""),
    "bicubic": (lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bicubic"), None, ""),
    "bilinear": (lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear"), 0, ""),
    "dropout": (lambda x: F.dropout(F.hardswish(x), 0.5, False), HS, ""),
    "reshapes": (lambda x: F.relu(x).flatten(2).unflatten(2, x.shape[2:]).transpose(2, 3).unsqueeze(0)[0], 0, ""),
    "chunk": (lambda x: torch.cat(F.hardswish(x).chunk(2, 1)[::-1], 1), HS, ""),
    "contiguous": (lambda x: F.relu(x).contiguous(), 0, "relu"),
    "padded": (lambda x: F.pad(F.relu(x), (1, 1), value=-1.0), -1, ""),
    "masked": (lambda x: F.relu(x).masked_fill(x > 1, 0.0), 0, ""),
    "where": (lambda x: torch.where(x > 0, F.relu(x), F.silu(x)), SILU, ""),
    "square": (lambda x: x**2, 0, ""),
    "product with itself": (lambda x: x * x, 0, ""),
    "real part": (lambda x: torch.fft.fft(x).real, None, ""),
    "minimum": (lambda x: torch.min(F.relu(x), torch.tensor(-1.0)), -1, ""),
    "reduction": (lambda x: F.relu(x).max(3, keepdim=True)[0], 0, ""),
    "changed in place": (lambda x: F.relu(x).sub_(5), -5, ""),
    "changed through a view": (lambda x: in_place(F.relu(x), lambda v: v.sub_(5)), None, ""),
    "set item": (lambda x: set_item(F.relu(x), -7.0), -7, ""),
    "set item to unbounded": (lambda x: set_item(F.relu(x), x[:, 0]), None, ""),
    "out=": (lambda x: torch.clamp(x, min=0, out=torch.empty_like(x)), 0, "relu"),
    "normalised": (lambda x: F.layer_norm(F.relu(x), x.shape[1:]), None, ""),
}


@pytest.mark.parametrize("name", FLOWS)
def test_kind_of_every_flow(name, rng):
    between, bound, activation = FLOWS[name]
    flow = trace(Between(lambda net, y: between(y)), torch.randn(2, 3, 6, 6, generator=rng))[-1]
    kind = "signed" if bound is None else "offset" if bound < 0 else "unsigned"
    assert (flow.name, flow.kind, flow.activation) == ("b", kind, activation)
    assert flow.offset == pytest.approx(bound if kind == "offset" else 0.0, abs=1e-7)
    assert flow.producer == ""  # a functional activation stays where it is


@pytest.mark.parametrize("bound, function", [(SILU, F.silu), (GELU, F.gelu), (MISH, F.mish), (HS, F.hardswish)])
def test_bounds_are_the_minima(bound, function):
    x = torch.linspace(-4, 0, 4_000_001, dtype=torch.float64)
    assert float(function(x).min()) == pytest.approx(bound, abs=1e-8)


def random_program(rng):
    """A chain of 2 to 7 steps over [N, C, H, W], of which some look back at earlier results."""

    def pick(n):
        return int(torch.randint(n, (), generator=rng))

    unary = [
        F.relu, F.relu6, F.hardswish, F.silu, F.gelu, F.mish, torch.tanh, torch.sigmoid, F.elu, F.softplus, torch.abs,
        lambda x: -x, lambda x: x * 0.5 - 0.2, lambda x: 3 - x, lambda x: x**2, lambda x: x * F.relu6(x + 3) / 6,
        lambda x: F.avg_pool2d(x, 3, 1, 1), lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: x.roll(1, 3), lambda x: x / 4,
        lambda x: x.clone().clamp_(-0.1, 2), lambda x: F.pad(x[..., 1:], (1, 0), value=-0.3), lambda x: x.clone().add_(0.1),
        lambda x: x.flip(1).contiguous(), lambda x: set_item(x.clone(), -0.5),
    ]  # fmt: skip
    binary = [
        torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda x, y: x * y.sigmoid(),
        lambda x, y: torch.where(y > 0, x, y), lambda x, y: torch.cat([x[:, :2], y[:, 2:]], 1),
        lambda x, y: x * F.hardsigmoid(y.mean((2, 3), keepdim=True)),
    ]  # fmt: skip
    steps = [(pick(len(unary)), pick(len(binary)), pick(3), pick(8)) for _ in range(2 + pick(6))]

    def run(net, y):
        values = [y]
        for one, two, which, back in steps:
            last = values[-1]
            values.append(unary[one](last) if which else binary[two](last, values[back % len(values)]))
        return values[-1]

    return run


def test_bounds_hold_on_random_programs(rng):
    """No input is ever below the offset that was derived for it; at least a quarter of the programs have a bound."""
    bounded, programs = 0, 120
    for _ in range(programs):
        net = Between(random_program(rng))
        with torch.no_grad():
            net.a.weight.mul_(4)
        seen = []
        net.b.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        flow = trace(net, torch.randn(4, 3, 6, 6, generator=rng))[-1]
        if flow.kind != "signed":
            bounded += 1
            slack = 1e-6 * max(1.0, float(seen[0].abs().max()))
            assert float(seen[0].min()) >= flow.offset - slack
    assert bounded >= programs // 4


def test_kinds_of_a_net_that_fx_cannot_trace(rng):
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(Mobile())
    flows = {flow.name: flow for flow in trace(Mobile(), torch.randn(2, 3, 16, 16, generator=rng))}
    assert {name: flow.kind for name, flow in flows.items()} == {name: kind for name, (kind, _) in Mobile.KINDS.items()}
    assert [name for name, flow in flows.items() if flow.squeeze_excite] == ["gate.reduce", "gate.expand"]
    assert {name: flow.followed_by_bn for name, flow in flows.items() if flow.followed_by_bn} == {
        "stem": "bn0", "dw": "bn1", "pw": "bn2", "expand": "bn3", "grouped": "bn4",
    }  # fmt: skip
    assert (flows["dw"].producer, flows["dw"].sole_reader) == ("act0", True)
    # Multiply-accumulates by hand: output places x weights per output place.
    assert flows["stem"].macs == 16 * 16 * 8 * 27 and flows["dw"].macs == 8 * 8 * 8 * 9
    assert flows["grouped"].macs == 8 * 8 * 6 * 36 and flows["head"].macs == 30
    assert flows["dw"].input_shape == (2, 8, 16, 16) and flows["dw"].output_shape == (2, 8, 8, 8)


def test_raw_input_through_normalisation_and_concatenation(rng):
    net = Whole(lambda net, x: net.b(net.a(torch.cat([(x - net.mean) / 0.5, x[:, :0]], 1).roll(1, 2))))
    net.register_buffer("mean", torch.rand(3, 1, 1))
    kinds = [flow.kind for flow in trace(net, torch.rand(1, 3, 4, 4, generator=rng))]
    assert kinds == ["raw", "signed"]
    mixed = Whole(lambda net, x: net.b(torch.cat([net.a(x)[:, :3], x[:, :1]], 1)))
    assert trace(mixed, torch.rand(1, 3, 4, 4, generator=rng))[1].kind == "signed"
    relu = Whole(lambda net, x: net.b(F.relu(net.a(F.relu(x)))))
    assert trace(relu, torch.rand(1, 3, 4, 4, generator=rng))[0].kind == "unsigned"


def test_the_input_is_not_changed_by_a_model_that_works_in_place(rng):
    x = torch.randn(1, 3, 4, 4, generator=rng)
    before = x.clone()
    trace(Whole(lambda net, x: net.b(net.a(x.sub_(1).div_(2)))), (x,))
    assert torch.equal(x, before)


def view_kept(net, y):
    view = y.view(-1)
    return net.b(net.act_(y)) + view.sum()


SOLE_READERS = {
    "only the layer": (lambda net, x: net.b(net.act(net.a(x))), True),
    "through Identity": (lambda net, x: net.b(nn.Identity()(net.act(net.a(x)))), True),
    "in place": (lambda net, x: net.b(net.act_(net.a(x))), True),
    "residual": (lambda net, x: (lambda y: y + net.b(y))(net.act(net.a(x))), False),
    "returned": (lambda net, x: (lambda y: (y, net.b(y)))(net.act(net.a(x))), False),
    "read before": (lambda net, x: (lambda y: net.b(y) if y.mean() > -1 else y)(net.act(net.a(x))), False),
    "seen through a view": (lambda net, x: view_kept(net, net.a(x)), False),
    "dropout between": (lambda net, x: net.b(net.drop(net.act(net.a(x)))), False),
    "used twice": (lambda net, x: net.b(net.act(net.a(net.act(x[:, :3])))), False),
    "layer used twice": (lambda net, x: net.b(F.relu(net.b(net.act(net.a(x))))), False),
    "shape only": (lambda net, x: (lambda y: net.b(y).view(y.shape[0], -1))(net.act(net.a(x))), True),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLE_READERS)
def test_sole_reader(name, rng):
    run, expected = SOLE_READERS[name]
    net = Whole(run, act=nn.ReLU(), act_=nn.ReLU(inplace=True), drop=nn.Dropout(0.5))
    flow = trace(net, torch.randn(2, 3, 5, 5, generator=rng))[-1]
    assert flow.kind == "unsigned"
    assert (flow.sole_reader and flow.producer in ("act", "act_")) is expected


class Decomposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ReLU6()

    def forward(self, x):
        return x * (self.inner(x + 3) / 6)


def test_a_module_that_spells_out_hardswish_is_the_producer(rng):
    flow = trace(Between(lambda net, y: net.act(y), act=Decomposed()), torch.randn(1, 3, 4, 4, generator=rng))[-1]
    assert (flow.kind, flow.activation, flow.producer, flow.sole_reader) == ("offset", "hardswish", "act", True)


@torch.jit.script
def scripted_relu(x):
    return torch.relu(x)


class Odd(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight * 2)


REFUSED = {
    "scripted function": (Between(lambda net, y: scripted_relu(y)), "'b'.*cannot be seen"),
    "through numpy": (Between(lambda net, y: torch.from_numpy(y.numpy())), "'b'.*cannot be seen"),
    "two kinds": (Whole(lambda net, x: net.b(net.b(F.relu(net.a(x))))), "'b'.*more than once.*signed and unsigned"),
    "two offsets": (Whole(lambda net, x: net.b(F.silu(net.b(F.gelu(net.a(x)))))), "'b'.*more than once"),
    "unused": (Between(lambda net, y: y, c=nn.Conv2d(1, 1, 1)), "'c'.*not seen"),
    "functional use": (Whole(lambda net, x: F.conv2d(net.a(x), net.b.weight)), "'b'.*outside"),
    "used in attention": (nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), "out_proj.*outside"),
    "own forward": (Whole(lambda net, x: net.c(net.b(net.a(x))), c=Odd(4, 4, 1)), "'c'.*without its weight"),
    "wrong input": (Whole(lambda net, x: net.b(net.a(x[:, :2]))), "does not run on example_inputs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, rng):
    net, message = REFUSED[name]
    x = torch.randn(2, 5, 6, generator=rng) if name == "used in attention" else torch.randn(2, 3, 6, 6, generator=rng)
    flags = [m.training for m in net.modules()]
    with pytest.raises(ConversionError, match=message):
        trace(net, x)
    assert [m.training for m in net.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_same_layer_twice_with_one_kind(rng):
    net = Whole(lambda net, x: net.b(F.relu(net.b(F.relu(net.a(x))))))
    flow = trace(net, torch.randn(1, 3, 4, 4, generator=rng))[1]
    assert (flow.kind, flow.calls, flow.sole_reader, flow.macs) == ("unsigned", 2, False, 2 * 16 * 16)


def test_gate_without_pooling_is_no_squeeze_excite(rng):
    glu = Whole(lambda net, x: (lambda y: y * torch.sigmoid(net.b(y)))(net.a(x)))
    assert not any(flow.squeeze_excite for flow in trace(glu, torch.randn(1, 3, 4, 4, generator=rng)))
    gated = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Gate(6))
    found = [flow.name for flow in trace(gated, torch.randn(1, 3, 4, 4, generator=rng)) if flow.squeeze_excite]
    assert found == ["2.reduce", "2.expand"]


def test_nothing_is_left_behind(rng):
    net = Mobile().train()
    net.bn1.eval()
    state = {name: t.clone() for name, t in net.state_dict().items()}
    trace(net, {"x": torch.randn(2, 3, 8, 8, generator=rng)})
    assert all(torch.equal(t, state[name]) for name, t in net.state_dict().items())
    assert net.training and not net.bn1.training and not math.isnan(float(net.bn1.running_mean.sum()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
