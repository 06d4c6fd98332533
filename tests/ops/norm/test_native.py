"""The C++ kernels of a layer's input side against the reference, at every instruction set this processor has."""

from __future__ import annotations

import pytest
import torch

from profit_kernels import native
from profit_kernels.layer import Norm, Quantizer
from profit_kernels.ops.norm import cpp, reference
from profit_kernels.testing import assert_close_banded, clipping_band
from tests import tolerances

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")

# (signed, offset, activation)
INPUTS = [
    (False, 0.0, "relu"),
    (False, 0.0, "relu6"),
    (False, -0.375, "hardswish"),
    (True, 0.0, "none"),
]
# Rows shorter than a run, a partial run at the end, channels that fill no register, one channel, one pixel, many tasks.
SHAPES = [(3, 5, 7, 11), (2, 16, 9, 9), (1, 37, 40, 3), (4, 1, 5, 5), (5, 24, 1, 1), (2, 600, 3, 3), (6, 24, 64, 40)]


def data(rng, shape, dtype=torch.float32, layout="channels_last", of_batch=True, affine=True):
    """x, an upstream gradient and the BatchNorm; every channel has a mean and a deviation of its own."""
    c = shape[1]
    x = torch.randn(shape, generator=rng) * (torch.rand(1, c, 1, 1, generator=rng) * 3 + 0.1)
    x = (x + torch.randn(1, c, 1, 1, generator=rng) * 3).to(dtype)
    g = torch.randn(shape, generator=rng).to(dtype)
    if layout == "channels_last":
        x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    mean, _, invstd = reference.moments(x, 1e-5)
    if not of_batch:
        mean, invstd = mean + torch.randn(c, generator=rng), invstd * (torch.rand(c, generator=rng) + 0.5)
    gamma, beta = (torch.randn(c, generator=rng), torch.randn(c, generator=rng)) if affine else (None, None)
    return x, g, Norm(mean, invstd, gamma, beta, of_batch)


def compare(x, g, norm, q):
    """Both passes against the reference; returns the report of the codes."""
    v = reference.normalize(x, norm)
    want_y = reference.quantized_input(x, norm, q)
    want = reference.quantized_input_backward(g, x, norm, q)
    y = cpp.quantized_input(x, norm, q)
    got = cpp.quantized_input_backward(g.clone(), x, norm, q)
    assert y.dtype == got[0].dtype == x.dtype and y.stride() == got[0].stride() == torch.empty_like(x).stride()
    report, kept = None, torch.ones_like(x, dtype=torch.bool)
    if q.bits is None:
        torch.testing.assert_close(y, want_y, **tolerances.GRID[x.dtype], equal_nan=True)
    else:
        settings = {"signed": q.signed, "offset": q.offset, "activation": q.activation}
        report = assert_close_banded(y, want_y, v, q.a, q.c, bits=q.bits, **settings)
        assert report.differing_outside == 0
        kept = ~clipping_band(v, q.a, **settings)
    # The sums of BatchNorm carry the rounding of every element, and an element in a band with all it has, to the others.
    ratio = 1.0 if q.bits is None else float(torch.nn.functional.softplus(q.c) / torch.nn.functional.softplus(q.a))
    size = ratio * float(g.float().abs().max())
    flipped = int((~kept).sum()) + (report.differing_inside if report else 0)
    samples = max(1, x.numel() // x.shape[1])
    alpha = 1.0 if norm is None else float(reference.scale_and_shift(norm)[0].abs().max())
    x_hat = 1.0
    if norm is not None:
        x_hat = float(((x.float() - reference.per_channel(norm.mean, x)) * reference.per_channel(norm.invstd, x)).abs().max())
    reach = size * max(1.0, x_hat)
    tolerance = dict(tolerances.GRAD_ELEMENT_HALF.get(str(x.dtype).removeprefix("torch."), tolerances.GRAD_ELEMENT))
    tolerance["atol"] *= max(1.0, 10 * alpha * size * max(1.0, x_hat**2))
    tolerance["atol"] += flipped * alpha * reach * max(1.0, x_hat) / samples
    torch.testing.assert_close(got[0][kept], want[0][kept], **tolerance)
    for mine, theirs, per_element in zip(got[1:], want[1:], (reach, size, reach, size), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            terms = samples if mine.numel() == x.shape[1] and norm is not None else x.numel()
            slack = per_element * (tolerances.INTERVAL_GRAD_OF_MAGNITUDE * terms + 2 * flipped)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=slack)
    return report


def quantizer(rng, bits, signed, offset, activation):
    a, c = torch.rand(1, generator=rng) + 0.3, torch.rand(1, generator=rng) + 0.3
    raws = (a, c, bits) if bits else (None, None, None)
    return Quantizer(*raws, signed, offset, activation)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, layout, rng, poisoned_empty, record_band, isa):
    for signed, offset, activation in INPUTS:
        x, g, norm = data(rng, shape, layout=layout)
        report = compare(x, g, norm, quantizer(rng, 4, signed, offset, activation))
        record_band(f"cpp {isa}, block", report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("signed, offset, activation", INPUTS)
@pytest.mark.parametrize("bits", [2, 4, 8, None])
def test_quantizers_and_dtypes(bits, signed, offset, activation, dtype, rng, poisoned_empty, isa):
    for of_batch, affine in ((True, True), (False, True), (True, False)):
        x, g, norm = data(rng, (3, 19, 9, 8), dtype, of_batch=of_batch, affine=affine)
        compare(x, g, norm, quantizer(rng, bits, signed, offset, activation))
    compare(x, g, None, quantizer(rng, bits, signed, offset, activation))


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 3, 250, 250)], ids=str)
def test_moments(shape, layout, rng, poisoned_empty, isa):
    x, _, _ = data(rng, shape, layout=layout)
    # A mean of up to 1000 deviations, as the tolerance says.
    deviation = x.transpose(0, 1).flatten(1).std(1).nan_to_num(1.0).view(1, -1, 1, 1)
    x = x + 1000 * deviation * torch.rand(1, shape[1], 1, 1, generator=rng)
    rows = x.double().transpose(0, 1).flatten(1)
    mean, var, invstd = cpp.moments(x, 1e-5)
    torch.testing.assert_close(mean.double(), rows.mean(1), **tolerances.MOMENTS)
    torch.testing.assert_close(var.double(), rows.var(1, correction=1), **tolerances.MOMENTS)
    torch.testing.assert_close(invstd.double(), (rows.var(1, correction=0) + 1e-5).rsqrt(), **tolerances.MOMENTS)


