"""AIWQ of a layer that applies the BatchNorm in front of it itself: the C++ kernels against the reference on its result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from profit_kernels import native
from profit_kernels.layer import BatchNorm, Convolution, Quantizer
from profit_kernels.ops.norm.op import statistics
from tests import tolerances
from tests.ops.aiwq.closeness import assert_kl_close
from tests.ops.aiwq.test_native import KINDS, UPDATED, grid

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
# a dense and a grouped convolution besides, which run torch's convolution
LAYERS = [*UPDATED, (12, 8, 1, 3, 1), (12, 8, 2, 3, 2)]


def example(rng, channels, outputs, groups, kernel, stride, kind, dtype, training):
    """x, BatchNorm and quantizer, the latter's result with its border, y_new by torch's own convolution, and the layer."""
    signed, offset, activation = kind
    x = (torch.randn(3, channels, 11, 8, generator=rng) * 3 + 5).to(dtype)
    norm = BatchNorm(
        torch.randn(channels, generator=rng), torch.randn(channels, generator=rng), torch.randn(channels, generator=rng) + 5,
        torch.rand(channels, generator=rng) + 5, training, 0.1, 1e-3,
    )  # fmt: skip
    q = Quantizer(torch.randn(1, generator=rng), torch.randn(1, generator=rng), 4, signed, offset, activation)
    w_old, w_new = grid(rng, (outputs, channels // groups, kernel, kernel), torch.tensor(0.05), 0.05)
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    v = pk.block_batch_norm(x, *tensors, training=training, eps=norm.eps)  # the fused layer's own, to the bit
    quantized = pk.duq_fake_quantize(v, q.a, q.c, bits=4, signed=signed, offset=offset, activation=activation).to(dtype)
    conv = Convolution([stride] * 2, [kernel // 2] * 4, [1, 1], groups, offset)
    padded = F.pad(quantized, conv.pads, value=offset)
    y_new = F.conv2d(padded, w_new.to(dtype), None, stride, groups=groups)
    return x, v, padded, y_new, w_old, w_new, norm, q, conv


@pytest.mark.parametrize("training", [True, False], ids=["of the batch", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", LAYERS, ids=str)
def test_against_the_reference(rng, isa, poisoned_empty, geometry, dtype, training):
    for kind in KINDS:
        x, v, padded, y_new, w_old, w_new, norm, q, conv = example(rng, *geometry, kind, dtype, training)
        taken = statistics(x, norm, move=False)
        with pk.use_backend("reference", ops=["aiwq_conv"]):
            of_v = v.to(dtype) if dtype != torch.float32 else v
            expected = pk.quantized_conv2d_kl(of_v, y_new, None, q, w_old, None, conv)
            same = pk.quantized_conv2d_kl(x, y_new, taken, q, w_old, None, conv)
        if dtype == torch.float32:  # else v was rounded on its way to the operator, which the layer does not do
            torch.testing.assert_close(same, expected, rtol=0, atol=0)
        for layout in (torch.channels_last, torch.contiguous_format):
            laid = (t.contiguous(memory_format=layout) for t in (x, y_new))
            found = pk.quantized_conv2d_kl(*laid, taken, q, w_old, None, conv, weight_new=w_new)
            if dtype == torch.float32:
                assert_kl_close(found, same, padded, w_new, w_old, stride=conv.stride, groups=conv.groups)
            else:
                torch.testing.assert_close(found, same, **tolerances.KL_CONV_HALF)


def test_the_statistics_are_those_of_the_layer(rng):
    x, _, _, y_new, w_old, w_new, norm, q, conv = example(rng, *UPDATED[0], KINDS[0], torch.float32, True)
    expected = statistics(x, norm, move=False)
    before = norm.running_mean.clone()
    _, taken = pk.quantized_conv2d(x, norm, q, w_new, None, conv)
    assert torch.equal(taken.mean, expected.mean) and torch.equal(taken.invstd, expected.invstd)
    assert not torch.equal(norm.running_mean, before), "the layer moves them"
    found = pk.quantized_conv2d_kl(x, y_new, taken, q, w_old, None, conv)
    other = pk.quantized_conv2d_kl(x, y_new, replace(taken, mean=taken.mean + 1), q, w_old, None, conv)
    assert not torch.allclose(other, found)


def test_wrong_norms_are_refused(rng):
    x, *_, w_new, norm, q, conv = example(rng, *UPDATED[0], KINDS[0], torch.float32, True)
    with pytest.raises(ValueError, match=r"block_conv2d: BatchNorm's weight must have shape \[40\], got \(3,\)"):
        pk.quantized_conv2d(x, replace(norm, weight=torch.ones(3)), q, w_new, None, conv)
