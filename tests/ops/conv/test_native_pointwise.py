"""The pointwise block in integers against the same in float64, and where it leaves the work to the convolution of floats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import profit_kernels as pk
from profit_kernels import native
from profit_kernels.layer import Convolution, Quantizer, levels
from profit_kernels.ops.conv import cpp, reference
from profit_kernels.ops.duq import reference as duq
from profit_kernels.testing import assert_close_banded, edge_data
from tests import tolerances
from tests.ops.conv.against_reference import assert_within
from tests.ops.norm.test_native import INPUTS, data, quantizer

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")

ONE = Convolution([1, 1], [0, 0, 0, 0], [1, 1], 1, 0.0)


@pytest.fixture
def byte_products():
    if not torch.ops.profit_cpu.has_byte_products():
        pytest.skip("this processor has no byte products (AVX-512 VNNI)")


def quantized_weight(rng, outputs: int, inputs: int, bits: int = 4, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """(a weight on the grid of its codes, its raw scale)"""
    n = outputs if per_channel else 1
    a, c = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
    w = torch.randn(outputs, inputs, 1, 1, generator=rng)
    return duq.forward(w, a, c, bits, True, 0.0, "none"), c


def expected(x, norm, weight, q, bias) -> tuple[Tensor, Tensor]:
    """y in float64 from the quantized input of the C++ kernel, whose codes are tested elsewhere; and the sizes of its terms."""
    qx, w = cpp.quantized_input(x, norm, q).double(), weight.double()
    b = None if bias is None else bias.double()
    # A quantized value is a sum itself, of step * code and the offset, and is rounded at their size.
    size = (qx - q.offset).abs() + abs(q.offset)
    return F.conv2d(qx, w, b), F.conv2d(size, w.abs(), None if b is None else b.abs())


def compare(x, norm, weight, q, bias, c_w, bits) -> None:
    y = cpp.pointwise(x, norm, q, weight, bias, ONE, (c_w, bits))
    assert y is not None
    want, size = expected(x, norm, weight, q, bias)
    assert y.stride() == F.conv2d(x, weight).stride()
    assert_within("y", y.double(), want, (tolerances.CONV_OF_MAGNITUDE * size).nan_to_num(0.0))


# Fewer pixels than are multiplied at once, a last group that is not full, several chunks; one pixel of several images.
SHAPES = [
    (1, 8, 1, 2), (3, 16, 5, 7), (2, 36, 9, 9), (7, 24, 1, 1), (4, 96, 40, 33), (1, 960, 4, 4), (2, 2052, 3, 3), (1, 4, 90, 90),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 40, 64, 65, 120])
def test_shapes(shape, outputs, rng, poisoned_empty, byte_products):
    for (signed, offset, activation), affine in zip(INPUTS, (True, False, True, False), strict=True):
        x, _, norm = data(rng, shape, affine=affine, of_batch=shape[0] * shape[2] * shape[3] > 1)
        weight, c_w = quantized_weight(rng, outputs, shape[1], per_channel=signed)
        bias = torch.randn(outputs, generator=rng) if affine else None
        compare(x, norm, weight, quantizer(rng, 4, signed, offset, activation), bias, c_w, 4)


@pytest.mark.parametrize("signed, offset, activation", [*INPUTS, (False, -0.375, "none"), (False, 0.0, "none")])
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_widths_and_kinds(bits, weight_bits, signed, offset, activation, rng, poisoned_empty, byte_products):
    x, _, norm = data(rng, (2, 20, 9, 8))
    weight, c_w = quantized_weight(rng, 24, 20, weight_bits)
    for front in (norm, None):
        compare(x, front, weight, quantizer(rng, bits, signed, offset, activation), None, c_w, weight_bits)


def test_the_largest_codes(byte_products):
    """Every product is the largest there is, of either sign."""
    x = torch.full((1, 4096, 3, 3), 9.0).to(memory_format=torch.channels_last)
    raw = torch.ones(1)
    signs = torch.tensor([1.0, -1.0]).repeat(16).view(32, 1, 1, 1)
    weight = duq.forward(9 * signs.expand(32, 4096, 1, 1), raw, raw, 8, True, 0.0, "none")
    for signed, sign in ((False, 1), (True, 1), (True, -1)):
        compare(sign * x, None, weight, Quantizer(raw, raw, 8, signed, 0.0, "none"), None, raw, 8)


@pytest.mark.parametrize("signed, offset", [(False, 0.0), (False, -0.375), (True, 0.0)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_data_at_the_edges(signed, offset, bits, rng, record_band, byte_products):
    """A diagonal weight shows the quantized input itself."""
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    q = Quantizer(a, c, bits, signed, offset, "none")
    x = edge_data(8 * 24 * 50, a, bits=bits, signed=signed, offset=offset, generator=rng).view(1, 24, 50, 8).permute(0, 3, 1, 2)
    one = torch.log(torch.expm1(torch.ones(1, dtype=torch.float64))).float()
    weight = duq.interval(one, one) * torch.eye(8).view(8, 8, 1, 1)
    y = cpp.pointwise(x, None, q, weight, None, ONE, (one, 8))
    step = duq.interval(c, x) / levels(bits, signed)
    y = torch.round((y - offset) / step) * step + offset  # the diagonal is 1 but for a rounding
    settings = {"bits": bits, "signed": signed, "offset": offset}
    report = assert_close_banded(y, duq.forward(x, a, c, *settings.values(), "none"), x, a, c, **settings)
    record_band("cpp integers, edges", report)
    assert report.differing_outside == 0


@pytest.mark.parametrize("signed, offset, activation", INPUTS)
def test_nan_and_infinities(signed, offset, activation, rng, poisoned_empty, byte_products):
    x, _, norm = data(rng, (2, 24, 30, 31), of_batch=False)
    weight, c_w = quantized_weight(rng, 20, 24, per_channel=True)
    q = quantizer(rng, 4, signed, offset, activation)
    x[0, 3, 0, 0] = x[1, 17, 29, 30] = x[1, 0, 4, 9] = float("nan")
    x[0, 5, 2, 2], x[1, 7, 3, 3] = float("inf"), -float("inf")
    compare(x, norm, weight, q, None, c_w, 4)
    weight[5, 7] = float("nan")
    compare(x, norm, weight, q, torch.randn(20, generator=rng), c_w, 4)
    norm.gamma[4] = float("nan")
    assert cpp.pointwise(x, norm, q, weight, None, ONE, (c_w, 4)).isnan().all()


def test_the_number_of_threads_changes_no_bit(rng, byte_products):
    x, _, norm = data(rng, (3, 24, 37, 41))
    weight, c_w = quantized_weight(rng, 72, 24)
    q = quantizer(rng, 4, False, -0.375, "hardswish")
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(cpp.pointwise(x, norm, q, weight, None, ONE, (c_w, 4)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_output_follows_the_input_and_no_default(rng, byte_products):
    x, _, norm = data(rng, (2, 8, 7, 6))
    weight, c_w = quantized_weight(rng, 12, 8)
    q, before = quantizer(rng, 4, *INPUTS[1]), torch.get_default_dtype()
    expected = cpp.pointwise(x, norm, q, weight, None, ONE, (c_w, 4))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            assert torch.equal(cpp.pointwise(x, norm, q, weight, None, ONE, (c_w, 4)), expected)
    finally:
        torch.set_default_dtype(before)


LEFT = {  # to the convolution of floats: x, weight, q, conv, c_w
    "channels": lambda x, w, q, conv, c: (x[:, :6].contiguous(memory_format=torch.channels_last), w[:, :6], q, conv, c),
    "NCHW": lambda x, w, q, conv, c: (x.contiguous(), w, q, conv, c),
    "narrowed": lambda x, w, q, conv, c: (x[:, :, 1:], w, q, conv, c),
    "bfloat16": lambda x, w, q, conv, c: (x.bfloat16(), w, q, conv, c),
    "bfloat16 weight": lambda x, w, q, conv, c: (x, w.bfloat16(), q, conv, c),
    "stride": lambda x, w, q, conv, c: (x, w, q, Convolution([2, 2], *list(vars(ONE).values())[1:]), c),
    "padding": lambda x, w, q, conv, c: (x, w, q, Convolution([1, 1], [1, 1, 1, 1], [1, 1], 1, 0.0), c),
    "no bits": lambda x, w, q, conv, c: (x, w, Quantizer(None, None, None, False, 0.0, "relu6"), conv, c),
    "tiny interval": lambda x, w, q, conv, c: (x, w, Quantizer(torch.tensor([-60.0]), q.c, 4, False, 0.0, "relu6"), conv, c),
    "NaN scale": lambda x, w, q, conv, c: (x, w, Quantizer(q.a, torch.tensor([float("nan")]), 4, False, 0.0, "relu6"), conv, c),
    "tiny scale": lambda x, w, q, conv, c: (x, duq.interval(c - 60, c) / duq.interval(c, c) * w, q, conv, c - 60),
    "no pixel": lambda x, w, q, conv, c: (x[:0], w, q, conv, c),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left_to_floats(case, rng):
    x, _, _ = data(rng, (2, 8, 7, 6))
    weight, c_w = quantized_weight(rng, 12, 8)
    x, weight, q, conv, c_w = LEFT[case](x, weight, quantizer(rng, 4, False, 0.0, "relu6"), ONE, c_w)
    if case != "no pixel":
        assert cpp.pointwise(x, None, q, weight, None, conv, (c_w, 4)) is None
    y = cpp.conv2d(x, None, q, weight, None, conv, codes=(c_w, 4))
    torch.testing.assert_close(y, reference.conv2d(x, None, q, weight, None, conv, cpp.quantized_input), equal_nan=True)


def test_other_instruction_sets_have_no_byte_products(rng):
    level = torch.ops.profit_cpu.isa()
    x, _, norm = data(rng, (2, 8, 7, 6))
    weight, c_w = quantized_weight(rng, 12, 8)
    try:
        torch.ops.profit_cpu.limit_isa(1)
        assert cpp.pointwise(x, norm, quantizer(rng, 4, *INPUTS[1]), weight, None, ONE, (c_w, 4)) is None
    finally:
        torch.ops.profit_cpu.limit_isa(level)


def test_shapes_that_do_not_fit(byte_products):
    x, raw = torch.zeros(2, 8, 3, 3).to(memory_format=torch.channels_last), torch.ones(1)
    y, weight = torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.zeros(4, 8, 1, 1)
    call = torch.ops.profit_cpu.block_pointwise
    side = (None, None, None, None, raw, raw, 4, True, 0.0, 0)
    assert call(y, x, *side, weight, None, raw, 4)
    other = [(y[:1], x, weight), (y, x, weight[:3]), (y.contiguous(), x, weight), (y, x[:, :, :2], weight)]
    for to, source, of in (*other, (y, x.double(), weight)):
        with pytest.raises(RuntimeError, match="block: "):
            call(to, source, *side, of, None, raw, 4)
    with pytest.raises(RuntimeError, match="must have 1 or 4 values"):
        call(y, x, *side, weight, None, torch.ones(3), 4)


def test_entries_use_it_and_have_the_gradients_of_the_reference(rng, byte_products, monkeypatch):
    """The public operators, whether they quantize the weight themselves or are told how it was; also compiled."""
    x, g, norm = data(rng, (3, 16, 6, 5))
    w, a_w, c_w = torch.randn(24, 16, 1, 1, generator=rng), torch.tensor([0.3]), torch.tensor([0.6])
    q = quantizer(rng, 4, False, -0.375, "hardswish")
    served = []
    inner = cpp.pointwise
    monkeypatch.setattr(cpp, "pointwise", lambda *args: served.append(inner(*args)) or served[-1])
    settings = {"act_bits": 4, "offset": -0.375, "activation": "hardswish"}
    upstream = torch.randn(3, 24, 6, 5, generator=rng)

    def run(backend, ready):
        leaves = [t.clone().requires_grad_() for t in (x, w, q.a, q.c, a_w, c_w)]
        with pk.use_backend(backend, ops=["block"]):
            xs, ws, *raws = leaves
            if ready:
                ws = pk.duq_fake_quantize(ws, raws[2], raws[3], bits=4, signed=True)
                y = pk.duq_conv2d(xs, ws, *raws[:2], None, None, weight_bits=None, weight_codes=(raws[3], 4), **settings)
            else:
                y = pk.duq_conv2d(xs, ws, *raws, weight_bits=4, **settings)
            return [y, *torch.autograd.grad(y, leaves, upstream)]

    want = run("reference", False)
    assert not served
    for ready in (False, True):
        for mine, theirs in zip(run("cpp", ready), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))
    assert len(served) == 2 and all(y is not None for y in served)

    quantized = pk.duq_fake_quantize(w, a_w, c_w, bits=4, signed=True)
    plain = {"weight_bits": None, "weight_codes": (c_w, 4), **settings}
    eager = pk.duq_conv2d(x, quantized, q.a, q.c, None, None, **plain)
    compiled = torch.compile(pk.duq_conv2d, fullgraph=True, backend="aot_eager")(x, quantized, q.a, q.c, None, None, **plain)
    assert torch.equal(eager, compiled)


def test_codes_that_are_none(rng):
    x, raw, w = torch.zeros(1, 4, 2, 2), torch.ones(1), torch.zeros(3, 4, 1, 1)
    sides = (x, w, raw, raw, raw, raw)
    settings = {"act_bits": 4, "weight_bits": None}
    with pytest.raises(TypeError, match="duq_conv2d: weight_codes must be the scale and the bits of a quantized weight, got 4"):
        pk.duq_conv2d(*sides, **settings, weight_codes=4)
    with pytest.raises(ValueError, match="weight_codes says that the weight is quantized, weight_bits=4 would do it again"):
        pk.duq_conv2d(*sides, act_bits=4, weight_bits=4, weight_codes=(raw, 4))
    with pytest.raises(ValueError, match="the bits of weight_codes must be an integer from 2 to 8, got 9"):
        pk.duq_conv2d(*sides, **settings, weight_codes=(raw, 9))
    with pytest.raises(ValueError, match="the scale of weight_codes must hold one value"):
        pk.duq_conv2d(*sides, **settings, weight_codes=(torch.ones(2), 4))
