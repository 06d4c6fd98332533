"""Triton kernels of DuQ against the reference: under Triton's interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import profit_kernels as pk
from profit_kernels.testing import edge_data
from tests.ops.duq.common import INPUTS, compare_with_reference

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
compare = partial(compare_with_reference, "triton", DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_random_data(rng, poisoned_empty, record_band, dtype, bits, signed, offset, activation):
    x = (torch.randn(3, 5, 7, 11, generator=rng) * 2).to(dtype)
    a, c = (torch.randn(1, generator=rng) for _ in range(2))
    grad = torch.randn(3, 5, 7, 11, generator=rng).to(dtype)
    report = record_band("triton, random", compare(x, a, c, grad, bits, signed, offset, activation))
    if dtype == torch.float32:
        assert report.fraction_inside < 0.01


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("signed", "offset"), [(False, 0.0), (False, -0.375), (True, 0.0)])
def test_data_at_the_edges(rng, poisoned_empty, record_band, bits, signed, offset):
    a, c = (torch.randn(1, generator=rng) for _ in range(2))
    x = edge_data(4096, a, bits=bits, signed=signed, offset=offset, generator=rng)
    report = record_band("triton, edges", compare(x, a, c, torch.ones(4096), bits, signed, offset, "none"))
    assert report.inside > 100


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0, 3, 3), (1, 1, 1, 1), (1025,), (8193,)])
def test_odd_and_empty_shapes(rng, poisoned_empty, shape):
    x, grad = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    compare(x, torch.zeros(1), torch.zeros(1), grad, 4, False, 0.0, "relu")


def test_layouts(rng, poisoned_empty):
    x = torch.randn(2, 6, 5, 4, generator=rng)
    grad = torch.randn(2, 6, 5, 4, generator=rng)
    a, c = torch.zeros(1), torch.ones(1)
    compare(x.to(memory_format=torch.channels_last), a, c, grad, 4, True, 0.0, "none")
    compare(x.transpose(1, 3), a, c, grad.transpose(1, 3).contiguous(), 4, True, 0.0, "none")
    compare(x[:, ::2], a, c, grad[:, ::2], 4, True, 0.0, "none")
    compare(x, a, c, torch.ones(()).expand(x.shape), 4, True, 0.0, "none")


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_per_channel_weights(rng, poisoned_empty, bits, layout):
    w = torch.randn(6, 3, 5, 5, generator=rng).to(memory_format=layout)
    a, c = torch.randn(6, generator=rng), torch.randn(6, generator=rng)
    compare(w, a, c, torch.randn(6, 3, 5, 5, generator=rng), bits, True, 0.0, "none")


@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_nan_and_infinities(poisoned_empty, signed, offset, activation):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3])
    compare(x, torch.zeros(1), torch.zeros(1), torch.ones(4), 4, signed, offset, activation)


def test_deterministic(rng):
    x, grad = torch.randn(20000, generator=rng).to(DEVICE), torch.randn(20000, generator=rng).to(DEVICE)
    a, c = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    with pk.use_backend("triton", ops=["duq"]):
        first, second = (torch.ops.profit_kernels.duq_backward(grad, x, a, c, 4, False, 0.0, "none") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
