"""The reference of AIWQ against numpy in float64, and where cancellation and dead channels would bite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from tests import tolerances
from tests.oracles import gaussian_kl


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 6, 7, 5), (16, 3), (2, 5, 9)])
def test_kl_against_numpy(rng, shape, dtype):
    old = torch.randn(shape, generator=rng, dtype=dtype) * 3 + 1
    new = old * 1.1 + torch.randn(shape, generator=rng, dtype=dtype) * 0.2 - 0.3
    kl = pk.aiwq_kl(new, old)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), torch.from_numpy(gaussian_kl(new.numpy(), old.numpy())), **tolerances.KL)


def test_kl_by_hand():
    # one channel, old: mean 0, unbiased variance 2; new: mean 1, variance 4; r = 2
    old = torch.tensor([-1.0, 1.0])[:, None]
    new = torch.tensor([1 - math.sqrt(2), 1 + math.sqrt(2)])[:, None]
    expected = 0.5 * (2 - 1 - math.log(2)) + 0.5 * 1 / 2
    assert pk.aiwq_kl(new, old).item() == pytest.approx(expected, rel=1e-6)


def test_identical_outputs_give_zero_and_tiny_changes_are_seen(rng):
    old = torch.randn(8, 4, 10, 10, generator=rng) + 100  # a large mean: one-pass float32 moments would be noise
    assert not pk.aiwq_kl(old, old).any()
    new = old.double() * (1 + 1e-5) - 100e-5
    expected = gaussian_kl(new.numpy(), old.double().numpy())
    torch.testing.assert_close(
        pk.aiwq_kl(new, old.double()).double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-14
    )


def test_dead_and_broken_channels():
    y = torch.randn(4, 3, 5, 5)
    new, old = y.clone(), y.clone()
    new[:, 0] = old[:, 0] = 0.0  # dead before and after
    old[:, 1] = 0.0  # came alive: very unstable, finite
    new[0, 2, 0, 0] = math.nan
    kl = pk.aiwq_kl(new, old)
    assert kl[0] == 0
    assert kl[1] > 1e6 and kl[1].isfinite()
    assert kl[2].isnan()
    assert pk.aiwq_kl(torch.randn(1, 2), torch.randn(1, 2)).isnan().all()  # one sample has no variance


@pytest.mark.parametrize("act_bits", [None, 4])
@pytest.mark.parametrize(("groups", "kernel"), [(6, 3), (6, 5), (1, 1), (2, 3)])
def test_conv_computes_the_old_output_itself(rng, groups, kernel, act_bits):
    x = torch.randn(3, 6, 8, 8, generator=rng)
    w_new, w_old = (torch.randn(6, 6 // groups, kernel, kernel, generator=rng) for _ in range(2))
    bias = torch.randn(6, generator=rng)
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    side = (kernel - 1) // 2
    qx = F.hardswish(x)
    if act_bits:
        qx = pk.duq_fake_quantize(x, a, c, bits=act_bits, offset=-0.375, activation="hardswish")
    padded = F.pad(qx, [side] * 4, value=-0.375)
    y_new, y_old = (F.conv2d(padded, w, bias, 2, groups=groups) for w in (w_new, w_old))
    kl = pk.aiwq_conv2d(
        x, y_new, w_old, bias, stride=2, padding=side, groups=groups, pad_value=-0.375,
        a_x=a, c_x=c, act_bits=act_bits, offset=-0.375, activation="hardswish",
    )  # fmt: skip
    expected = torch.from_numpy(gaussian_kl(y_new.numpy(), y_old.numpy()))
    torch.testing.assert_close(kl.double(), expected, **tolerances.KL_CONV)


def test_no_gradient_and_clear_errors():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert not pk.aiwq_kl(x, x + 1).requires_grad
    with pytest.raises(ValueError, match="one shape"):
        pk.aiwq_kl(x, x[:, :2])
    with pytest.raises(ValueError, match="needs a_x and c_x"):
        pk.aiwq_conv2d(x, x, torch.zeros(3, 3, 1, 1), act_bits=4)
