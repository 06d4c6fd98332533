"""The C++ AIWQ against the reference and against numpy: layouts, instruction sets, threads, dead and broken channels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from profit_kernels import native
from profit_kernels.layer import NO_QUANTIZER, Convolution, Quantizer
from profit_kernels.ops.aiwq import cpp, reference
from tests import tolerances
from tests.ops.aiwq.closeness import assert_kl_close
from tests.oracles import gaussian_kl

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")

EPS = 1e-12
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(2, 3),
    "narrowed": lambda t: t[:, 1:, 1:, 1:],
    "every other row": lambda t: t.to(memory_format=torch.channels_last)[:, :, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(4, 6, 7, 5), (2, 37, 30, 40), (70, 16, 4, 4), (3, 130, 1, 1), (1, 3, 1, 70)])
def test_kl_against_numpy(rng, poisoned_empty, isa, shape, layout):
    old = torch.randn(shape, generator=rng) * 3 + 10
    new = old * 1.1 + torch.randn(shape, generator=rng) * 0.2 - 1
    old, new = LAYOUTS[layout](old), LAYOUTS[layout](new)
    if old.numel() // max(1, old.shape[1]) < 2:
        pytest.skip("this view has one sample per channel")
    kl = cpp.kl(new, old, EPS)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), torch.from_numpy(gaussian_kl(new.numpy(), old.numpy())), **tolerances.KL)


@pytest.mark.parametrize("shape", [(16, 3), (2, 5, 9), (2, 3, 2, 3, 4)])
def test_outputs_of_other_ranks(rng, shape):
    old, new = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    torch.testing.assert_close(cpp.kl(new, old, EPS), reference.kl(new, old, EPS), **tolerances.KL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_half_precision_outputs(rng, isa, dtype, layout):
    old = LAYOUTS[layout](torch.randn(3, 20, 40, 120, generator=rng).to(dtype))
    new = LAYOUTS[layout]((old + 0.1 * torch.randn(old.shape, generator=rng)).to(dtype))
    torch.testing.assert_close(cpp.kl(new, old, EPS), reference.kl(new, old, EPS), **tolerances.KL)
    torch.testing.assert_close(cpp.kl(new.float(), old, EPS), reference.kl(new.float(), old, EPS), **tolerances.KL)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_a_large_mean_does_not_drown_the_variance(rng, layout):
    old = LAYOUTS[layout](torch.randn(8, 4, 10, 10, generator=rng) + 1e4)
    assert not cpp.kl(old, old, EPS).any()
    new = old + 0.125 * torch.randn(old.shape, generator=rng)
    torch.testing.assert_close(cpp.kl(new, old, EPS), reference.kl(new, old, EPS), **tolerances.KL)


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_dead_and_broken_channels(rng, layout):
    y = torch.randn(4, 3, 5, 5, generator=rng)
    new, old = y.clone(), y.clone()
    new[:, 0] = old[:, 0] = 0.0
    old[:, 1] = 0.0
    new[0, 2, 0, 0] = math.nan
    kl = cpp.kl(LAYOUTS[layout](new), LAYOUTS[layout](old), EPS)
    assert kl[0] == 0
    assert kl[1] > 1e6 and kl[1].isfinite()
    assert kl[2].isnan()
    constant = torch.full((4, 2, 5, 5), 0.1)
    assert not cpp.kl(constant, constant, EPS).any()
    assert cpp.kl(torch.randn(1, 2), torch.randn(1, 2), EPS).isnan().all()  # one sample has no variance
    assert cpp.kl(torch.randn(0, 2, 3, 3), torch.randn(0, 2, 3, 3), EPS).isnan().all()


def layer(rng, channels, outputs, groups, kernel, kind, stride=1, dtype=torch.float32):
    """The arguments of conv_kl for a layer without a norm; its y_new comes from torch's own convolution."""
    signed, offset, activation = kind
    x = torch.randn(3, channels, 11, 8, generator=rng).to(memory_format=torch.channels_last)
    w_old = torch.randn(outputs, channels // groups, kernel, kernel, generator=rng)
    w_new = torch.where(torch.rand(w_old.shape, generator=rng) < 0.1, w_old * 0.5, w_old)
    bias, a, c = torch.randn(outputs, generator=rng), torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    pads = [kernel // 2] * 4
    qx = pk.duq_fake_quantize(x, a, c, bits=4, signed=signed, offset=offset, activation=activation).to(dtype)
    padded = F.pad(qx, pads, value=offset)
    y_new = F.conv2d(padded, w_new.to(dtype), bias.to(dtype), stride, groups=groups)
    conv = Convolution([stride] * 2, pads, [1, 1], groups, offset)
    return x, y_new, None, Quantizer(a, c, 4, signed, offset, activation), w_old, bias, conv, EPS


KINDS = [(False, -0.375, "hardswish"), (True, 0.0, "none"), (False, 0.0, "relu6")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel"),
    [(20, 20, 20, 3), (70, 70, 70, 5), (6, 12, 6, 3), (8, 48, 1, 1), (48, 8, 1, 1), (8, 12, 2, 3), (4, 16, 1, 3)],
)
def test_layers_against_the_reference(rng, poisoned_empty, channels, outputs, groups, kernel, kind):
    for stride in (1, 2):
        x, y_new, *rest = layer(rng, channels, outputs, groups, kernel, kind, stride)
        for laid in ((x, y_new), (x.contiguous(), y_new.contiguous())):
            torch.testing.assert_close(cpp.conv_kl(*laid, *rest), reference.conv_kl(*laid, *rest), **tolerances.KL_CONV)


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(20, 20, 20), (8, 48, 1), (48, 8, 1)])
def test_layers_without_an_input_quantizer(rng, channels, outputs, groups):
    x, _, norm, _, w_old, _, *rest = layer(rng, channels, outputs, groups, 1, KINDS[1])
    y_new = F.conv2d(F.hardswish(x), w_old * 1.1, None, groups=groups)
    arguments = (x, y_new, norm, replace(NO_QUANTIZER, activation="hardswish"), w_old, None, *rest)
    torch.testing.assert_close(cpp.conv_kl(*arguments), reference.conv_kl(*arguments), **tolerances.KL_CONV)


