"""Triton kernels of AIWQ against the reference: under Triton's interpreter on the CPU, compiled where there is a GPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit_kernels.layer import Quantizer
from profit_kernels.ops.aiwq import reference
from profit_kernels.ops.aiwq.op import EPS
from profit_kernels.ops.norm.reference import quantized_input
from tests import tolerances
from tests.ops.aiwq.closeness import assert_kl_close

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def compare(new: Tensor, old: Tensor, tolerance: dict[str, float] = tolerances.KL, eps: float = 1e-12) -> Tensor:
    expected = reference.kl(new, old, eps)
    with pk.use_backend("triton", ops=["aiwq"]):
        actual = pk.aiwq_kl(new.to(DEVICE), old.to(DEVICE), eps=eps).cpu()
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, equal_nan=True, **tolerance)
    return actual


def pair(rng: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    old = torch.randn(shape, generator=rng) * 3 + 1
    return old * 1.1 + torch.randn(shape, generator=rng) * 0.2 - 0.3, old


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 6, 7, 5), (2, 24, 12, 12), (3, 16, 1, 1), (1, 1, 3, 1), (2, 2, 36, 36), (2, 70, 5, 5)]
)
def test_kl(rng, poisoned_empty, shape, layout, dtype):
    new, old = (y.to(dtype).to(memory_format=layout) for y in pair(rng, *shape))
    compare(new, old)


@pytest.mark.parametrize("shape", [(16, 3), (300, 65), (2, 5, 9), (2, 3, 4, 5, 6)])
def test_other_ranks(rng, poisoned_empty, shape):
    compare(*pair(rng, *shape))


def test_layouts_that_differ_or_have_gaps(rng, poisoned_empty):
    new, old = pair(rng, 3, 8, 6, 5)
    compare(new.to(memory_format=torch.channels_last), old)
    compare(new, old.to(memory_format=torch.channels_last))
    compare(new[:, ::2], old[:, ::2])
    compare(new.transpose(0, 1), old.transpose(0, 1))
    compare(new, old.double().to(torch.float16))
    compare(new[:1].expand(3, -1, -1, -1), old, tolerances.KL_UNRELATED)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_identical_outputs_give_zero_and_tiny_changes_are_seen(rng, poisoned_empty, layout):
    old = (torch.randn(8, 4, 10, 10, generator=rng) + 100).to(memory_format=layout)
    assert not compare(old, old.clone()).any()
    new = (old.double() * (1 + 1e-5) - 100e-5).float()
    compare(new, old, {"rtol": 1e-3, "atol": 1e-14})
    compare(old + 1e-3, old)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mean_that_wanders(rng, poisoned_empty, layout):
    """Programs take their pivots from where they start; what lies far from a pivot must not cost digits."""
    new, old = pair(rng, 4, 4, 24, 48)
    drift = torch.linspace(-50, 50, 24)[:, None] + 1000 * (torch.arange(4) == 2).float()[:, None, None, None]
    compare((new + drift).to(memory_format=layout), (old + drift).to(memory_format=layout))


def test_dead_and_broken_channels(rng, poisoned_empty):
    y = torch.randn(4, 5, 5, 5, generator=rng)
    new, old = y.clone(), y.clone()
    new[:, 0] = old[:, 0] = 0.0  # dead before and after
    old[:, 1] = 0.0  # came alive
    new[0, 2, 0, 0] = math.nan
    old[1, 3, 2, 2] = math.inf
    new[:, 4], old[:, 4] = 0.1, 7.3  # two constants, far apart
    for layout in LAYOUTS:
        kl = compare(new.to(memory_format=layout), old.to(memory_format=layout))
        assert kl[0] == 0 and kl[2].isnan() and kl[3].isnan()
    compare(torch.zeros_like(y), y, tolerances.KL_DIED)
    compare(new[:, :1], old[:, :1], eps=0.0)  # 0 / 0
    assert compare(torch.randn(1, 2), torch.randn(1, 2)).isnan().all()  # one sample has no variance


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4), (0, 0)])
def test_empty(poisoned_empty, shape):
    compare(torch.zeros(shape), torch.zeros(shape))


# channels in and out, kernel, stride, pads, dilation, groups, plane
LAYERS = {
    "depthwise 3x3": (6, 6, 3, (1, 1), 1, (1, 1), 6, (9, 8)),
    "depthwise 3x3 stride 2": (24, 24, 3, (2, 2), (0, 1, 0, 1), (1, 1), 24, (14, 14)),
    "depthwise 5x5 stride 2": (17, 17, 5, (2, 2), 2, (1, 1), 17, (7, 7)),
    "depthwise 7x7": (4, 4, 7, (1, 1), 3, (1, 1), 4, (7, 5)),
    "depthwise dilated, uneven": (3, 3, (3, 5), (2, 1), (3, 1, 2, 0), (2, 1), 3, (11, 9)),
    "depthwise multiplier 2": (6, 12, 3, (1, 1), 1, (1, 1), 6, (5, 5)),
    "depthwise 1x1": (8, 8, 1, (1, 1), 0, (1, 1), 8, (6, 6)),
    "depthwise of one pixel": (5, 5, 3, (1, 1), 1, (1, 1), 5, (1, 1)),
    "pointwise": (24, 40, 1, (1, 1), 0, (1, 1), 1, (7, 7)),
    "pointwise narrow": (40, 16, 1, (1, 1), 0, (1, 1), 1, (6, 9)),
    "pointwise stride 2": (6, 10, 1, (2, 2), 0, (1, 1), 1, (9, 8)),
    "pointwise odd": (5, 33, 1, (1, 1), 0, (1, 1), 1, (3, 3)),
}


def layer(
    rng, name: str, dtype: torch.dtype, layout: torch.memory_format, act_bits: int | None, kind, bias: bool = True
):
    """The arguments of aiwq_conv2d and the layer's present weight."""
    cin, cout, kernel, stride, padding, dilation, groups, plane = LAYERS[name]
    signed, offset, activation = kind
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = (torch.randn(2, cin, *plane, generator=rng) * 2).to(dtype).to(memory_format=layout)
    w_old = torch.randn(cout, cin // groups, *kernel, generator=rng)
    w_new = w_old + 0.1 * torch.randn(w_old.shape, generator=rng)
    b = torch.randn(cout, generator=rng) if bias else None
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    pads = [padding] * 4 if isinstance(padding, int) else list(padding)
    qx = quantized_input(x, None, Quantizer(a, c, act_bits, signed, offset, activation))
    settings = {"stride": stride, "padding": pads, "dilation": dilation, "groups": groups, "pad_value": offset}
    quantizer = {"act_bits": act_bits, "signed": signed, "offset": offset, "activation": activation, "a_x": a, "c_x": c}
    b_cast = None if b is None else b.to(dtype)
    y_new = F.conv2d(F.pad(qx, pads, value=offset), w_new.to(dtype), b_cast, stride, 0, dilation, groups)
    return x, qx, y_new.to(memory_format=layout), w_old, w_new, b, settings, quantizer


def compare_layer(rng, name, dtype, layout, act_bits, kind, bias=True):
    x, qx, y_new, w_old, w_new, b, settings, quantizer = layer(rng, name, dtype, layout, act_bits, kind, bias)
    with pk.use_backend("reference"):
        expected = pk.aiwq_conv2d(qx, y_new, w_old, b, **settings)
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in quantizer.items()}
    with pk.use_backend("triton", ops=["aiwq_conv"]):
        bias_on_device = None if b is None else b.to(DEVICE)
        actual, same = (
            pk.aiwq_conv2d(x.to(DEVICE), y_new.to(DEVICE), w.to(DEVICE), bias_on_device, **settings, **on_device).cpu()
            for w in (w_old, w_new)
        )
    if dtype == torch.float32:
        padded = F.pad(qx, settings["padding"], value=settings["pad_value"])
        conv = (settings["stride"], settings["dilation"], settings["groups"])
        assert_kl_close(actual, expected, padded, w_new, w_old, b, *conv)
    else:
        torch.testing.assert_close(actual, expected, equal_nan=True, **tolerances.KL_CONV_KERNEL[dtype])
    if y_new[:, 0].numel() > 1:
        # Two roundings of y over its deviation: (RMS / deviation)^2 times that of a channel around 0.
        rows = y_new.double().transpose(0, 1).flatten(1)
        scale = (rows.square().mean(1) / (rows.var(1) + EPS)).clamp(min=1.0)
        assert (same.double() < tolerances.KL_SAME_WEIGHT[dtype] * scale).all()


