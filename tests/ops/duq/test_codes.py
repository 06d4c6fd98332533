"""Integer codes, on every backend that has a kernel for them, against the reference."""

from __future__ import annotations

import pytest
import torch

import profit_kernels as pk
from profit_kernels.ops.duq import reference
from profit_kernels.testing import edge_data, rounding_band
from tests.ops.duq.common import INPUTS, kernels_of


@pytest.fixture(params=["cpp", "triton"])
def backend(request):
    with kernels_of(request.param, "duq_codes") as device:
        yield device


def compare(device, x, a, bits, signed, offset, activation) -> None:
    """Equal outside the band, at most one step apart inside."""
    settings = {"bits": bits, "signed": signed, "offset": offset, "activation": activation}
    got = pk.duq_codes(x.to(device), a.to(device), **settings)
    want = reference.codes(x, a, *settings.values())
    assert got.dtype == want.dtype and got.stride() == torch.empty_like(x).stride()
    apart = (got.cpu().int() - want.int()).abs()
    band = rounding_band(x, a, **settings)
    assert not apart[~band].any()
    assert not (apart > 1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_random_data(rng, poisoned_empty, backend, dtype, signed, offset, activation):
    x = (torch.randn(3, 5, 7, 11, generator=rng) * 2).to(dtype)
    for bits in (2, 4, 8):
        compare(backend, x, torch.randn(1, generator=rng), bits, signed, offset, activation)


def test_edges_layouts_and_empty(rng, poisoned_empty, backend):
    a = torch.randn(1, generator=rng)
    compare(backend, edge_data(5000, a, bits=4, offset=-0.375, generator=rng), a, 4, False, -0.375, "none")
    x = torch.randn(2, 6, 5, 4, generator=rng)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 3), x[:, ::2], x[:0]):
        compare(backend, view, a, 4, True, 0.0, "none")
    compare(backend, torch.randn(6, 3, 3, generator=rng), torch.randn(6, generator=rng), 4, True, 0.0, "none")


def test_nan_has_no_code_and_infinities_clip(backend):
    one = torch.ones(1, device=backend)
    ends = torch.tensor([-float("inf"), float("inf")], device=backend)
    assert pk.duq_codes(ends, one, bits=4, signed=True).tolist() == [-7, 7]
    with pytest.raises(ValueError, match="no integer code"):
        pk.duq_codes(torch.tensor([0.0, float("nan")], device=backend), one, bits=4)
