"""PACT, QIL, LSQ and LSQ+ against values and gradients worked out by hand, and through the layers that use them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from profit.errors import CalibrationError
from profit.nn.baselines import (
    LSQInput,
    LSQPlusInput,
    LSQPlusWeight,
    LSQWeight,
    PACTInput,
    PACTWeight,
    QILWeight,
)
from profit.nn.lsq import lsq_quantize
from profit.nn.qil import qil_quantize
from profit.nn.straight_through import clip_strict, round_ste, scale_gradient
from tests import tolerances


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def close(actual, *expected):
    torch.testing.assert_close(
        actual.detach().double(), torch.tensor(expected, dtype=torch.float64), **tolerances.GRAD_ELEMENT
    )


G = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)  # upstream gradient


def test_building_blocks():
    x = leaf(-1.5, -0.5, 0.5, 1.5, 2.5, math.nan)
    y = round_ste(x)
    assert torch.equal(y[:5], torch.tensor([-2.0, -0.0, 0.0, 2.0, 2.0], dtype=torch.float64)) and y[5].isnan()
    close(torch.autograd.grad(y[:5].sum(), x)[0], 1, 1, 1, 1, 1, 0)
    y = clip_strict(x, -0.5, 1.5)
    assert y.tolist()[:5] == [-0.5, -0.5, 0.5, 1.5, 1.5] and y[5].isnan()
    close(torch.autograd.grad(y[:5].sum(), x)[0], 0, 0, 1, 0, 0, 0)  # the ends themselves have no gradient
    close(torch.autograd.grad(scale_gradient(x, 0.25).sum(), x)[0], *[0.25] * 6)


def test_pact_activation_by_hand():
    q = PACTInput(kind="unsigned", bits=2, dtype=torch.float64)
    q.set_range(2.0)
    x = leaf(-1.0, 0.3, 0.9, 1.7, 2.0, 5.0)  # in steps of 2/3: clipped, 0.45, 1.35, 2.55, 3, clipped
    y = q(x)
    y.backward(G)
    close(y, 0, 0, 2 / 3, 2, 2, 2)
    close(x.grad, 0, 2, 3, 4, 0, 0)
    close(q.a.grad, 5 + 6)
    close(q.penalty().reshape(1), 4.0)
    signed = PACTInput(kind="signed", bits=3, dtype=torch.float64)
    signed.set_range(1.5)
    x = leaf(-9.0, -1.5, -0.7, 0.1, 1.4, 2.0)  # steps of 0.5
    signed(x).backward(G)
    close(signed(x), -1.5, -1.5, -0.5, 0, 1.5, 1.5)
    close(x.grad, 0, 0, 3, 4, 5, 0)
    close(signed.a.grad, -1 - 2 + 6)


def test_pact_weight_against_the_dorefa_formula(rng):
    w = torch.randn(4, 3, 3, 3, generator=rng, dtype=torch.float64).requires_grad_()
    g = torch.randn(w.shape, generator=rng, dtype=torch.float64)
    for channels, bits in ((None, 2), (None, 4), (4, 3)):
        q = PACTWeight(channels=channels, bits=bits)
        q.initialize(w)
        w.grad = None
        y = q(w)
        y.backward(g)
        t, gn = np.tanh(w.detach().numpy()), g.numpy()
        axes = None if channels is None else (1, 2, 3)
        peak = np.abs(t).max(axes, keepdims=True)
        steps = 2**bits - 1
        np.testing.assert_allclose(
            y.detach().numpy(), 2 * np.round((t / peak + 1) / 2 * steps) / steps - 1, **tolerances.CONV64
        )
        # d/dw of sum(g * t / peak), where peak = |t| of its largest element moves too
        expected = gn * (1 - t**2) / peak
        at_peak = np.abs(t) == peak
        expected -= at_peak * np.sign(t) * (1 - t**2) / peak**2 * (gn * t).sum(axes, keepdims=True)
        np.testing.assert_allclose(w.grad.numpy(), expected, **tolerances.CONV64)


def test_lsq_formula_by_hand():
    x, s = leaf(-3.0, -0.6, 0.1, 0.8, 9.0, -0.25), leaf(0.5)
    y = lsq_quantize(x, s, None, -4, 3, elements=6)  # v = -6, -1.2, 0.2, 1.6, 18, -0.5
    y.backward(G)
    close(y, -2, -0.5, 0, 1, 1.5, 0)
    close(x.grad, 0, 2, 3, 4, 0, 6)
    by_step = -4 * 1 + (-1 + 1.2) * 2 + (0 - 0.2) * 3 + (2 - 1.6) * 4 + 3 * 5 + (0 + 0.5) * 6
    close(s.grad, by_step / math.sqrt(6 * 3))


def test_lsq_plus_formula_by_hand():
    x, s, beta = leaf(-3.0, -0.6, 0.1, 0.8, 9.0, -0.25), leaf(0.5), leaf(-0.75)
    y = lsq_quantize(x, s, beta, 0, 7, elements=6)  # v = -4.5, 0.3, 1.7, 3.1, 19.5, 1
    y.backward(G)
    close(y, -0.75, -0.75, 0.25, 0.75, 2.75, -0.25)
    close(x.grad, 0, 2, 3, 4, 0, 6)
    factor = 1 / math.sqrt(6 * 7)
    close(s.grad, factor * (0 * 1 - 0.3 * 2 + 0.3 * 3 - 0.1 * 4 + 7 * 5 + 0 * 6))
    close(beta.grad, factor * (1 + 5))


@pytest.mark.parametrize(("cls", "kind", "codes"), [
    (LSQInput, "unsigned", (0, 7)), (LSQInput, "offset", (-4, 3)), (LSQInput, "signed", (-4, 3)),
    (LSQPlusInput, "unsigned", (0, 7)), (LSQPlusInput, "offset", (0, 7)), (LSQPlusInput, "signed", (0, 7)),
])  # fmt: skip
def test_lsq_inputs(rng, cls, kind, codes):
    offset = -0.375 if kind == "offset" else 0.0
    q = cls(kind=kind, offset=offset, bits=3, activation="relu" if kind == "unsigned" else "none", dtype=torch.float64)
    q.set_range(2.0)
    assert q.levels() == codes
    x = torch.randn(5, 4, 6, 6, generator=rng, dtype=torch.float64).requires_grad_()
    y = q(x)
    y.square().sum().backward()
    if cls is LSQInput:
        reach, beta = 2.0 + offset, 0.0
    else:
        reach, beta = (4.0, -2.0) if kind == "signed" else (2.0, offset)
    step = reach / codes[1]
    h = x.detach().clamp(min=0) if kind == "unsigned" else x.detach()
    v = (h - beta) / step
    expected = v.clamp(*codes).round() * step + beta
    torch.testing.assert_close(y.detach(), expected, **tolerances.CONV64)
    inside = (v > codes[0]) & (v < codes[1])
    by_step = torch.where(inside, v.round() - v, v.clamp(*codes))
    factor = 1 / math.sqrt(4 * 6 * 6 * codes[1])  # features of one image
    # `a` is the range: d/da is Q_P times the scaled d/ds, which makes SGD move s as if it were the parameter.
    torch.testing.assert_close(
        q.a.grad, (2 * expected * by_step).sum().reshape(1) * factor * codes[1], **tolerances.CONV64
    )
    if cls is LSQPlusInput and kind != "unsigned":
        torch.testing.assert_close(q.c.grad, (2 * expected * ~inside).sum().reshape(1) * factor, **tolerances.CONV64)


def test_lsq_range_moves_as_the_step_would_under_sgd():
    x, g, lr = torch.linspace(-3, 3, 41, dtype=torch.float64)[None], 0.7, 0.01
    step = leaf(0.31)
    lsq_quantize(x, step, None, -8, 7, elements=41).sum().mul(g).backward()
    q = LSQInput(kind="signed", bits=4, dtype=torch.float64)
    q.set_range(0.31 * 7)
    q(x).sum().mul(g).backward()
    moved = (q.a - lr * q.a.grad) / 7
    torch.testing.assert_close(moved, step - lr * step.grad, **tolerances.CONV64)


def test_lsq_weights(rng):
    w = torch.randn(3, 2, 3, 3, generator=rng, dtype=torch.float64)
    g = torch.randn(w.shape, generator=rng, dtype=torch.float64)
    per_tensor, per_channel = LSQWeight(bits=4, dtype=torch.float64), LSQWeight(channels=3, bits=4, dtype=torch.float64)
    for q in (per_tensor, per_channel):
        q.initialize(w)
    torch.testing.assert_close(per_tensor.step, 2 * w.abs().mean().reshape(1) / math.sqrt(7), **tolerances.CONV64)
    torch.testing.assert_close(per_channel.step, 2 * w.abs().flatten(1).mean(1) / math.sqrt(7), **tolerances.CONV64)
    per_channel(w).backward(g)
    for i in range(3):  # a channel of its own is a tensor of its own
        alone = LSQWeight(bits=4, dtype=torch.float64)
        alone.initialize(w[i : i + 1])
        y = alone(w[i : i + 1])
        torch.testing.assert_close(y, per_channel(w)[i : i + 1], **tolerances.CONV64)
        y.backward(g[i : i + 1])
        torch.testing.assert_close(alone.a.grad, per_channel.a.grad[i : i + 1], **tolerances.CONV64)
    plus = LSQPlusWeight(bits=4, dtype=torch.float64)
    plus.initialize(w)
    mean, deviation = w.numpy().mean(), w.numpy().std()
    close(plus.step, max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 8)


def test_lsq_starts_from_data(rng):
    x = torch.randn(8, 100, generator=rng).double()
    q = LSQInput(kind="unsigned", activation="relu", bits=4, dtype=torch.float64)
    q.initialize(x)
    close(q.step, 2 * x.clamp(min=0).mean().item() / math.sqrt(15))
    q = LSQPlusInput(kind="offset", offset=-0.375, activation="hardswish", bits=4, dtype=torch.float64)
    q.initialize(x)
    h = F.hardswish(x)
    close(q.step, (h.max() - h.min()).item() / 15)
    close(q.c, h.min().item())
    with pytest.raises(ValueError, match="bit width"):
        LSQInput().initialize(x)
    for bad in (torch.zeros(3), torch.full((3,), math.nan)):
        for cls in (LSQInput, LSQPlusInput):
            with pytest.raises(CalibrationError):
                cls(bits=4).initialize(bad)


def test_qil_by_hand():
    # centre 1, half-width 0.5: pruned below 0.5, saturated above 1.5, u = |w| - 0.5 in between
    w, c, d = leaf(-2.0, -1.2, -0.3, 0.8, 1.4, 0.5), leaf(1.0), leaf(0.5)
    y = qil_quantize(w, c, d, 3, None, signed=True)
    y.backward(G)
    close(y, -1, -2 / 3, 0, 1 / 3, 1, 0)
    close(w.grad, 0, 2, 0, 4, 5, 0)
    close(c.grad, 2 - 4 - 5)
    close(d.grad, 2 * 0.4 + 4 * 0.4 - 5 * 0.8)
    x, c, d = leaf(-2.0, 0.3, 0.7, 1.2, 1.5, 4.0), leaf(1.0), leaf(0.5)
    y = qil_quantize(x, c, d, 3, None, signed=False)
    y.backward(G)
    close(y, 0, 0, 1 / 3, 2 / 3, 1, 1)
    close(x.grad, 0, 0, 3, 4, 0, 0)


def test_qil_exponent_is_learned_at_two_bits_only():
    w = leaf(-2.0, -1.2, -0.3, 0.8, 1.4, 0.5)
    q = QILWeight(bits=2, dtype=torch.float64)
    q.initialize(w)
    close(torch.stack((q.a, q.c)).flatten(), 1, 1)  # the interval [0, 2]: u = |w| / 2
    with torch.no_grad():
        q.a.fill_(1.0), q.c.fill_(0.5), q.gamma.fill_(2.0)
    y = q(w)
    y.backward(G)
    u = {1: 0.7, 3: 0.3, 4: 0.9}
    close(y, -1, -round(0.49), 0, round(0.09), 1, 0)
    close(w.grad, 0, 2 * 2 * 0.7, 0, 4 * 2 * 0.3, 5 * 2 * 0.9, 0)
    sign = {1: -1, 3: 1, 4: 1}
    close(q.gamma.grad, sum(sign[i] * G[i].item() * u[i] ** 2 * math.log(u[i]) for i in u))
    q.gamma.grad = None
    q.bits = 3
    q(w).sum().backward()
    assert q.gamma.grad is None
