"""Fixtures of the operators' tests."""

from __future__ import annotations

import pytest
import torch

from profit_kernels import native


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    """Runs the test with the C++ kernels of one instruction set."""
    if not native.available():
        pytest.skip(native.why_missing())
    before, level = torch.ops.profit_cpu.isa(), ["baseline", "avx2", "avx512"].index(request.param)
    try:
        if torch.ops.profit_cpu.limit_isa(level) != level:
            pytest.skip(f"this processor has no {request.param}")
        assert native.isa() == request.param
        yield request.param
    finally:
        torch.ops.profit_cpu.limit_isa(before)