def test_nan_and_infinities(isa):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3, -0.0, 4.0]).repeat(50).view(1, 1, 12, 25)
    norm = Norm(torch.zeros(1), torch.ones(1), torch.ones(1), torch.zeros(1), False)
    for signed, offset, activation in INPUTS:
        q = Quantizer(torch.zeros(1), torch.zeros(1), 4, signed, offset, activation)
        y, expected = cpp.quantized_input(x, norm, q), reference.quantized_input(x, norm, q)
        assert_close_banded(y, expected, x, q.a, q.c, bits=4, signed=signed, offset=offset, activation=activation)
        gx = cpp.quantized_input_backward(torch.ones_like(x), x, None, q)[0]
        torch.testing.assert_close(gx, reference.quantized_input_backward(torch.ones_like(x), x, None, q)[0])
    mean, var, invstd = cpp.moments(x, 1e-5)
    assert mean.isnan().all() and var.isnan().all() and invstd.isnan().all()


@pytest.mark.parametrize("raw", [1e-30, 1e30])
def test_intervals_out_of_the_ordinary(raw, rng, isa):
    x, g, norm = data(rng, (2, 8, 5, 5))
    q = Quantizer(torch.tensor([-80.0 if raw < 1 else raw]), torch.ones(1), 4, True, 0.0, "none")
    y, expected = cpp.quantized_input(x, norm, q), reference.quantized_input(x, norm, q)
    assert_close_banded(y, expected, reference.normalize(x, norm), q.a, q.c, bits=4, signed=True)


def test_the_same_bits_for_any_number_of_threads(rng, isa):
    for layout in ("channels_last", "contiguous"):
        x, g, norm = data(rng, (8, 24, 64, 40), layout=layout)
        q = quantizer(rng, 4, False, 0.0, "relu6")
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append((*cpp.moments(x, 1e-5), cpp.quantized_input(x, norm, q),
                                *cpp.quantized_input_backward(g.clone(), x, norm, q)))  # fmt: skip
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_same_bits_at_every_instruction_set(rng):
    x, g, norm = data(rng, (4, 24, 16, 10))
    q = quantizer(rng, 4, False, -0.375, "hardswish")
    before, results = torch.ops.profit_cpu.isa(), []
    try:
        for level in range(3):
            torch.ops.profit_cpu.limit_isa(level)
            results.append((cpp.quantized_input(x, norm, q), *cpp.moments(x, 1e-5)))
    finally:
        torch.ops.profit_cpu.limit_isa(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
