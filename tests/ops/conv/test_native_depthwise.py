"""The C++ depthwise convolution against the reference: geometries, layouts, instruction sets, threads, NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import profit_kernels as pk
from profit_kernels import native
from profit_kernels.checks import pads
from profit_kernels.layer import NO_QUANTIZER, Convolution, Quantizer
from profit_kernels.ops.conv import cpp, reference
from profit_kernels.ops.duq import cpp as duq_cpp
from profit_kernels.ops.duq import reference as duq
from profit_kernels.ops.norm.reference import quantized_input
from profit_kernels.testing import assert_close_banded, clipping_band, edge_data, rounding_band
from tests import tolerances
from tests.ops.conv.against_reference import assert_within

pytestmark = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")

NAMES = ("y", "gx", "gw", "ga_x", "gc_x", "ga_w", "gc_w", "gb")
KINDS = {  # signed, offset, activation
    "unsigned": (False, 0.0, "none"),
    "relu": (False, 0.0, "relu"),
    "relu6": (False, 0.0, "relu6"),
    "hardswish": (False, -0.375, "hardswish"),
    "offset": (False, -0.375, "none"),
    "signed": (True, 0.0, "none"),
}
GEOMETRIES = [  # kernel, stride, padding, dilation
    ((3, 3), 1, 1, 1),
    ((3, 3), 2, 1, 1),
    ((5, 5), 1, 2, 1),
    ((5, 5), 2, (1, 2, 1, 2), 1),
    ((7, 7), 1, 3, 1),
    ((7, 7), 2, 3, 1),
    ((3, 3), 1, 2, 2),
    ((5, 5), 2, 4, (2, 1)),
    ((3, 3), (2, 1), (0, 1), (1, 2)),
    ((1, 1), 1, 0, 1),
    ((3, 5), (1, 2), (2, 1, 0, 3), 1),
    ((2, 4), 3, 2, 1),
    ((3, 3), 5, 1, 1),  # the stride is larger than the kernel: some input is never read
]


def settle(x: Tensor, a: Tensor, bits: int | None, kind: tuple[bool, float, str], rng: torch.Generator) -> Tensor:
    """x with the values drawn anew that lie at an edge, where two correct backends may differ by a whole code."""
    if bits is None:
        return x
    signed, offset, activation = kind
    settings = {"signed": signed, "offset": offset, "activation": activation}
    while True:
        edge = rounding_band(x, a, bits=bits, **settings) | clipping_band(x, a, **settings)
        # A whole clipped half of the data may sit exactly on the lower end (relu): no code depends on it there.
        edge &= duq.scaled(x, duq.interval(a, x), offset, activation) != (-1.0 if signed else 0.0)
        if not edge.any():
            return x
        x = torch.where(edge, torch.randn(x.shape, generator=rng).to(x.dtype), x)


def case(rng, shape, kernel, kind, act_bits=4, weight_bits=3, dtype=torch.float32, multiplier=1, per_channel=False):
    """x, weight, a_x, c_x, a_w, c_w, bias of one layer."""
    channels = shape[1] * multiplier
    n = channels if per_channel else 1
    a_x, c_x = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    a_w, c_w = torch.randn(n, generator=rng) - 1, torch.randn(n, generator=rng) - 1
    x = settle((torch.randn(shape, generator=rng) * 2).to(dtype), a_x, act_bits, kind, rng)
    w = settle(torch.randn(channels, 1, *kernel, generator=rng) * 0.4, a_w, weight_bits, (True, 0.0, "none"), rng)
    of_x = (None, None) if act_bits is None else (a_x, c_x)
    of_w = (None, None) if weight_bits is None else (a_w, c_w)
    return x, w, *of_x, *of_w, torch.randn(channels, generator=rng)


def settings(kind, stride=1, padding=0, dilation=1, act_bits=4, weight_bits=3, pad_value=None):
    two = lambda v: [v, v] if isinstance(v, int) else list(v)  # noqa: E731
    signed, offset, activation = kind
    pad_value = offset if pad_value is None else pad_value
    return two(stride), list(pads("test", padding)), two(dilation), act_bits, weight_bits, signed, offset, activation, pad_value


def values(tensors, given) -> tuple[Quantizer, Convolution, tuple]:
    """The quantizer of the input, the convolution, and (a, c, bits, ...) of the weight's quantizer."""
    x, _, a_x, c_x, a_w, c_w, _ = tensors
    stride, padding, dilation, act_bits, weight_bits, signed, offset, activation, pad_value = given
    conv = Convolution(stride, padding, dilation, x.shape[1], pad_value)
    return Quantizer(a_x, c_x, act_bits, signed, offset, activation), conv, (a_w, c_w, weight_bits, True, 0.0, "none")