@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel"), [(20, 20, 20, 3), (8, 48, 1, 1), (48, 8, 1, 1)])
def test_an_output_in_lower_precision_than_the_input(rng, channels, outputs, groups, kernel):
    """Under autocast the layer ran in bfloat16; the old output is computed in that dtype too."""
    arguments = layer(rng, channels, outputs, groups, kernel, KINDS[0], dtype=torch.bfloat16)
    torch.testing.assert_close(cpp.conv_kl(*arguments), reference.conv_kl(*arguments), **tolerances.KL_CONV_HALF)


def grid(rng, shape, scale, changed):
    """A 4-bit weight before and after an update: some codes one step on, the scale (per tensor or channel) a bit larger."""
    codes = torch.randint(-7, 8, shape, generator=rng).float()
    step = codes.sign().where(codes != 0, torch.ones(()))
    moved = torch.where(torch.rand(shape, generator=rng) < changed, codes - step, codes)
    return codes * scale, moved * (scale * 1.003)


UPDATED = [  # channels, outputs, groups, kernel, stride
    (40, 40, 40, 3, 1),
    (40, 40, 40, 5, 2),
    (6, 12, 6, 3, 1),
    (96, 20, 1, 1, 1),  # tap by tap
    (40, 24, 1, 1, 2),
    (24, 72, 1, 1, 1),  # from the moments of the input
    (16, 130, 1, 1, 1),
]


