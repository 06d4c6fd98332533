"""The shortened divisions of the Triton device functions give what a true division gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from profit_kernels.layer import levels
from profit_kernels.ops.duq import reference
from tests.interpreter import round_as_a_device

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from profit_kernels.ops.duq import device  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def device_rounding(monkeypatch):
    if DEVICE == "cpu":
        round_as_a_device(monkeypatch)


@triton.jit
def quotient(v_ptr, A_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, A = tl.load(v_ptr + at, mask=at < n), tl.load(A_ptr + at, mask=at < n, other=1.0)
    high, low = device.reciprocal(A)
    tl.store(out_ptr + at, device.divide(v, A, high, low), mask=at < n)


@triton.jit
def sixth(n_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, device.sixth(tl.load(n_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def hardswish(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(out_ptr + at, device.activate_bounded(x, "hardswish"), mask=at < n)


@triton.jit
def value(code_ptr, s_ptr, out_ptr, n, C, offset, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    code, s = tl.load(code_ptr + at, mask=at < n, other=0.0), tl.load(s_ptr + at, mask=at < n, other=1.0)
    high, low = device.reciprocal(s)
    tl.store(out_ptr + at, device.code_value(code, C, high, low, offset), mask=at < n)


def run(kernel, *inputs: torch.Tensor, numbers: tuple[float, ...] = (), block: int = 1 << 16) -> torch.Tensor:
    inputs = tuple(t.to(DEVICE) for t in inputs)
    out = torch.full_like(inputs[0], float("nan"))
    n = out.numel()
    kernel[(triton.cdiv(n, block),)](*inputs, out, n, *numbers, BLOCK=block, enable_fp_fusion=False)
    return out.cpu()


def test_division_by_any_interval(rng):
    """|v| <= A, as behind the clip: random pairs, and quotients as near to a rounding edge of 15 steps as floats come."""
    n = 1 << 20
    A = torch.exp2(torch.rand(n, generator=rng) * 60 - 30)
    v = A * (torch.rand(n, generator=rng) * 2 - 1)
    v[: n // 2] = A[: n // 2] * ((torch.randint(0, 15, (n // 2,), generator=rng) + 0.5) / 15)
    moved = torch.nextafter(v, torch.full_like(v, torch.inf))
    for numerator in (v, moved, A, -A, torch.zeros_like(A)):
        numerator = numerator.clamp(-A, A)
        got, exact = run(quotient, numerator, A), numerator / A
        normal = (exact.abs() >= torch.finfo(torch.float32).tiny) | (numerator == 0)
        assert torch.equal(got[normal], exact[normal])
        assert (got[~normal].abs() <= torch.finfo(torch.float32).tiny).all()  # code 0 at any width


def test_what_cannot_be_divided_gives_nan():
    nan = torch.tensor([float("nan"), 1.0, 1.0])
    assert run(quotient, nan, torch.tensor([2.0, float("nan"), 1e-40]), block=4).isnan().all()


def test_a_sixth_of_every_mantissa():
    """Scaling by a power of two changes nothing, so one binade is all there is."""
    one = torch.tensor(1.0).view(torch.int32)
    n = (torch.arange(1 << 23, dtype=torch.int32) + one).view(torch.float32)
    assert torch.equal(run(sixth, n, block=1 << 20), n / 6)


def test_hardswish(rng):
    x = torch.randn(1 << 16, generator=rng) * 3
    assert torch.equal(run(hardswish, x), reference.activate(x, "hardswish"))
    special = torch.tensor([-torch.inf, -3.0, -0.0, 0.0, 3.0, 1e30, 1e-30, float("nan")])
    torch.testing.assert_close(
        run(hardswish, special, block=8), reference.activate(special, "hardswish"), rtol=0, atol=0, equal_nan=True
    )
    assert 1e37 < run(hardswish, torch.tensor([torch.inf]), block=1).item() < torch.inf


@pytest.mark.parametrize("offset", [0.0, -0.375])
def test_value_of_every_code_of_every_width(rng, offset):
    codes, steps = [], []
    for s in sorted({levels(bits, signed) for bits in range(2, 9) for signed in (False, True)}):
        codes.append(torch.arange(-s, s + 1).float())
        steps.append(torch.full((2 * s + 1,), float(s)))
    code, s = torch.cat(codes), torch.cat(steps)
    C = torch.rand(1, generator=rng).item()
    expected = torch.tensor(C) * (code / s) + offset
    assert torch.equal(run(value, code, s, numbers=(C, offset), block=1024), expected)
