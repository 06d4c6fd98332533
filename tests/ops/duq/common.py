"""What the tests of every DuQ backend share: the kinds of input, and one comparison with the reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit_kernels import dispatch
from profit_kernels.ops.duq import reference
from profit_kernels.testing import BandReport, assert_close_banded, clipping_band
from tests import tolerances

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (signed, offset, activation)
INPUTS = [
    (False, 0.0, "none"),
    (False, 0.0, "relu"),
    (False, 0.0, "relu6"),
    (False, -0.375, "hardswish"),
    (False, -0.375, "none"),
    (True, 0.0, "none"),
]


def interval_slack(grad: Tensor, a: Tensor, c: Tensor, kept: Tensor, report: BandReport) -> float:
    """How far two sums of one interval gradient may lie apart: by the size of the terms, not of their cancelled total.

    An element in a band may take the other code or the other side of the mask, and then counts with its whole term.
    """
    g = grad.float().abs()
    if g.numel() == 0:
        return 0.0
    size = max(1.0, (F.softplus(c) / F.softplus(a)).max().item())
    return size * (
        tolerances.INTERVAL_GRAD_OF_MAGNITUDE * g.sum().item()
        + 2 * g[~kept].sum().item()
        + report.differing_inside * g.max().item()
    )


def compare_with_reference(
    backend: str,
    device: str,
    x: Tensor,
    a: Tensor,
    c: Tensor,
    grad: Tensor,
    bits: int,
    signed: bool,
    offset: float,
    activation: str,
) -> BandReport:
    """Forward and backward of `backend` through autograd, against the reference on the CPU."""
    settings = {"bits": bits, "signed": signed, "offset": offset, "activation": activation}
    expected = reference.forward(x, a, c, *settings.values())
    want = reference.backward(grad, x, a, c, *settings.values())
    with pk.use_backend(backend, ops=["duq"]):
        leaves = [t.to(device).detach().requires_grad_() for t in (x, a, c)]
        actual = pk.duq_fake_quantize(*leaves, **settings)
        got = torch.autograd.grad(actual, leaves, grad.to(device))
    assert actual.stride() == torch.empty_like(x).stride()
    report = assert_close_banded(actual, expected, x, a, c, **settings)
    assert report.differing_outside == 0

    kept = ~clipping_band(x, a, signed=signed, offset=offset, activation=activation)
    assert got[0].dtype == x.dtype
    tolerance = tolerances.GRAD_ELEMENT_HALF.get(str(x.dtype).removeprefix("torch."), tolerances.GRAD_ELEMENT)
    torch.testing.assert_close(got[0].cpu()[kept], want[0][kept], **tolerance)
    slack = interval_slack(grad, a, c, kept, report)
    for mine, theirs in zip(got[1:], want[1:], strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=slack, equal_nan=True)
    return report


@contextmanager
def kernels_of(backend: str, op: str) -> Iterator[str]:
    """`op` on the kernels of `backend`, which is given the device they run on; skips, with the reason, where there are none."""
    device = "cpu" if backend == "cpp" else DEVICE
    reason = dispatch.why_not(op, backend, device, torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with pk.use_backend(backend, ops=[op]):
        yield device