HSWISH = (False, -0.375, "hardswish")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(rng, poisoned_empty, name, layout):
    compare_layer(rng, name, torch.float32, layout, 4, HSWISH)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["depthwise 3x3", "pointwise", "pointwise narrow"])
def test_layers_in_half_precision(rng, poisoned_empty, name, dtype):
    # Triton's interpreter cuts bfloat16 off where a GPU rounds, in the DuQ kernel that quantizes before all but the narrow one.
    interpreted = dtype == torch.bfloat16 and DEVICE == "cpu" and name != "pointwise narrow"
    compare_layer(rng, name, dtype, torch.channels_last, None if interpreted else 4, HSWISH)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_in_half_precision(rng, poisoned_empty, name, layout, dtype):
    compare_layer(rng, name, dtype, layout, None if dtype == torch.bfloat16 and DEVICE == "cpu" else 4, HSWISH)


@pytest.mark.parametrize(
    ("bits", "kind"),
    [(None, HSWISH), (None, (False, 0.0, "relu6")), (2, (True, 0.0, "none")), (8, (False, 0.0, "relu"))],
)
@pytest.mark.parametrize("name", ["depthwise 3x3", "pointwise narrow"])
def test_kinds_of_input(rng, poisoned_empty, name, kind, bits):
    compare_layer(rng, name, torch.float32, torch.channels_last, bits, kind, bias=False)


