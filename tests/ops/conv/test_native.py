"""The convolution operator with the C++ kernels: layers of every kind; test_native_* look at one kernel each."""

from __future__ import annotations

import pytest
import torch

import profit_kernels as pk
from profit_kernels import native
from tests import tolerances
from tests.ops.conv.cases import CASES, arguments, sample, textbook

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "permuted", "sliced"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_whole_operator(case, layout, rng, poisoned_empty):
    """Against torch's batch_norm and conv2d and the textbook quantizer. A flipped code moves what it touches by a step."""
    s = sample(case, rng, channels_last=layout == "channels_last")
    if layout == "permuted":
        s.x = s.x.detach().permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2).requires_grad_()
    elif layout == "sliced":
        s.x = torch.cat([s.x.detach(), s.x.detach()], 3)[..., ::2].requires_grad_()
    leaves = s.leaves()
    before = {"mean": None if s.mean is None else s.mean.clone(), "var": None if s.var is None else s.var.clone()}
    with pk.use_backend("cpp", ops=["block", "duq"]):
        y = pk.block_conv2d(*vars(s).values(), **arguments(case))
    g = torch.randn(y.shape, generator=rng)
    got = torch.autograd.grad(y, leaves, g, allow_unused=True)
    after = (s.mean, s.var)
    s.mean, s.var = before["mean"], before["var"]
    expected = textbook(case, s)
    want = torch.autograd.grad(expected, leaves, g, allow_unused=True)
    for mine, theirs in zip((y, *got, *after), (expected, *want, s.mean, s.var), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.shape == theirs.shape
            apart = (mine - theirs).detach().norm() / (theirs.detach().norm() + 1)
            assert apart < tolerances.BLOCK_RELATIVE, apart


def test_autocast(rng):
    case = CASES[0]
    s = sample(case, rng)
    with torch.autocast("cpu", torch.bfloat16):
        y = pk.block_conv2d(*vars(s).values(), **arguments(case))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in s.leaves())
