"""Triton kernels of the depthwise convolution: under Triton's interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import profit_kernels as pk
from profit_kernels.testing import assert_close_banded, edge_data
from tests.interpreter import round_as_a_device
from tests.ops.conv.against_reference import Case, compare
from tests.ops.duq.common import INPUTS

triton = pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
compare = partial(compare, backend="triton", device=DEVICE)

GEOMETRIES = [  # kernel, stride, padding (left, right, top, bottom), dilation
    ((3, 3), [1, 1], [1, 1, 1, 1], [1, 1]),
    ((3, 3), [2, 2], [1, 1, 1, 1], [1, 1]),
    ((3, 3), [2, 2], [0, 1, 0, 1], [1, 1]),
    ((5, 5), [1, 1], [2, 2, 2, 2], [1, 1]),
    ((5, 5), [2, 2], [1, 2, 1, 2], [1, 1]),
    ((7, 7), [2, 2], [3, 3, 3, 3], [1, 1]),
    ((3, 3), [1, 1], [2, 2, 2, 2], [2, 2]),
    ((3, 2), [2, 1], [3, 0, 0, 4], [1, 2]),
    ((1, 1), [3, 3], [0, 0, 0, 0], [1, 1]),
]
SLOW = {2, 5, 7, 8}  # of the layouts, NCHW runs those in the slow sweep only


@pytest.fixture(autouse=True)
def device_rounding(monkeypatch):
    if DEVICE == "cpu":
        round_as_a_device(monkeypatch)


def plain(
    rng, shape, kernel, stride, pads, dilation, layout, multiplier=1, dtype=torch.float32, pad_value=-0.375
) -> Case:
    x = torch.randn(shape, generator=rng).to(dtype).to(memory_format=FORMATS[layout])
    w = torch.randn(shape[1] * multiplier, 1, *kernel, generator=rng).to(dtype)
    y = pk.depthwise_conv2d(x, w, stride=stride, padding=pads, dilation=dilation)
    grad = torch.randn(y.shape, generator=rng).to(dtype)
    bias = torch.randn(w.shape[0], generator=rng).to(dtype)
    return Case(x, w, grad, bias=bias, stride=stride, pads=pads, dilation=dilation, pad_value=pad_value)


def fused(rng, case, act_bits, weight_bits, signed, offset, activation, per_channel=False) -> Case:
    case.act_bits, case.weight_bits, case.signed, case.offset, case.activation = (
        act_bits, weight_bits, signed, offset, activation,
    )  # fmt: skip
    case.pad_value = offset
    case.x = case.x * 2
    channels = case.weight.shape[0] if per_channel else 1
    case.raws = [torch.randn(n, generator=rng) for n in (1, 1, channels, channels)]
    return case


@pytest.mark.parametrize("number", range(len(GEOMETRIES)))
def test_geometries_channels_last(rng, poisoned_empty, number):
    compare(plain(rng, (2, 6, 7, 9), *GEOMETRIES[number], "channels_last"))


@pytest.mark.parametrize("number", sorted(set(range(len(GEOMETRIES))) - SLOW))
def test_geometries_nchw(rng, poisoned_empty, number):
    compare(plain(rng, (2, 2, 7, 9), *GEOMETRIES[number], "nchw"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_fused(rng, poisoned_empty, signed, offset, activation, dtype):
    case = plain(rng, (2, 8, 6, 5), *GEOMETRIES[0], "channels_last", dtype=dtype)
    compare(fused(rng, case, 4, 4, signed, offset, activation, per_channel=activation == "relu"))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(2, 8), (8, 2), (None, 3), (3, None), (None, None)])
def test_widths_and_sides_that_pass_through(rng, poisoned_empty, act_bits, weight_bits, layout):
    case = plain(rng, (2, 2, 5, 6), *GEOMETRIES[1], layout)
    compare(fused(rng, case, act_bits, weight_bits, False, -0.375, "hardswish"))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "hardswish"])
def test_a_convolution_of_one_tap_shows_the_codes(rng, record_band, activation):
    """With a 1 x 1 filter of ones the output is the quantized input: its codes, on random data and at the edges."""
    signed, offset = activation == "none", -0.375 if activation == "hardswish" else 0.0
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    settings = {"bits": 4, "signed": signed, "offset": offset, "activation": activation}
    x = torch.randn(2, 4, 32, 32, generator=rng) * 2
    if activation == "none":
        x = torch.cat([x, edge_data(8192, a, bits=4, signed=True, generator=rng).view(2, 4, 32, 32)])
    with pk.use_backend("triton", ops=["duq_depthwise"]):
        y = pk.duq_depthwise_conv2d(
            x.to(DEVICE), torch.ones(4, 1, 1, 1, device=DEVICE), a.to(DEVICE), c.to(DEVICE), None, None, act_bits=4,
            weight_bits=None, signed=signed, offset=offset, activation=activation,
        )  # fmt: skip
    expected = pk.duq_fake_quantize(x, a, c, **settings)
    report = record_band("triton depthwise", assert_close_banded(y, expected, x, a, c, **settings))
    assert report.differing_outside == 0
    assert report.inside > 100 if activation == "none" else report.fraction_inside < 0.01


@pytest.mark.parametrize("layout", FORMATS)
def test_channel_multiplier(rng, poisoned_empty, layout):
    case = plain(rng, (2, 2, 5, 4), *GEOMETRIES[1], layout, multiplier=3)
    compare(fused(rng, case, 4, 4, True, 0.0, "none", per_channel=True))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 1, 1, 1), (3, 1, 1, 2), (1, 9, 2, 1), (1, 3, 21, 2)])
def test_odd_and_empty_shapes(rng, poisoned_empty, shape, layout):
    case = plain(rng, shape, *GEOMETRIES[0], layout)
    compare(fused(rng, case, 4, 4, False, 0.0, "relu6"))


def test_operands_that_are_views(rng, poisoned_empty):
    case = plain(rng, (2, 4, 6, 5), *GEOMETRIES[0], "nchw")
    wide = torch.randn(2, 8, 6, 5, generator=rng)
    case.x = wide[:, ::2]
    compare(case)
    case.x = wide.to(memory_format=torch.channels_last)[:, ::2]
    case.weight = case.weight.transpose(2, 3)
    compare(case)
    case.grad_seed = torch.ones(())
    compare(case)


@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_nan_and_infinities(rng, poisoned_empty, signed, offset, activation):
    """A NaN reaches the outputs that see it and both interval gradients; infinities clip."""
    case = plain(rng, (1, 4, 5, 6), *GEOMETRIES[0], "channels_last")
    fused(rng, case, 4, 4, signed, offset, activation)
    case.x[0, 1, 2, 3], case.x[0, 2, 1, 1] = float("inf"), -float("inf")
    compare(case)
    case.x[0, 3, 2, 2] = float("nan")
    case.raws[2].fill_(5.0)  # no weight is clipped
    y, gradients = run_triton(case)
    seen = torch.zeros(5, 6, dtype=torch.bool)
    seen[1:4, 1:4] = True
    assert torch.equal(y[0, 3].isnan(), seen) and not y[0, :3].isnan().any()
    gx, gw, ga_x, gc_x, *_ = gradients
    assert gx[0, 3, 2, 2] == 0 and not gx.isnan().any()
    assert ga_x.isnan() and gc_x.isnan()
    assert gw[3].isnan().any() and not gw[:3].isnan().any()


def run_triton(case: Case):
    leaves = [None if t is None else t.to(DEVICE).detach().requires_grad_() for t in case.tensors]
    with pk.use_backend("triton", ops=["duq_depthwise", "duq"]):
        y = pk.duq_depthwise_conv2d(*leaves, **case.settings)
        gradients = torch.autograd.grad(y, leaves, case.grad_seed.to(DEVICE))
    return y.detach().cpu(), [g.cpu() for g in gradients]


@pytest.mark.parametrize("layout", FORMATS)
def test_deterministic(rng, layout):
    case = plain(rng, (3, 2, 9, 9), *GEOMETRIES[0], layout)
    fused(rng, case, 4, 4, False, -0.375, "hardswish")
    (y, first), (again, second) = run_triton(case), run_triton(case)
    assert torch.equal(y, again)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_a_kernel_larger_than_the_padded_input_is_refused():
    with (
        pk.use_backend("triton", ops=["depthwise"]),
        pytest.raises(ValueError, match="larger than the padded input, 4 x 3"),
    ):
        pk.depthwise_conv2d(
            torch.zeros(1, 1, 2, 3, device=DEVICE), torch.zeros(1, 1, 5, 3, device=DEVICE), padding=(1, 0)
        )


@pytest.mark.slow
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("number", range(len(GEOMETRIES)))
@pytest.mark.parametrize(("signed", "offset", "activation"), [(False, -0.375, "hardswish"), (True, 0.0, "none")])
def test_sweep(rng, poisoned_empty, signed, offset, activation, number, layout):
    for dtype in (torch.float32, torch.bfloat16):
        case = plain(rng, (2, 5, 11, 10), *GEOMETRIES[number], layout, dtype=dtype)
        compare(fused(rng, case, 3, 5, signed, offset, activation, per_channel=True))