def test_a_float32_input_of_a_bfloat16_layer(rng, poisoned_empty):
    """As under autocast: `old` is rounded to the dtype of y_new."""
    for name in ("depthwise 3x3", "pointwise narrow"):
        x, _, _, w_old, w_new, b, settings, quantizer = layer(rng, name, torch.float32, torch.channels_last, 4, HSWISH)
        with pk.use_backend("reference"):
            qx = pk.duq_fake_quantize(
                x, quantizer["a_x"], quantizer["c_x"], bits=4, offset=-0.375, activation="hardswish"
            )
            padded = F.pad(qx, settings["padding"], value=-0.375).bfloat16()
            conv = (settings["stride"], 0, settings["dilation"], settings["groups"])
            y_new = F.conv2d(padded, w_new.bfloat16(), b.bfloat16(), *conv)
            expected = pk.aiwq_conv2d(x, y_new, w_old, b, **settings, **quantizer)
        on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in quantizer.items()}
        with pk.use_backend("triton", ops=["aiwq_conv"]):
            tensors = (t.to(DEVICE) for t in (x, y_new, w_old, b))
            actual = pk.aiwq_conv2d(*tensors, **settings, **on_device).cpu()
        torch.testing.assert_close(actual, expected, **tolerances.KL_CONV_KERNEL[torch.bfloat16])


def test_nan_in_the_input_reaches_its_channels(poisoned_empty):
    x = torch.randn(2, 4, 6, 6)
    x[0, 1, 2, 3] = math.nan
    w = torch.randn(4, 1, 3, 3)
    y = F.conv2d(x.nan_to_num(), w, padding=1, groups=4)
    with pk.use_backend("triton", ops=["aiwq_conv"]):
        depthwise = pk.aiwq_conv2d(x.to(DEVICE), y.to(DEVICE), w.to(DEVICE), padding=1, groups=4)
        pointwise = pk.aiwq_conv2d(x.to(DEVICE), y.to(DEVICE), torch.randn(4, 4, 1, 1).to(DEVICE))
    assert depthwise.isnan().tolist() == [False, True, False, False]
    assert pointwise.isnan().all()


def test_deterministic(rng):
    new, old = (y.to(DEVICE) for y in pair(rng, 3, 8, 12, 12))
    w = torch.randn(8, 1, 3, 3, generator=rng).to(DEVICE)
    v = torch.randn(8, 8, 1, 1, generator=rng).to(DEVICE)
    with pk.use_backend("triton", ops=["aiwq", "aiwq_conv"]):
        for call in (
            lambda: pk.aiwq_kl(new, old),
            lambda: pk.aiwq_conv2d(old, new, w, padding=1, groups=8),
            lambda: pk.aiwq_conv2d(old, new, v),
        ):
            assert torch.equal(call(), call())


@pytest.mark.parametrize(
    ("weight", "groups", "padding"),
    [((8, 8, 3, 3), 1, 1), ((8, 4, 1, 1), 2, 0), ((8, 8, 1, 1), 1, 1), ((8, 4, 3, 3), 2, 1)],
)
def test_other_layers_are_left_to_the_reference(rng, weight, groups, padding):
    x, w = torch.randn(2, 8, 5, 5, generator=rng).to(DEVICE), torch.randn(weight, generator=rng).to(DEVICE)
    y = F.conv2d(x, w, padding=padding, groups=groups)
    call = lambda: pk.aiwq_conv2d(x, y, w, padding=padding, groups=groups)  # noqa: E731
    with (
        pk.use_backend("triton", ops=["aiwq_conv"]),
        pytest.raises(pk.BackendError, match=r"depthwise.*These can: reference"),
    ):
        call()
    with pk.use_backend("auto"):
        assert call().max() < tolerances.KL_SAME_WEIGHT[torch.float32]


def test_float64_and_outputs_of_another_layer_are_refused():
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    w = torch.zeros(4, 4, 1, 1, device=DEVICE)
    with pk.use_backend("triton", ops=["aiwq", "aiwq_conv"]):
        with pytest.raises(pk.BackendError, match="float64"):
            pk.aiwq_kl(x, x.double())
        with pytest.raises(pk.BackendError, match="float64"):
            pk.aiwq_conv2d(x, x.double(), w)
        with pytest.raises(ValueError, match=r"y_new must be this layer's output \(2, 4, 5, 5\), got"):
            pk.aiwq_conv2d(x, x[:, :, :4], w)
        with pytest.raises(ValueError, match="bias must have shape"):
            pk.aiwq_conv2d(x, x, w, torch.zeros(3, device=DEVICE))