@pytest.mark.parametrize("changed", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel", "stride"), UPDATED)
def test_the_update_of_a_weight(rng, isa, channels, outputs, groups, kernel, stride, per_channel, changed):
    """Given the new weight too, kernels compute what changed; the answer is that of both whole outputs."""
    for kind in KINDS:
        x, _, _, q, w, bias, conv, _ = layer(rng, channels, outputs, groups, kernel, kind, stride)
        scale = 0.02 + (torch.rand(outputs, 1, 1, 1, generator=rng) if per_channel else torch.rand(1, generator=rng)) * 0.1
        w_old, w_new = grid(rng, w.shape, scale, changed)
        qx = pk.duq_fake_quantize(x, q.a, q.c, bits=q.bits, signed=q.signed, offset=q.offset, activation=q.activation)
        padded = F.pad(qx, conv.pads, value=conv.pad_value)
        y_new = F.conv2d(padded, w_new, bias, stride, groups=groups)
        for layout in (torch.channels_last, torch.contiguous_format):
            laid = (t.contiguous(memory_format=layout) for t in (x, y_new))
            arguments = (*laid, None, q, w_old, bias, conv, EPS)
            found, expected = cpp.conv_kl(*arguments, weight_new=w_new), reference.conv_kl(*arguments)
            assert_kl_close(found, expected, padded, w_new, w_old, bias, stride, groups=groups)


@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel", "stride"), UPDATED)
def test_without_an_update_there_is_no_instability(rng, channels, outputs, groups, kernel, stride):
    x, y_new, *front, w, bias, conv, eps = layer(rng, channels, outputs, groups, kernel, KINDS[0], stride)
    assert not cpp.conv_kl(x, y_new, *front, w, bias, conv, eps, weight_new=w.clone()).any()


@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel", "stride"), UPDATED)
def test_an_update_with_nan_and_of_zero_weights(rng, channels, outputs, groups, kernel, stride):
    x, y_new, *front, w, bias, conv, eps = layer(rng, channels, outputs, groups, kernel, KINDS[1], stride)
    broken = w.clone()
    broken[3, 0, 0, 0] = math.nan
    kl = cpp.conv_kl(x, y_new, *front, broken, bias, conv, eps, weight_new=w)
    assert kl[3].isnan() and kl.isnan().sum() == 1
    zero = torch.zeros_like(w)
    y_zero = bias.view(1, -1, 1, 1).expand(y_new.shape).contiguous()
    assert not cpp.conv_kl(x, y_zero, *front, zero, bias, conv, eps, weight_new=zero).any()
    assert (cpp.conv_kl(x, y_zero, *front, w, bias, conv, eps, weight_new=zero) > 1).all()


@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel", "stride"), UPDATED)
def test_an_update_with_any_number_of_threads(rng, channels, outputs, groups, kernel, stride):
    x, y_new, *front, w, bias, conv, eps = layer(rng, channels, outputs, groups, kernel, KINDS[0], stride)
    w_old, w_new = grid(rng, w.shape, torch.tensor(0.1), 0.05)
    before, level, results = torch.get_num_threads(), torch.ops.profit_cpu.isa(), []
    try:
        for threads, limit in ((1, level), (2, level), (3, level), (1, 0), (1, 1)):
            torch.set_num_threads(threads)
            torch.ops.profit_cpu.limit_isa(limit)
            results.append(cpp.conv_kl(x, y_new, *front, w_old, bias, conv, eps, weight_new=w_new))
    finally:
        torch.set_num_threads(before)
        torch.ops.profit_cpu.limit_isa(level)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_one_weight_gives_zero(rng):
    """The kernels sum in the order of the forward kernel: the same weight gives the same bits."""
    x, _, norm, q, w, bias, conv, eps = layer(rng, 20, 20, 20, 3, KINDS[0])
    with pk.use_backend("cpp", ops=["duq_depthwise"]):
        y = pk.duq_depthwise_conv2d(
            x, w, q.a, q.c, None, None, bias, stride=conv.stride, padding=conv.pads, act_bits=q.bits, weight_bits=None,
            signed=q.signed, offset=q.offset, activation=q.activation,
        )  # fmt: skip
    assert not cpp.conv_kl(x, y, norm, q, w, bias, conv, eps).any()


@pytest.mark.parametrize(("channels", "outputs", "groups"), [(20, 20, 20), (8, 48, 1), (48, 8, 1)])
def test_nan_and_a_single_sample(rng, channels, outputs, groups):
    x, y_new, *rest = layer(rng, channels, outputs, groups, 1, KINDS[1])
    y_new[1, 3, 2, 2] = math.nan
    kl = cpp.conv_kl(x, y_new, *rest)
    assert kl[3].isnan() and kl.isnan().sum() == 1
    one = (x[:1, :, :1, :1], y_new[:1, :, :1, :1])
    assert cpp.conv_kl(*one, *rest).isnan().all()


@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel"), [(70, 70, 70, 3), (8, 48, 1, 1)])
def test_the_number_of_threads_changes_no_bit(rng, channels, outputs, groups, kernel):
    arguments = layer(rng, channels, outputs, groups, kernel, KINDS[0])
    y_old = torch.randn(arguments[1].shape, generator=rng)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            moments = torch.ops.profit_cpu.aiwq_moments(arguments[1])
            results.append((cpp.kl(arguments[1], y_old, EPS), moments, *([cpp.conv_kl(*arguments)] if groups > 1 else [])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_public_entries_take_the_kernels(rng):
    y_new, y_old = torch.randn(2, 3, 4, 4, generator=rng), torch.randn(2, 3, 4, 4, generator=rng)
    with pk.use_backend("cpp", ops=["aiwq", "aiwq_conv"]):
        torch.testing.assert_close(pk.aiwq_kl(y_new, y_old), reference.kl(y_new, y_old, EPS), **tolerances.KL)
        with pytest.raises(pk.BackendError, match="takes no torch.float64"):
            pk.aiwq_kl(y_new, y_old.double())
        with pytest.raises(pk.BackendError, match="takes no torch.float64"):
            pk.aiwq_conv2d(y_new, y_new.double(), torch.ones(3, 1, 1, 1), groups=3)
        with pytest.raises(ValueError, match="both weights must have one shape"):
            pk.aiwq_conv2d(y_new, y_old, torch.ones(3, 1, 1, 1), groups=3, weight_new=torch.ones(3, 1, 3, 3))


def test_wrong_arguments_are_refused():
    y = torch.zeros(2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="one shape"):
        torch.ops.profit_cpu.aiwq_kl(y, y[:, :2], EPS)
    with pytest.raises(RuntimeError, match=r"\[N, C, H, W\]"):
        torch.ops.profit_cpu.aiwq_moments(y[0])
    with pytest.raises(RuntimeError, match="shape of the layer's output"):
        conv = Convolution([1, 1], [0] * 4, [1, 1], 3, 0.0)
        cpp.conv_kl(y, y, None, NO_QUANTIZER, torch.ones(3, 1, 3, 3), None, conv, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "outputs", "groups", "kernel"), [(20, 20, 20, 3), (8, 48, 1, 1), (8, 12, 2, 3)])
def test_moments_to_be_pooled(rng, poisoned_empty, channels, outputs, groups, kernel, dtype):
    x, y_new, *rest, _ = layer(rng, channels, outputs, groups, kernel, KINDS[0], dtype=dtype)
    found, expected = cpp.conv_moments(x, y_new, *rest), reference.conv_moments(x, y_new, *rest)
    assert found.dtype == torch.float64 and found.shape == (5, outputs)
    assert torch.equal(found[0], expected[0])
    tolerance = tolerances.KL_CONV if dtype == torch.float32 else tolerances.KL_CONV_HALF
    torch.testing.assert_close(pk.kl_of_pooled(found), pk.kl_of_pooled(expected), **tolerance)
    one = (x[:1, :, :1, :1], y_new[:1, :, :1, :1])
    if kernel == 1:
        assert not cpp.conv_moments(*one, *rest)[[2, 4]].any()
