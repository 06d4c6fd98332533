"""The reference of the convolution operator: against torch's functions and the textbook quantizer, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.autograd import gradcheck

import profit_kernels as pk
from profit_kernels import dispatch
from profit_kernels.ops.conv import reference
from tests import tolerances
from tests.ops.conv.cases import CASES, Case, arguments, sample, textbook
from tests.ops.conv.registered import registered as registered_operators


def grads(y, s, g):
    return torch.autograd.grad(y, s.leaves(), g, allow_unused=True)


@pytest.fixture
def registered():
    with registered_operators():
        yield


@pytest.mark.parametrize("path", ["registered", "parts"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_the_textbook(case, path, rng, request):
    if path == "registered":
        request.getfixturevalue("registered")
    s = sample(case, rng, torch.float64)
    theirs = copy.deepcopy(s)
    with pk.use_backend("reference"):
        y = pk.block_conv2d(*vars(s).values(), **arguments(case))
        expected = textbook(case, theirs)
        g = torch.randn(y.shape, generator=rng, dtype=y.dtype)
        torch.testing.assert_close(y, expected, **tolerances.TEXTBOOK[torch.float64])
        for mine, other in zip(grads(y, s, g), grads(expected, theirs, g), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None:
                torch.testing.assert_close(mine, other, **tolerances.TEXTBOOK[torch.float64])
    if case.tracked:
        torch.testing.assert_close(s.mean, theirs.mean, **tolerances.TEXTBOOK[torch.float64])
        torch.testing.assert_close(s.var, theirs.var, **tolerances.TEXTBOOK[torch.float64])


@pytest.mark.parametrize("case", CASES[:5], ids=lambda c: c.name)
def test_without_batch_norm(case, rng, registered):
    s = sample(case, rng, torch.float64)
    settings = {k: v for k, v in arguments(case).items() if k not in ("training", "momentum")}
    y = pk.duq_conv2d(s.x, s.weight, s.a, s.c, s.a_w, s.c_w, s.bias, **settings)
    with pk.use_backend("reference"):
        g = torch.randn(y.shape, generator=rng, dtype=y.dtype)
        with registered_operators(()):
            parts = pk.duq_conv2d(s.x, s.weight, s.a, s.c, s.a_w, s.c_w, s.bias, **settings)
    torch.testing.assert_close(y, parts, **tolerances.TEXTBOOK[torch.float64])
    for mine, other in zip(grads(y, s, g), grads(parts, s, g), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other, **tolerances.TEXTBOOK[torch.float64])


def test_gradients_by_finite_differences(rng, registered):
    """Without quantization everything is smooth."""
    case = Case("smooth", activation="none", act_bits=None, weight_bits=None, size=(2, 3, 3), channels=2, out=3, bias=True)
    s = sample(case, rng, torch.float64)
    leaves = [s.x, s.gamma, s.beta, s.weight, s.bias]

    def run(x, gamma, beta, weight, bias):
        return pk.block_conv2d(
            x, gamma, beta, None, None, weight, None, None, None, None, bias, training=True, act_bits=None, weight_bits=None
        )

    assert gradcheck(run, leaves)


@pytest.mark.parametrize("frozen", ["weight", "input", "bias"])
def test_no_gradient_is_computed_that_nobody_needs(frozen, rng, registered):
    case = Case("p", bias=True, weight_bits=None)
    s = sample(case, rng)
    side = {"weight": [s.weight], "input": [s.x, s.gamma, s.beta, s.a, s.c], "bias": [s.bias]}
    for leaf in side[frozen]:
        leaf.requires_grad_(False)
    needs = []
    with pytest.MonkeyPatch.context() as patch:
        real = reference.convolution_backward
        patch.setattr(reference, "convolution_backward", lambda *args: needs.append(args[-1]) or real(*args))
        pk.block_conv2d(*vars(s).values(), **arguments(case)).sum().backward()
    assert tuple(needs[0]) == tuple(name != frozen for name in ("input", "weight", "bias"))
    assert all(leaf.grad is None for leaf in side[frozen])
    assert all(leaf.grad is not None for name, leaves in side.items() if name != frozen for leaf in leaves)


def test_what_is_kept(rng, registered):
    case = Case("p", size=(8, 16, 16), channels=16, out=4)
    s = sample(case, rng)
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = (t.numel(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        pk.block_conv2d(*vars(s).values(), **arguments(case))
    big = [t for numel, t in sizes.values() if numel >= s.x.numel()]
    assert len(big) == 1 and big[0].data_ptr() == s.x.data_ptr()


def test_half_precision_keeps_batch_norm_in_float32(rng, registered):
    case = Case("p", activation="none", act_bits=None, weight_bits=None, channels=1, out=1)
    s = sample(case, rng)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        x = s.x.bfloat16()
        y = pk.block_conv2d(
            x, s.gamma, s.beta, s.mean, s.var, weight, None, None, None, None, training=True, act_bits=None, weight_bits=None
        )
        expected = torch.nn.functional.batch_norm(x.float(), None, None, s.gamma, s.beta, True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, **tolerances.GRID[torch.bfloat16])


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(2, 6, 3)}, "must be \\[N, C, H, W\\]"),
    ({"weight": torch.zeros(8, 5, 1, 1)}, "the weight must be"),
    ({"gamma": torch.zeros(5)}, "BatchNorm's weight must have shape \\[6\\]"),
    ({"var": None}, "go together"),
    ({"x": torch.zeros(1, 6, 1, 1)}, "more than one value per channel"),
    ({"a": None}, "needs a_x and c_x"),
    ({"bias": torch.zeros(3)}, "the bias must have shape"),
])  # fmt: skip
def test_refusals(change, message, rng):
    case = Case("p", bias=True)
    values = vars(sample(case, rng)) | change
    with pytest.raises(ValueError, match=f"block_conv2d: .*{message}"):
        pk.block_conv2d(*values.values(), **arguments(case))
    with pytest.raises(ValueError, match="training=False needs"):
        pk.block_conv2d(*(vars(sample(case, rng)) | {"mean": None, "var": None}).values(),
                        **arguments(case) | {"training": False})  # fmt: skip


def test_double_backward_is_refused(rng, registered):
    s = sample(CASES[0], rng)
    (g,) = torch.autograd.grad(
        pk.block_conv2d(*vars(s).values(), **arguments(CASES[0])).square().sum(), s.x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="twice"):
        g.sum().backward()


def test_the_operator_is_listed():
    assert "block" in dispatch.OPS