def expected(grad, tensors, given) -> list[Tensor | None]:
    """What the reference gives, put together so that only the quantized input and weight are rounded to the dtype of x."""
    x, w, *_, bias = tensors
    q, conv, of_weight = values(tensors, given)
    qx = quantized_input(x, None, q).float()
    qw = (w if of_weight[2] is None else duq.forward(w, *of_weight)).to(x.dtype).float()
    b = None if bias is None else bias.to(x.dtype).float()
    y = reference.convolution(qx, qw, b, conv)
    gqx, gqw, gb = reference.convolution_backward(grad.float(), qx, qw, b, conv, (True, True, b is not None))
    ga_x = gc_x = ga_w = gc_w = None
    gx, gw = gqx * duq.activate_grad(x.float(), q.activation), gqw
    if q.bits is not None:
        gx, ga_x, gc_x = duq.backward(gqx, x.float(), *vars(q).values())
    if of_weight[2] is not None:
        gw, ga_w, gc_w = duq.backward(gqw, w, *of_weight)
    return [y, gx, gw, ga_x, gc_x, ga_w, gc_w, gb]


def term_sizes(grad, tensors, given) -> dict[str, Tensor]:
    """The sum of the magnitudes of the terms of each element of y and gx: at that size sums round, whatever cancels."""
    x, w, *_, bias = tensors
    q, conv, of_weight = values(tensors, given)
    qx = quantized_input(x, None, q).float()
    qx = (qx - q.offset).abs() + abs(q.offset)  # a value is rounded at the size of step * code and of the offset
    qw = (w if of_weight[2] is None else duq.forward(w, *of_weight)).float().abs()
    conv = replace(conv, pad_value=abs(conv.pad_value))
    y = reference.convolution(qx, qw, None if bias is None else bias.abs(), conv)
    gqx = reference.convolution_backward(grad.float().abs(), qx, qw, None, conv, (True, False, False))[0]
    if q.bits is None:
        return {"y": y, "gx": gqx * duq.activate_grad(x.float(), q.activation).abs()}
    slope = duq.backward(torch.ones_like(gqx), x.float(), *vars(q).values())[0]
    return {"y": y, "gx": gqx * slope.abs()}


def forward(tensors, given) -> Tensor:
    """y of the C++ kernels; the weight is quantized first."""
    x, w, *_, bias = tensors
    q, conv, of_weight = values(tensors, given)
    qw = w if of_weight[2] is None else duq_cpp.forward(w, *of_weight)
    return cpp.conv2d(x, None, q, qw, bias, conv, depthwise=True)


def run(grad, tensors, given) -> list[Tensor | None]:
    """y and the gradients of x, weight, a_x, c_x, a_w, c_w, bias."""
    x, w, *_, bias = tensors
    q, conv, of_weight = values(tensors, given)
    qw = w if of_weight[2] is None else duq_cpp.forward(w, *of_weight)
    need = (True, True, True)
    gx, _, _, ga_x, gc_x, gw, gb = cpp.conv2d_backward(grad, x, None, q, qw, bias, conv, need, depthwise=True)
    ga_w = gc_w = None
    if of_weight[2] is not None:
        gw, ga_w, gc_w = duq_cpp.backward(gw, w, *of_weight)
    return [forward(tensors, given), gx, gw, ga_x, gc_x, ga_w, gc_w, gb]


def output_shape(tensors, given) -> tuple[int, ...]:
    x, w, *_ = tensors
    return x.shape[0], w.shape[0], *values(tensors, given)[1].output_size("test", x, w)


