"""All weights of a net in one call, on every backend that has a kernel for it, against the reference weight by weight."""

from __future__ import annotations

import pytest
import torch

import profit_kernels as pk
from profit_kernels.ops.duq import reference
from profit_kernels.testing import assert_close_banded, clipping_band
from tests import tolerances
from tests.ops.duq.common import interval_slack, kernels_of

# Shapes of a small net: stem, depthwise, pointwise, more than one block of a kernel, linear, one single weight.
SHAPES = [(8, 3, 3, 3), (8, 1, 3, 3), (16, 8, 1, 1), (40, 64, 1, 1), (10, 16), (1, 1)]


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    with kernels_of(request.param, "duq_weights") as device:
        yield request.param, device


def quantized(device, weights, a, c, bits, grads):
    """Outputs and gradients of the operator under test, on the CPU."""
    leaves = [[t.to(device).detach().requires_grad_() for t in ts] for ts in (weights, a, c)]
    y = pk.duq_fake_quantize_weights(*leaves, bits=bits)
    found = torch.autograd.grad(y, [t for ts in leaves for t in ts], [g.to(device) for g in grads])
    return y, [t.cpu() for t in found]


def compare(device, weights, a, c, bits, grads):
    y, found = quantized(device, weights, a, c, bits, grads)
    n, total = len(weights), None
    for i, w in enumerate(weights):
        settings = {"bits": bits[i], "signed": True}
        assert y[i].stride() == torch.empty_like(w).stride() and y[i].dtype == w.dtype
        expected = reference.forward(w, a[i], c[i], bits[i], True, 0.0, "none")
        report = assert_close_banded(y[i], expected, w, a[i], c[i], **settings)
        want = reference.backward(grads[i], w, a[i], c[i], bits[i], True, 0.0, "none")
        kept = ~clipping_band(w, a[i], signed=True)
        tolerance = tolerances.GRAD_ELEMENT_HALF.get(str(w.dtype).removeprefix("torch."), tolerances.GRAD_ELEMENT)
        torch.testing.assert_close(found[i][kept], want[0][kept], **tolerance)
        slack = interval_slack(grads[i], a[i], c[i], kept, report)
        for mine, theirs in ((found[n + i], want[1]), (found[2 * n + i], want[2])):
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, rtol=0, atol=slack, equal_nan=True)
        total = report if total is None else total + report
    assert total.differing_outside == 0
    return total


def sample(rng, shapes, granularity, dtype=torch.float32):
    weights = [torch.randn(s, generator=rng).to(dtype) for s in shapes]
    raws = [[torch.randn(w.shape[0] if granularity(i) else 1, generator=rng) for i, w in enumerate(weights)] for _ in range(2)]
    return weights, *raws, [torch.randn(s, generator=rng).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "mixed"])
def test_a_small_net(rng, poisoned_empty, record_band, backend, granularity, dtype):
    per_channel = {"per_tensor": lambda i: False, "per_channel": lambda i: True, "mixed": lambda i: i % 2 == 1}[granularity]
    weights, a, c, grads = sample(rng, SHAPES, per_channel, dtype)
    report = compare(backend[1], weights, a, c, [2, 3, 4, 5, 8, 4], grads)
    record_band(f"{backend[0]}, weights of a net", report)


def test_layouts_and_expanded_gradients(rng, poisoned_empty, backend):
    weights, a, c, grads = sample(rng, [(6, 4, 3, 3), (4, 6, 3, 3), (6, 8, 1, 1)], lambda i: i == 0)
    weights[0] = weights[0].to(memory_format=torch.channels_last)
    weights[1] = weights[1].transpose(0, 1)
    weights[2] = weights[2][:, ::2]
    grads[1] = torch.ones(()).expand(weights[1].shape)
    grads[2] = grads[2][:, ::2]
    compare(backend[1], weights, a, c, [4, 4, 4], grads)


def test_one_interval_with_a_scale_per_channel(rng, poisoned_empty, backend):
    weights, a, c, grads = sample(rng, [(6, 4, 3, 3), (5, 3)], lambda i: False)
    c[0], a[1] = torch.randn(6, generator=rng), torch.randn(5, generator=rng)
    compare(backend[1], weights, a, c, [4, 3], grads)


def test_empty_weights_nan_and_extreme_parameters(rng, poisoned_empty, backend):
    weights, a, c, grads = sample(rng, [(0, 4), (3, 3), (4, 4), (4, 4)], lambda i: False)
    weights[1][0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    a[2], c[2] = torch.tensor([-25.0]), torch.tensor([30.0])
    y, found = quantized(backend[1], weights, a, c, [4, 4, 4, 4], grads)
    assert y[0].shape == (0, 4) and not found[4].any()
    assert y[1][0, 0].isnan() and y[1].isnan().sum() == 1
    compare(backend[1], weights, a, c, [4, 4, 4, 4], grads)
    assert pk.duq_fake_quantize_weights([], [], [], bits=4) == []


def test_unequal_lists_and_bad_widths_are_refused():
    w, one = torch.zeros(2, 2), torch.ones(1)
    with pytest.raises(ValueError, match="must have one length, got 2, 1, 2 and 2"):
        pk.duq_fake_quantize_weights([w, w], [one], [one, one], bits=4)
    with pytest.raises(ValueError, match="weight 1: bits must be an integer from 2 to 8, got 9"):
        pk.duq_fake_quantize_weights([w, w], [one, one], [one, one], bits=[4, 9])


def test_dtypes_may_differ_within_a_list(rng):
    weights = [torch.randn(3, 3, generator=rng), torch.randn(3, 3, generator=rng).double()]
    one = [torch.ones(1), torch.ones(1, dtype=torch.float64)]
    y = pk.duq_fake_quantize_weights(weights, one, one, bits=4)
    for w, q, raw in zip(weights, y, one, strict=True):
        torch.testing.assert_close(q, reference.forward(w, raw, raw, 4, True, 0.0, "none"))


def test_deterministic(rng, backend):
    weights, a, c, grads = sample(rng, SHAPES, lambda i: i % 2 == 0)
    first, second = (quantized(backend[1], weights, a, c, [4] * 6, grads) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first[1], second[1], strict=True))
