"""The reference of the depthwise convolution: loops, border pixels, the integer identity, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import profit_kernels as pk
from profit_kernels.checks import pads
from profit_kernels.ops.conv import reference
from tests import tolerances
from tests.ops.conv.registered import registered
from tests.oracles import loop_depthwise, textbook_duq

GEOMETRIES = [  # kernel, stride, padding, dilation
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (5, 1, 2, 1),
    (5, 2, (1, 2, 1, 2), 1),
    (7, 2, 3, 1),
    (3, 1, 2, 2),
    (3, (2, 1), (0, 1), (1, 2)),
]


@pytest.fixture(autouse=True)
def reference_backend():
    with pk.use_backend("reference"):
        yield


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("pad_value", [0.0, -0.375])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_forward_against_loops(rng, kernel, stride, padding, dilation, pad_value, multiplier):
    x = torch.randn(2, 3, 9, 8, generator=rng, dtype=torch.float64)
    w = torch.randn(3 * multiplier, 1, kernel, kernel, generator=rng, dtype=torch.float64)
    bias = torch.randn(3 * multiplier, generator=rng, dtype=torch.float64)
    y = pk.depthwise_conv2d(x, w, bias, stride=stride, padding=padding, dilation=dilation, pad_value=pad_value)
    two = lambda v: (v, v) if isinstance(v, int) else v  # noqa: E731
    expected = loop_depthwise(x.numpy(), w.numpy(), two(stride), pads("test", padding), two(dilation), pad_value)
    torch.testing.assert_close(y, torch.from_numpy(expected) + bias[None, :, None, None], **tolerances.CONV64)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_gradients_by_finite_differences(rng, kernel, stride, padding, dilation):
    x = torch.randn(1, 2, 8, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, kernel, kernel, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, generator=rng, dtype=torch.float64, requires_grad=True)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "pad_value": -0.375}
    with registered():
        assert gradcheck(lambda *leaves: pk.depthwise_conv2d(*leaves, **settings), (x, w, bias))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(4, 4), (None, 3), (2, None), (None, None)])
@pytest.mark.parametrize(
    ("signed", "offset", "activation"), [(False, -0.375, "hardswish"), (False, 0.0, "relu6"), (True, 0.0, "none")]
)
def test_fused_against_the_textbook(rng, signed, offset, activation, act_bits, weight_bits, channels_last):
    x = torch.randn(2, 4, 9, 10, generator=rng, dtype=torch.float64) * 2
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    w = torch.randn(4, 1, 3, 3, generator=rng, dtype=torch.float64) * 0.3
    raws = [torch.randn(1, generator=rng, dtype=torch.float64) for _ in range(4)]
    bias = torch.randn(4, generator=rng, dtype=torch.float64)

    def textbook(x, w, a_x, c_x, a_w, c_w, bias):
        act = {"hardswish": F.hardswish, "relu6": F.relu6, "none": lambda t: t}[activation]
        qx = act(x) if act_bits is None else textbook_duq(x, a_x, c_x, act_bits, signed, offset, activation)
        qw = w if weight_bits is None else textbook_duq(w, a_w, c_w, weight_bits, True, 0.0, "none")
        return F.conv2d(F.pad(qx, (1, 1, 1, 1), value=offset), qw, bias, 2, groups=4)

    def public(x, w, a_x, c_x, a_w, c_w, bias):
        return pk.duq_depthwise_conv2d(
            x, w, a_x, c_x, a_w, c_w, bias, stride=2, padding=1, act_bits=act_bits, weight_bits=weight_bits,
            signed=signed, offset=offset, activation=activation,
        )  # fmt: skip

    def operator(*leaves):
        with registered():
            return public(*leaves)

    results = []
    for function in (textbook, public, operator):
        leaves = [t.clone().requires_grad_() for t in (x, w, *raws, bias)]
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        results.append([y.detach(), *grads])
    for result in results[1:]:
        for mine, theirs in zip(result, results[0], strict=True):
            if theirs is None:
                assert mine is None or not mine.any()
            else:
                torch.testing.assert_close(mine, theirs, **tolerances.CONV64)


def test_negative_padding_is_an_integer_convolution_plus_one_constant(rng):
    """y = sx * sw * conv0(codes_x, codes_w) + d * sw * sum(codes_w), the border included (docs/maths.md, section 2)."""
    d, bits = -0.375, 4
    x = torch.randn(2, 3, 6, 6, generator=rng, dtype=torch.float64) * 2
    w = torch.randn(3, 1, 5, 5, generator=rng, dtype=torch.float64)
    a_x, c_x, a_w, c_w = (torch.randn(1, generator=rng, dtype=torch.float64) for _ in range(4))
    y = pk.duq_depthwise_conv2d(
        x, w, a_x, c_x, a_w, c_w, padding=2, act_bits=bits, weight_bits=bits, offset=d, activation="hardswish"
    )
    qx = pk.duq_codes(x, a_x, bits=bits, offset=d, activation="hardswish").double()
    qw = pk.duq_codes(w, a_w, bits=bits, signed=True).double()
    sx, sw = F.softplus(c_x) / 15, F.softplus(c_w) / 7
    expected = sx * sw * F.conv2d(qx, qw, padding=2, groups=3) + (d * sw * qw.sum((1, 2, 3)))[None, :, None, None]
    torch.testing.assert_close(y, expected, **tolerances.CONV64)
    border = torch.ones(6, 6, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    zero_padded = F.conv2d(sx * qx + d, sw * qw, padding=2, groups=3)
    assert not torch.allclose(zero_padded[..., border], y[..., border])
    torch.testing.assert_close(zero_padded[..., ~border], y[..., ~border], **tolerances.CONV64)


def test_weight_gradient_includes_the_padded_taps(rng):
    """Only padding under a corner tap of a 1 x 1 map: its gradient is d times the upstream gradient."""
    x = torch.randn(1, 1, 1, 1, generator=rng)
    w = torch.zeros(1, 1, 3, 3, requires_grad=True)
    pk.depthwise_conv2d(x, w, padding=1, pad_value=-0.375).backward(torch.full((1, 1, 1, 1), 2.0))
    expected = torch.full((3, 3), -0.75)
    expected[1, 1] = 2 * x.item()
    torch.testing.assert_close(w.grad[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(rng, dtype):
    x, w = torch.randn(1, 2, 5, 5, generator=rng), torch.randn(2, 1, 3, 3, generator=rng)
    one = torch.ones(1)
    with torch.autocast("cpu", dtype):
        assert pk.depthwise_conv2d(x, w, padding=1).dtype == dtype
        y = pk.duq_depthwise_conv2d(x, w, one, one, one, one, padding=1, act_bits=4, weight_bits=4)
        assert y.dtype == dtype
        assert pk.duq_fake_quantize(x, one, one, bits=4).dtype == torch.float32


def test_empty_batch():
    x = torch.zeros(0, 2, 5, 5, requires_grad=True)
    w = torch.zeros(2, 1, 3, 3, requires_grad=True)
    y = pk.depthwise_conv2d(x, w, padding=1, pad_value=-0.375)
    assert y.shape == (0, 2, 5, 5)
    y.sum().backward()
    assert not w.grad.any()


def test_pad_and_unpad_are_inverse(rng):
    x = torch.randn(1, 1, 4, 5, generator=rng)
    assert torch.equal(reference.unpad(reference.pad(x, [1, 2, 3, 0], 9.0), [1, 2, 3, 0]), x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"must be \[N, C, H, W\]"),
        ({"weight": torch.zeros(3, 3, 3, 3)}, r"\[C_out, 1, kh, kw\]"),
        ({"weight": torch.zeros(4, 1, 3, 3)}, "multiple of the input's 3 channels"),
        ({"bias": torch.zeros(2)}, "bias must have shape"),
        ({"stride": 0}, "stride"),
        ({"padding": (1, 2, 3)}, "padding must be"),
        ({"padding": -1}, "padding must be"),
        ({"dilation": 0}, "dilation"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"x": torch.zeros(1, 3, 5, 5), "weight": torch.zeros(3, 1, 3, 3)} | change
    with pytest.raises(ValueError, match=message):
        pk.depthwise_conv2d(**arguments)