def compare(grad, tensors, given) -> None:
    """Forward and backward of the C++ kernels against `expected`."""
    x, w = tensors[:2]
    wanted = expected(grad, tensors, given)
    got = run(grad, tensors, given)
    taps = w.shape[2] * w.shape[3]
    # Sums of the magnitudes of the terms: of one weight's gradient, and of an interval's.
    per_channel = float(grad.float().abs().sum((0, 2, 3)).max()) * (8 + abs(given[-1])) if grad.numel() else 0.0
    magnitudes = {"gw": per_channel, "gb": per_channel}
    magnitudes |= dict.fromkeys(("ga_x", "gc_x", "ga_w", "gc_w"), per_channel * taps * w.shape[0])
    elements = term_sizes(grad, tensors, given)
    half = tolerances.CONV_HALF.get(x.dtype, {"rtol": 0.0, "atol": 0.0})
    for name, mine, theirs in zip(NAMES, got, wanted, strict=True):
        if theirs is None:
            assert mine is None, name
            continue
        assert mine.shape == theirs.shape, name
        assert mine.dtype == (x.dtype if name in ("y", "gx") else torch.float32), name
        if name in magnitudes:
            allowed = 1e-5 * theirs.abs() + tolerances.MAP_SUM_OF_MAGNITUDE * magnitudes[name]
        else:
            rounding = half["rtol"] * theirs.abs() + half["atol"]
            allowed = rounding + tolerances.CONV_OF_MAGNITUDE * elements[name]
        assert_within(name, mine.float(), theirs, allowed.nan_to_num(0.0))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), GEOMETRIES)
