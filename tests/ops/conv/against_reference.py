"""One comparison of a depthwise backend with the reference, forward and backward, for the tests of every backend.

Each result may be off by what its sums make of rounding, relative to the sum of the magnitudes of their terms, and by what an
element in a band (testing.rounding_band, clipping_band) makes when it takes the other code or the other side of a mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit_kernels.layer import Convolution, Quantizer, levels
from profit_kernels.ops.conv import reference
from profit_kernels.ops.duq import reference as duq
from profit_kernels.ops.norm.reference import quantized_input
from profit_kernels.testing import clipping_band, rounding_band
from tests import tolerances

NAMES = ("x", "weight", "a_x", "c_x", "a_w", "c_w", "bias")


@dataclass
class Case:
    """Arguments of duq_depthwise_conv2d; act_bits and weight_bits None and activation "none" make it the plain convolution."""

    x: Tensor
    weight: Tensor
    grad_seed: Tensor  # [] or of the output's shape
    raws: list[Tensor | None] = field(default_factory=lambda: [None] * 4)  # a_x, c_x, a_w, c_w
    bias: Tensor | None = None
    stride: list[int] = field(default_factory=lambda: [1, 1])
    pads: list[int] = field(default_factory=lambda: [1, 1, 1, 1])
    dilation: list[int] = field(default_factory=lambda: [1, 1])
    act_bits: int | None = None
    weight_bits: int | None = None
    signed: bool = False
    offset: float = 0.0
    activation: str = "none"
    pad_value: float = 0.0

    @property
    def geometry(self):
        """Keyword arguments of depthwise_conv2d."""
        return {"stride": self.stride, "padding": self.pads, "dilation": self.dilation, "pad_value": self.pad_value}

    @property
    def settings(self):
        """Keyword arguments of duq_depthwise_conv2d."""
        bits = {"act_bits": self.act_bits, "weight_bits": self.weight_bits}
        return {**self.geometry, **bits, "signed": self.signed, "offset": self.offset, "activation": self.activation}

    def convolution(self, pad_value: float) -> Convolution:
        """The geometry with another border."""
        return Convolution(self.stride, self.pads, self.dilation, self.x.shape[1], pad_value)

    @property
    def tensors(self):
        return self.x, self.weight, *self.raws, self.bias


def _run(case: Case, backend: str, device: str) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Output and gradients of x, weight, a_x, c_x, a_w, c_w, bias, through the operators and their autograd."""
    leaves = [None if t is None else t.to(device).detach().requires_grad_() for t in case.tensors]
    with pk.use_backend(backend, ops=["depthwise", "duq_depthwise", "duq"]):
        if case.act_bits is None and case.weight_bits is None and case.activation == "none":
            x, weight, bias = leaves[0], leaves[1], leaves[-1]
            y = pk.depthwise_conv2d(x, weight, bias, **case.geometry)
        else:
            y = pk.duq_depthwise_conv2d(*leaves, **case.settings)
        wanted = [t for t in leaves if t is not None]
        found = torch.autograd.grad(y, wanted, case.grad_seed.to(device, y.dtype).expand(y.shape), allow_unused=True)
    found = iter(found)
    return y.detach().cpu(), tuple(None if t is None else _cpu(next(found)) for t in leaves)


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


