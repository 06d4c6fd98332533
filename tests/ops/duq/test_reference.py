"""The reference of DuQ: golden vectors, values computed by hand, autograd through the textbook, hostile numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import profit_kernels as pk
from profit_kernels.ops.duq import reference
from tests import tolerances
from tests.ops.duq.common import INPUTS
from tests.oracles import textbook_duq

RAW_OF_1 = math.log(math.e - 1)  # softplus of it is 1


@pytest.fixture(autouse=True)
def reference_backend():
    with pk.use_backend("reference"):
        yield


def raw(value: float) -> torch.Tensor:
    """softplus^-1, in float64 so that A is `value` to the last bit that matters."""
    return torch.tensor([math.log(math.expm1(value))], dtype=torch.float64)


def test_unsigned_by_hand():
    # A = 2, C = 3, 2 bits: u = clip(x / 2), q in {0, 1/3, 2/3, 1}
    x = torch.tensor([-1.0, 0.0, 0.3, 0.4, 1.2, 1.9, 2.0, 5.0], dtype=torch.float64)
    y = pk.duq_fake_quantize(x, raw(2.0), raw(3.0), bits=2)
    expected = [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.0, 3.0]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), **tolerances.CONV64)
    assert pk.duq_codes(x, raw(2.0), bits=2).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


def test_signed_by_hand():
    # 3 bits: s = 3; A = C = 1; 0.5 is code 1.5, which rounds to the even 2
    x = torch.tensor([-9.0, -0.5, -0.4, 0.0, 0.16, 0.17, 0.5, 1.0], dtype=torch.float64)
    codes = [-3, -2, -1, 0, 0, 1, 2, 3]
    a = torch.tensor([RAW_OF_1], dtype=torch.float64)
    assert pk.duq_codes(x, a, bits=3, signed=True).tolist() == codes
    assert pk.duq_codes(x, a, bits=2, signed=True).tolist() == [-1, 0, 0, 0, 0, 0, 0, 1]


def test_offset_by_hand():
    # d = -3/8, A = 1.5, C = 3, 2 bits: code 0 is -0.375, code 3 is 2.625, one step is 1
    x = torch.tensor([-0.375, -0.13, -0.12, 0.0, 1.125, 7.0], dtype=torch.float64)
    y = pk.duq_fake_quantize(x, raw(1.5), raw(3.0), bits=2, offset=-0.375)
    expected = torch.tensor([-0.375, -0.375, 0.625, 0.625, 2.625, 2.625], dtype=torch.float64)
    torch.testing.assert_close(y, expected, **tolerances.CONV64)


def test_gradients_by_hand():
    # A = 2, C = 3: inside (x = 0.4, u = 0.2, q = 1/3); clipped above (q = 1) and below (q = 0)
    x = torch.tensor([0.4, 5.0, -1.0], dtype=torch.float64, requires_grad=True)
    a, c = raw(2.0).requires_grad_(), raw(3.0).requires_grad_()
    g = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    pk.duq_fake_quantize(x, a, c, bits=2).backward(g)
    sigmoid = {value: 1 - math.exp(-value) for value in (2.0, 3.0)}  # sigmoid(softplus^-1(v)) = 1 - e^-v
    torch.testing.assert_close(x.grad, torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(c.grad.item(), (1 / 3 + 10.0) * sigmoid[3.0])
    torch.testing.assert_close(a.grad.item(), -1.5 * 0.2 * sigmoid[2.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_gradients_against_autograd_of_the_textbook(rng, dtype, bits, signed, offset, activation):
    x = torch.randn(4, 3, 5, 6, generator=rng, dtype=dtype) * 3
    a, c = (torch.randn(1, generator=rng, dtype=dtype) for _ in range(2))
    grad = torch.randn(4, 3, 5, 6, generator=rng, dtype=dtype)
    results = []
    for function in (textbook_duq, reference.duq):
        leaves = [t.clone().requires_grad_() for t in (x, a, c)]
        y = function(*leaves, bits, signed, offset, activation)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerances.TEXTBOOK[dtype])


def test_tied_interval_and_scale_give_the_lsq_gradient(rng):
    """A = C: d/dA of the output is round(v)/s - v/s inside, the end outside (LSQ, section 2.1, in units of the range)."""
    x = torch.randn(500, generator=rng, dtype=torch.float64)
    A = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    a = torch.log(torch.expm1(A))
    (got,) = torch.autograd.grad(reference.duq(x, a, a, 4, True, 0.0, "none").sum(), A)
    u = x / 0.8
    per_element = torch.where(u.abs() < 1, torch.round(u * 7) / 7 - u, u.sign())
    torch.testing.assert_close(got, per_element.sum().view(1))


@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_nan_stays_and_infinities_clip(signed, offset, activation):
    x = torch.tensor([math.nan, math.inf, -math.inf], requires_grad=True)
    a, c = torch.tensor([0.5], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    y = pk.duq_fake_quantize(x, a, c, bits=4, signed=signed, offset=offset, activation=activation)
    C = torch.nn.functional.softplus(c).item()
    assert y[0].isnan()
    assert y[1].item() == pytest.approx(C + offset)
    # h-swish of -inf is its limit 0, which the offset quantizer represents; elsewhere -inf is the lower end.
    A = torch.nn.functional.softplus(a).item()
    low = C * round(0.375 / A * 15) / 15 + offset if activation == "hardswish" else (-C if signed else offset)
    assert y[2].item() == pytest.approx(low, abs=1e-6)
    ends = x.detach()[1:].requires_grad_()
    pk.duq_fake_quantize(ends, a, c, bits=4, signed=signed, offset=offset, activation=activation).sum().backward()
    assert ends.grad.tolist() == [0.0, 0.0]
    assert a.grad.isfinite().all() and c.grad.isfinite().all()
    with pytest.raises(ValueError, match="NaN"):
        pk.duq_codes(x, a, bits=4, signed=signed, offset=offset, activation=activation)


def test_nan_shows_in_the_gradients_of_the_intervals():
    x = torch.tensor([math.nan, 0.3], requires_grad=True)
    a, c = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pk.duq_fake_quantize(x, a, c, bits=4).sum().backward()
    assert c.grad.isnan().all() and a.grad.isnan().all()
    assert x.grad[0] == 0 and x.grad[1] > 0


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    bits=st.integers(2, 8),
    kind=st.sampled_from(INPUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
    flip=st.booleans(),
)
def test_properties(shape, bits, kind, dtype, seed, flip):
    """Codes in range, output on the grid, idempotent where A = C, monotone; shape, dtype, strides kept."""
    signed, offset, activation = kind
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 4).to(dtype)
    if flip and x.dim() > 1:
        x = x.transpose(0, -1)
    a = torch.randn(1, generator=generator).to(reference.compute_dtype(x))
    with pk.use_backend("reference"):
        y = pk.duq_fake_quantize(x, a, a, bits=bits, signed=signed, offset=offset, activation=activation)
        codes = pk.duq_codes(x, a, bits=bits, signed=signed, offset=offset, activation=activation)
        again = pk.duq_fake_quantize(y.double(), a.double(), a.double(), bits=bits, signed=signed, offset=offset)
    assert y.shape == x.shape and y.dtype == x.dtype
    # The stride of a dimension of size 0 or 1 means nothing, and torch is free in it.
    assert y.stride() == torch.empty_like(x).stride() or min(x.shape) < 2
    s = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    if x.numel():
        assert -s * signed <= int(codes.min()) and int(codes.max()) <= s
    step = torch.nn.functional.softplus(a.double()).squeeze() / s
    torch.testing.assert_close(y.double(), codes.double() * step + offset, **tolerances.GRID[dtype])
    torch.testing.assert_close(again, y.double(), **tolerances.GRID[dtype])
    if activation != "hardswish":
        order = x.flatten().argsort()
        assert (codes.flatten()[order].int().diff() >= 0).all()


def test_upstream_gradient_without_memory_of_its_own():
    """sum() hands back an expanded gradient: every stride is 0."""
    x = torch.rand(3, 5, requires_grad=True)
    a, c = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    pk.duq_fake_quantize(x, a, c, bits=4).sum().backward()
    ratio = (torch.nn.functional.softplus(c) / torch.nn.functional.softplus(a)).item()
    torch.testing.assert_close(x.grad, torch.full((3, 5), ratio))