def test_geometries(rng, poisoned_empty, isa, kernel, stride, padding, dilation, channels_last):
    for kind, shape in (("hardswish", (2, 20, 9, 13)), ("signed", (1, 70, 12, 6)), ("relu6", (3, 32, 7, 21))):
        tensors = case(rng, shape, kernel, KINDS[kind], per_channel=kind == "signed")
        if channels_last:
            tensors = (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
        given = settings(KINDS[kind], stride, padding, dilation)
        grad = torch.randn(output_shape(tensors, given), generator=rng)
        compare(grad, tensors, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("act_bits", "weight_bits"), [(4, 4), (2, 8), (8, None), (None, 3), (None, None)])
def test_kinds_and_sides_without_bits(rng, poisoned_empty, kind, act_bits, weight_bits):
    tensors = case(rng, (2, 24, 10, 11), (3, 3), KINDS[kind], act_bits, weight_bits)
    given = settings(KINDS[kind], 1, 1, 1, act_bits, weight_bits)
    grad = torch.randn(2, 24, 10, 11, generator=rng)
    compare(grad, tensors, given)
    compare(grad, (tensors[0].to(memory_format=torch.channels_last), *tensors[1:-1], None), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["hardswish", "relu6", "signed"])
def test_half_precision(rng, poisoned_empty, isa, kind, dtype):
    for kernel, channels_last in (((3, 3), True), ((5, 5), False)):
        tensors = case(rng, (2, 40, 8, 9), kernel, KINDS[kind], dtype=dtype)
        if channels_last:
            tensors = (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
        grad = torch.randn(2, 40, 8, 9, generator=rng).to(dtype)
        compare(grad, tensors, settings(KINDS[kind], 1, kernel[0] // 2))


@pytest.mark.parametrize("multiplier", [2, 3, 70])
def test_channel_multiplier(rng, poisoned_empty, multiplier):
    for channels_last in (False, True):
        tensors = case(rng, (2, 5, 6, 7), (3, 3), KINDS["hardswish"], multiplier=multiplier, per_channel=True)
        if channels_last:
            tensors = (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
        grad = torch.randn(2, 5 * multiplier, 3, 4, generator=rng)
        compare(grad, tensors, settings(KINDS["hardswish"], 2, 1))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 17, 1, 1), (1, 16, 1, 9), (1, 130, 2, 1), (5, 3, 40, 3), (70, 16, 4, 4)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_odd_shapes(rng, poisoned_empty, shape, kernel):
    for stride in (1, 2):
        for channels_last in (False, True):
            tensors = case(rng, shape, (kernel, kernel), KINDS["hardswish"])
            if channels_last:
                tensors = (tensors[0].to(memory_format=torch.channels_last), *tensors[1:])
            given = settings(KINDS["hardswish"], stride, kernel // 2)
            compare(torch.randn(output_shape(tensors, given), generator=rng), tensors, given)


def test_an_empty_batch(poisoned_empty):
    x, w, raw = torch.zeros(0, 4, 6, 6), torch.ones(4, 1, 3, 3), torch.ones(1)
    given = settings(KINDS["relu"], 1, 1)
    y, *grads = run(torch.zeros(0, 4, 6, 6), (x, w, raw, raw, raw, raw, torch.ones(4)), given)
    assert y.shape == (0, 4, 6, 6)
    assert grads[0].shape == x.shape
    assert not any(g.any() for g in grads[1:])


LAYOUTS = {
    "transposed": lambda t: t.transpose(2, 3),
    "every other row": lambda t: t[:, :, ::2],
    "narrowed": lambda t: t[1:, 1:, 1:, 1:],
    "channels last, narrowed": lambda t: t.to(memory_format=torch.channels_last)[:, 3:19],
    "expanded": lambda t: t[:, :, :1].expand(-1, -1, 5, -1),
    "flipped batch and rows": lambda t: t.permute(2, 1, 0, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(rng, poisoned_empty, layout):
    kind = KINDS["hardswish"]
    x, *rest = case(rng, (3, 32, 8, 6), (3, 3), kind)
    x = LAYOUTS[layout](x)
    tensors = (x, rest[0][: x.shape[1]], *rest[1:-1], rest[-1][: x.shape[1]])
    given = settings(kind, 1, 1)
    contiguous = torch.randn(x.shape, generator=rng)
    last = contiguous.to(memory_format=torch.channels_last)
    for grad in (contiguous, last, contiguous.transpose(2, 3).contiguous().transpose(2, 3), torch.ones(()).expand(x.shape)):
        compare(grad, tensors, given)
    weight_last = rest[0].to(memory_format=torch.channels_last)[: x.shape[1]]
    compare(contiguous, (x, weight_last, *tensors[2:]), given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act_bits", [4, None])
def test_nan_goes_where_the_reference_has_it(rng, isa, kind, act_bits):
    x, w, *rest = case(rng, (2, 24, 7, 9), (3, 3), KINDS[kind], act_bits)
    for channels_last in (False, True):
        x = x.clone(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        x[0, 3, 0, 0] = x[1, 17, 4, 5] = float("nan")  # in a corner, where not every tap meets it
        given = settings(KINDS[kind], 1, 1, act_bits=act_bits)
        compare(torch.randn(x.shape, generator=rng), (x, w, *rest), given)
    w[5, 0, 1, 2] = float("nan")
    compare(torch.randn(x.shape, generator=rng), (x, w, *rest), given)


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_clip(rng, isa, kind):
    x, *rest = case(rng, (1, 16, 5, 5), (3, 3), KINDS[kind])
    x[0, 3, 0, 0], x[0, 5, 2, 2] = float("inf"), -float("inf")
    compare(torch.randn(1, 16, 5, 5, generator=rng), (x, *rest), settings(KINDS[kind], 1, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["unsigned", "offset", "signed"])
def test_codes_of_data_at_the_edges(rng, record_band, isa, kind, bits):
    """A 1 x 1 kernel of weight 1 shows the quantized input itself."""
    signed, offset, activation = KINDS[kind]
    a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
    x = edge_data(16 * 24 * 50, a, bits=bits, signed=signed, offset=offset, generator=rng).view(1, 16, 24, 50)
    given = settings(KINDS[kind], act_bits=bits, weight_bits=None)
    y = forward((x, torch.ones(16, 1, 1, 1), a, c, None, None, None), given)
    report = assert_close_banded(
        y, duq.forward(x, a, c, bits, signed, offset, activation), x, a, c, bits=bits, signed=signed, offset=offset
    )
    record_band(f"cpp {isa}, fused, edges", report)
    assert report.differing_outside == 0


@pytest.mark.parametrize("kind", ["relu6", "hardswish"])
def test_codes_of_random_data(rng, record_band, isa, kind):
    signed, offset, activation = KINDS[kind]
    x = torch.randn(1, 16, 200, 100, generator=rng) * 3
    for bits in (2, 4, 8):
        a, c = torch.randn(1, generator=rng), torch.randn(1, generator=rng)
        given = settings(KINDS[kind], act_bits=bits, weight_bits=None)
        y = forward((x, torch.ones(16, 1, 1, 1), a, c, None, None, None), given)
        wanted = duq.forward(x, a, c, bits, signed, offset, activation)
        report = assert_close_banded(
            y, wanted, x, a, c, bits=bits, signed=signed, offset=offset, activation=activation, max_fraction_inside=0.01
        )
        record_band(f"cpp {isa}, fused, random", report)
        assert report.differing_outside == 0


@pytest.mark.parametrize("raw", [-80.0, -45.0, 1e19, 3e38])
def test_intervals_far_from_one(rng, isa, raw):
    """Where the division by way of 1 / A would overflow or lose bits, the kernels divide."""
    a = torch.tensor([raw])
    A = duq.interval(a, a)
    x = torch.rand(1, 16, 4, 4, generator=rng) * A.view(1, 1, 1, 1)
    given = settings(KINDS["unsigned"], act_bits=4, weight_bits=None)
    y = forward((x, torch.ones(16, 1, 1, 1), a, torch.ones(1), None, None, None), given)
    assert_close_banded(y, duq.forward(x, a, torch.ones(1), 4, False, 0.0, "none"), x, a, torch.ones(1), bits=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, 70, 9, 10), (1, 32, 70, 20)])
def test_the_number_of_threads_and_the_instruction_set_change_no_bit(rng, dtype, shape):
    tensors = case(rng, shape, (3, 3), KINDS["hardswish"], dtype=dtype)
    grad = torch.randn(shape, generator=rng).to(dtype)
    given = settings(KINDS["hardswish"], 1, 1)
    threads, level, results = torch.get_num_threads(), torch.ops.profit_cpu.isa(), []
    try:
        for count, limit in ((1, level), (2, level), (3, level), (1, 0), (2, 1)):
            torch.set_num_threads(count)
            torch.ops.profit_cpu.limit_isa(limit)
            results.append(run(grad, tensors, given))
    finally:
        torch.set_num_threads(threads)
        torch.ops.profit_cpu.limit_isa(level)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@pytest.mark.parametrize("pad_value", [0.0, -0.375, 2.5])
def test_the_plain_convolution(rng, poisoned_empty, pad_value):
    x, w = torch.randn(2, 20, 9, 8, generator=rng), torch.randn(40, 1, 5, 3, generator=rng)
    bias = torch.randn(40, generator=rng)
    results = []
    for backend in ("reference", "cpp"):
        with pk.use_backend(backend, ops=["depthwise"]):
            leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
            y = pk.depthwise_conv2d(*leaves, stride=2, padding=(1, 0, 2, 1), dilation=(1, 2), pad_value=pad_value)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for mine, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4, 6, 6, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"x": torch.zeros(4, 6, 6)}, "must be \\[N, C, H, W\\]"),
        ({"weight": torch.zeros(5, 1, 3, 3)}, "a multiple of the 4 channels"),
        ({"weight": torch.zeros(4, 1, 9, 9)}, "9 x 9 .* is larger than the padded input, 8 x 8"),
        ({"stride": [0, 1]}, "at least 1"),
        ({"padding": [1, 1]}, "left, right, top, bottom"),
        ({"padding": [1, 1, -1, 1]}, "negative, got -1"),
        ({"groups": 2}, "groups must be the 4 channels of x, got 2"),
        ({"bits": 9}, "act_bits must be 2 to 8, got 9"),
        ({"a": None}, "needs the interval a and the scale c"),
        ({"a": torch.zeros(4)}, "one interval and one scale"),
        ({"activation": 4}, "unknown activation 4"),
        ({"mean": torch.zeros(3)}, "one value for each of the 4 channels"),
        ({"mean": torch.zeros(4)}, "mean needs invstd"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    raw, norm = torch.zeros(1), dict.fromkeys(("mean", "invstd", "gamma", "beta"))
    call = {"x": torch.zeros(2, 4, 6, 6), **norm, "a": raw, "c": raw, "bits": 4, "is_signed": False, "offset": 0.0}
    call |= {"activation": 0, "weight": torch.zeros(4, 1, 3, 3), "bias": None, "stride": [1, 1], "padding": [1, 1, 1, 1]}
    call |= {"dilation": [1, 1], "groups": 4, "pad_value": 0.0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.profit_cpu.block_depthwise(**call)
    grad = torch.zeros_like(call["x"])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.profit_cpu.block_depthwise_backward(grad, **call, of_batch=False, need_weight=True)


def test_a_gradient_of_another_shape_is_refused():
    x, w, conv = torch.zeros(2, 4, 6, 6), torch.zeros(4, 1, 3, 3), Convolution([1, 1], [1, 1, 1, 1], [1, 1], 4, 0.0)
    for grad in (torch.zeros(2, 4, 6, 5), torch.zeros(2, 4, 6, 6).double()):
        with pytest.raises(RuntimeError, match="grad must have the shape of the output"):
            cpp.conv2d_backward(grad, x, None, NO_QUANTIZER, w, None, conv, (True, True, False), depthwise=True)