def assert_within(name: str, actual: Tensor, expected: Tensor, allowed: Tensor | float) -> None:
    """NaN in the same places, and elsewhere no further apart than `allowed`, element by element."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, name
    actual, expected = actual.double(), expected.double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name}: NaN in other places"
    # Subtracting infinities of one sign would give NaN.
    off = torch.where(actual == expected, 0.0, (actual - expected).abs()).nan_to_num(0.0)
    excess = off - allowed
    assert not (excess > 0).any(), (
        f"{name}: off by {off.max().item():.3e}, {int((excess > 0).sum())} beyond what is allowed"
    )


def compare(case: Case, backend: str, device: str) -> None:
    """Assert that `backend` agrees with the reference on the CPU: values, dtypes, shapes and the output's memory format."""
    expected, wants = _run(case, "reference", "cpu")
    actual, gots = _run(case, backend, device)
    for layout in (torch.contiguous_format, torch.channels_last):
        assert actual.is_contiguous(memory_format=layout) == expected.is_contiguous(memory_format=layout)

    x, w = case.x.detach(), case.weight.detach()
    a_x, c_x, a_w, c_w = case.raws
    input_settings = {"signed": case.signed, "offset": case.offset, "activation": case.activation}
    qx = quantized_input(x, None, Quantizer(a_x, c_x, case.act_bits, *input_settings.values())).double()
    qw = w if case.weight_bits is None else duq.forward(w, a_w, c_w, case.weight_bits, True, 0.0, "none")
    qw = qw.to(x.dtype).double()
    none = torch.zeros((), dtype=torch.float64)
    x_step = w_step = none  # how far an element in its rounding band may move
    kept_x, kept_w = torch.ones_like(x, dtype=torch.bool), torch.ones_like(w, dtype=torch.bool)
    if case.act_bits is not None:
        band = rounding_band(x, a_x, bits=case.act_bits, **input_settings)
        x_step = band * F.softplus(c_x.double()) / levels(case.act_bits, case.signed)
        kept_x = ~clipping_band(x, a_x, **input_settings)
    if case.weight_bits is not None:
        w_step = rounding_band(w, a_w, bits=case.weight_bits, signed=True) * F.softplus(c_w.double()).view(-1, 1, 1, 1)
        w_step = w_step / levels(case.weight_bits, True)
        kept_w = ~clipping_band(w, a_w, signed=True)
    half = tolerances.HALF_OF_MAGNITUDE.get(x.dtype, 0.0)
    relative = tolerances.CONV_OF_MAGNITUDE + half
    size_x, size_w = qx.abs().nan_to_num(0.0, 0.0), qw.abs()
    pad = abs(case.pad_value)

    def conv(u: Tensor, v: Tensor, value: float) -> Tensor:
        return reference.convolution(u.expand(x.shape), v.expand(w.shape), None, case.convolution(value))

    magnitude = conv(size_x, size_w, pad)
    allowed = relative * (magnitude + (0 if case.bias is None else case.bias.double().abs().max()))
    assert_within("output", actual, expected, allowed + conv(x_step, size_w, 0.0) + conv(size_x, w_step, pad))

    g = case.grad_seed.double().expand(expected.shape)

    def back(grad: Tensor, u: Tensor, v: Tensor, value: float) -> tuple[Tensor | None, ...]:
        bias = None if case.bias is None else case.bias.double()
        need = (True, True, bias is not None)
        return reference.convolution_backward(grad, u.expand(x.shape), v.expand(w.shape), bias, case.convolution(value), need)

    gq, _, _ = back(g, qx.nan_to_num(0.0), qw, case.pad_value)
    g_size, gw_size, gb_size = back(g.abs(), size_x, size_w, pad)
    moved = back(g.abs(), x_step, w_step, 0.0)[:2]
    ratio = ratio_w = 1.0
    if case.act_bits is not None:
        ratio = max(1.0, (F.softplus(c_x) / F.softplus(a_x)).item())
    if case.weight_bits is not None:
        ratio_w = max(1.0, (F.softplus(c_w) / F.softplus(a_w)).max().item())

    gx, gw, *intervals, gb = gots
    want_x, want_w, *want_intervals, want_b = wants
    # Outside a clipping band; h-swish' is at most 1.5.
    off_x = 1.5 * ratio * (relative * g_size + moved[0])
    assert_within("gx", gx[kept_x], want_x[kept_x], off_x[kept_x])
    off_w = ratio_w * (relative * gw_size + moved[1])
    assert_within("gw", gw[kept_w], want_w[kept_w], off_w[kept_w])
    if case.bias is not None:
        assert_within("gbias", gb, want_b, relative * gb_size)
    slack_x = ratio * (
        (relative * g_size + moved[0]).sum() + 2 * gq.abs()[~kept_x].sum() + (gq.abs() * (x_step > 0)).sum()
    )
    slack_w = (
        3 * ratio_w * ((relative * gw_size + moved[1]).sum() + gw_size[~kept_w].sum() + (gw_size * (w_step > 0)).sum())
    )
    for name, mine, theirs, slack in zip(
        NAMES[2:6], intervals, want_intervals, (slack_x,) * 2 + (slack_w,) * 2, strict=True
    ):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert_within(name, mine, theirs, slack)
