"""AIWQ of a layer that applies the BatchNorm in front of it itself: the C++ kernels against the reference on its result."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import profit_kernels as pk
from profit_kernels import native
from tests import tolerances
from tests.ops.aiwq.closeness import assert_kl_close
from tests.ops.aiwq.test_native import KINDS, UPDATED, grid

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
# a dense and a grouped convolution besides, which run torch's convolution
LAYERS = [*UPDATED, (12, 8, 1, 3, 1), (12, 8, 2, 3, 2)]


def example(rng, channels, outputs, groups, kernel, stride, kind, dtype, training):
    """x, its BatchNorm's result, that quantized and padded, y_new by torch's own convolution, and the settings of a layer."""
    signed, offset, activation = kind
    x = (torch.randn(3, channels, 11, 8, generator=rng) * 3 + 5).to(dtype)
    norm = {
        "bn_weight": torch.randn(channels, generator=rng), "bn_bias": torch.randn(channels, generator=rng),
        "running_mean": torch.randn(channels, generator=rng) + 5, "running_var": torch.rand(channels, generator=rng) + 5,
        "training": training, "eps": 1e-3,
    }  # fmt: skip
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    w_old, w_new = grid(rng, (outputs, channels // groups, kernel, kernel), torch.tensor(0.05), 0.05)
    v = pk.block_batch_norm(x, **norm)  # the fused layer's own, to the bit
    quantized = pk.duq_fake_quantize(v, a, c, bits=4, signed=signed, offset=offset, activation=activation).to(dtype)
    padding = (kernel // 2,) * 4
    padded = F.pad(quantized, padding, value=offset)
    y_new = F.conv2d(padded, w_new.to(dtype), None, stride, groups=groups)
    settings = {
        "a_x": a, "c_x": c, "act_bits": 4, "signed": signed, "offset": offset, "activation": activation, "stride": stride,
        "padding": padding, "groups": groups, "pad_value": offset,
    }  # fmt: skip
    return x, v, padded, y_new, w_old, w_new, norm, settings


@pytest.mark.parametrize("training", [True, False], ids=["of the batch", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", LAYERS, ids=str)
def test_against_the_reference(rng, isa, poisoned_empty, geometry, dtype, training):
    for kind in KINDS:
        x, v, padded, y_new, w_old, w_new, norm, settings = example(rng, *geometry, kind, dtype, training)
        with pk.use_backend("reference", ops=["aiwq_conv"]):
            expected = pk.aiwq_conv2d(v.to(dtype) if dtype != torch.float32 else v, y_new, w_old, **settings)
            same = pk.aiwq_conv2d(x, y_new, w_old, norm=norm, **settings)
        if dtype == torch.float32:  # else v was rounded on its way to the operator, which the layer does not do
            torch.testing.assert_close(same, expected, rtol=0, atol=0)
        before = {name: value.clone() for name, value in norm.items() if isinstance(value, torch.Tensor)}
        for layout in (torch.channels_last, torch.contiguous_format):
            laid = (t.contiguous(memory_format=layout) for t in (x, y_new))
            found = pk.aiwq_conv2d(*laid, w_old, weight_new=w_new, norm=norm, **settings)
            if dtype == torch.float32:
                assert_kl_close(found, same, padded, w_new, w_old, stride=settings["stride"], groups=settings["groups"])
            else:
                torch.testing.assert_close(found, same, **tolerances.KL_CONV_HALF)
        assert all(torch.equal(norm[name], value) for name, value in before.items())


def test_statistics_that_are_known_are_not_taken_again(rng):
    x, _, _, y_new, w_old, w_new, norm, settings = example(rng, *UPDATED[0], KINDS[0], torch.float32, True)
    record = []
    pk.block_conv2d(
        x, norm["bn_weight"], norm["bn_bias"], None, None, w_new, settings["a_x"], settings["c_x"], None, None, training=True,
        eps=norm["eps"], act_bits=4, weight_bits=None, offset=settings["offset"], activation=settings["activation"],
        padding=settings["padding"], groups=settings["groups"], record=record,
    )  # fmt: skip
    expected = pk.aiwq_conv2d(x, y_new, w_old, norm=norm, **settings)
    found = pk.aiwq_conv2d(x, y_new, w_old, norm=norm | {"statistics": record[0]}, **settings)
    assert torch.equal(found, expected)
    other = pk.aiwq_conv2d(x, y_new, w_old, norm=norm | {"statistics": (record[0][0] + 1, record[0][1])}, **settings)
    assert not torch.allclose(other, expected)


def test_wrong_norms_are_refused(rng):
    x, _, _, y_new, w_old, _, norm, settings = example(rng, *UPDATED[0], KINDS[0], torch.float32, True)
    with pytest.raises(ValueError, match=r"aiwq_conv2d: BatchNorm's weight must have shape \[40\], got \(3,\)"):
        pk.aiwq_conv2d(x, y_new, w_old, norm=norm | {"bn_weight": torch.ones(3)}, **settings)
