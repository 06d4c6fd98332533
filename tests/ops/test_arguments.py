"""What does not fit is refused in front of every backend: the same error, one line, with the operator's name."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import profit_kernels as pk
from profit_kernels import native
from tests import tolerances

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")

X, W, ONE = torch.ones(2, 4, 5, 5), torch.ones(4, 1, 3, 3), torch.ones(1)
DENSE = torch.ones(6, 4, 3, 3)
CHANNELS = torch.ones(4)
SIDES = {"a_x": ONE, "c_x": ONE, "a_w": ONE, "c_w": ONE, "act_bits": 4, "weight_bits": 4}
NORM = {"running_mean": CHANNELS, "running_var": CHANNELS, "training": True}
# Every public operator and arguments that it takes.
CALLS = {
    "duq_fake_quantize": {"x": X, "a": ONE, "c": ONE, "bits": 4},
    "duq_codes": {"x": X, "a": ONE, "bits": 4},
    "duq_fake_quantize_weights": {"weights": [W, DENSE], "a": [ONE, ONE], "c": [ONE, ONE], "bits": 4},
    "depthwise_conv2d": {"x": X, "weight": W, "bias": CHANNELS},
    "duq_depthwise_conv2d": {"x": X, "weight": W, "bias": CHANNELS} | SIDES,
    "duq_conv2d": {"x": X, "weight": DENSE, "bias": torch.ones(6)} | SIDES,
    "block_conv2d": {"x": X, "bn_weight": CHANNELS, "bn_bias": CHANNELS, "weight": DENSE, "bias": torch.ones(6)} | NORM | SIDES,
    "batch_norm_act": {"x": X, "weight": CHANNELS, "bias": CHANNELS} | NORM,
    "block_batch_norm": {"x": X, "bn_weight": CHANNELS, "bn_bias": CHANNELS} | NORM,
    "aiwq_kl": {"y_new": X, "y_old": X},
    "aiwq_conv2d": {
        "x": X, "y_new": torch.ones(2, 6, 3, 3), "weight_old": DENSE, "bias": torch.ones(6), "weight_new": DENSE, "a_x": ONE,
        "c_x": ONE, "act_bits": 4,
    },
    "aiwq_conv2d_moments": {
        "x": X, "y_new": torch.ones(2, 6, 3, 3), "weight_old": DENSE, "bias": torch.ones(6), "a_x": ONE, "c_x": ONE,
        "act_bits": 4,
    },
}  # fmt: skip
CONVOLUTIONS = [
    "depthwise_conv2d", "duq_depthwise_conv2d", "duq_conv2d", "block_conv2d", "aiwq_conv2d", "aiwq_conv2d_moments",
]  # fmt: skip
GROUPED = [op for op in CONVOLUTIONS if "depthwise" not in op]
NORMED = ["block_conv2d", "batch_norm_act", "block_batch_norm"]
TENSORS = [(op, name) for op, call in CALLS.items() for name, value in call.items() if isinstance(value, torch.Tensor)]


@pytest.fixture(autouse=True, params=["reference", pytest.param("auto", marks=needs_library)])
def backend(request):
    with pk.use_backend(request.param):
        yield request.param


def call(op: str, **change):
    arguments = CALLS[op] | change
    # Of these each call gets its own: training changes them in place.
    running = {n: v.clone() for n, v in arguments.items() if n.startswith("running") and isinstance(v, torch.Tensor)}
    return getattr(pk, op)(**(arguments | running))


def refuses(op: str, error: type[Exception], message: str, **change) -> None:
    with pytest.raises(error) as caught:
        call(op, **change)
    text = str(caught.value)
    assert type(caught.value) is error and text.startswith(f"{op}: ") and message in text and "\n" not in text, text


@pytest.mark.parametrize("op", CALLS)
def test_the_sample_is_served(op):
    call(op)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_devices_are_compared(op, name):
    if name in ("x", "y_new"):
        return  # what the others are compared with
    refuses(op, ValueError, "meta", **{name: CALLS[op][name].to("meta")})


@pytest.mark.parametrize(("op", "name"), TENSORS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_are_floats(op, name, dtype):
    refuses(op, TypeError, f"must be floating point (float32, bfloat16, float16 or float64), got {dtype}",
            **{name: CALLS[op][name].to(dtype)})  # fmt: skip


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_what_is_no_tensor(op, name):
    values = [1.0, [1.0], np.ones(1, np.float32)]
    for value in values:
        refuses(op, TypeError, f"must be a tensor, got {type(value).__name__}", **{name: value})


def test_lists_of_weights():
    op, foreign = "duq_fake_quantize_weights", torch.ones(1, device="meta")
    refuses(op, TypeError, "weights must be a list of tensors, got Tensor", weights=W)
    refuses(op, TypeError, "a must be a list of tensors, got float", a=1.0)
    for error, message, change in (
        (TypeError, "c must be a tensor, got float", {"c": [ONE, 1.0]}),
        (ValueError, "a is on meta", {"a": [ONE, foreign]}),
        (ValueError, "bits must be an integer from 2 to 8, got 4.5", {"bits": 4.5}),
    ):
        with pytest.raises(error, match=f"{op}: weight [01]: {message}"):
            call(op, **change)


@pytest.mark.parametrize(
    "op", ["duq_fake_quantize", "duq_codes", "duq_depthwise_conv2d", "duq_conv2d", "block_conv2d", *CONVOLUTIONS[-2:]]
)
@pytest.mark.parametrize("bits", [4, None])
def test_the_numbers_of_a_quantizer(op, bits):
    if bits is None and op in ("duq_fake_quantize", "duq_codes"):
        return
    width = {"act_bits": None} if bits is None else {}
    refuses(op, ValueError, "activation must be one of none, relu, relu6, hardswish, got 'banana'",
            activation="banana", **width)  # fmt: skip
    refuses(op, TypeError, "signed must be True or False, got 'no'", signed="no", **width)
    refuses(op, ValueError, "offset is the lower bound of the input, at most 0, got 1.0", offset=1.0, **width)
    for value, error in ((None, TypeError), ("x", TypeError), (math.nan, ValueError), (-math.inf, ValueError)):
        refuses(op, error, "offset must be", offset=value, **width)
    call(op, offset=np.float32(-0.375), activation="hardswish", **width)


def test_the_reference_knows_four_activations():
    from profit_kernels.ops.duq import reference

    with pytest.raises(ValueError, match="unknown activation 'banana'"):
        reference.activate(X, "banana")


@pytest.mark.parametrize("op", CONVOLUTIONS)
def test_geometry(op):
    weight = "weight_old" if op.startswith("aiwq") else "weight"
    for name in ("stride", "dilation"):
        for value in (1.5, "2", (1.5, 1.5), ("1", "1"), None, True, torch.ones(2)):
            refuses(op, TypeError, f"{name} must be an integer or a pair of integers >= 1", **{name: value})
        for value in (0, (1, 0), (1, 1, 1)):
            refuses(op, ValueError, f"{name} must be an integer or a pair of integers >= 1", **{name: value})
    for value, error in (("same", TypeError), (0.5, TypeError), (None, TypeError), (-1, ValueError), ((1,), ValueError)):
        refuses(op, error, "padding must be p, (ph, pw) or (left, right, top, bottom)", padding=value)
    refuses(op, TypeError, "pad_value must be a number, got 'zero'", pad_value="zero")
    big = torch.ones(*CALLS[op][weight].shape[:2], 7, 1)
    refuses(op, ValueError, "a kernel that spans 7 x 1 is larger than the padded input, 5 x 5", **{weight: big})
    refuses(op, ValueError, "a kernel that spans 7 x 7 is larger than the padded input, 5 x 5", dilation=3)
    for change in ({weight: big[:, :, :0]}, {"x": X[:, :, :0]}, {"x": X[..., :0]}):
        refuses(op, ValueError, "image and kernel must have a height and a width", **change)
    refuses(op, ValueError, "the input must be [N, C, H, W]", x=X[0])
    refuses(op, ValueError, "the input must be [N, C, H, W]", x=X[:, :0])
    refuses(op, ValueError, "the bias must have shape", bias=torch.ones(5))
    refuses(op, ValueError, "the weight must be [C_out, ", bias=None, **{weight: torch.ones(3)})


@pytest.mark.parametrize("op", GROUPED)
def test_groups(op):
    for value in (2.0, "1", None):
        refuses(op, TypeError, "groups must be an integer", groups=value)
    refuses(op, ValueError, "groups must be at least 1", groups=0)
    refuses(op, ValueError, "the weight must be [C_out, 4 / groups, kh, kw]", groups=2)


@pytest.mark.parametrize("op", CONVOLUTIONS[:4])
def test_integers_of_numpy(op):
    two = np.int64(2)
    groups = {"groups": np.int32(1)} if op in GROUPED else {}
    expected = call(op, stride=2, padding=(1, 2), dilation=(2, 2))
    torch.testing.assert_close(call(op, stride=two, padding=(np.int64(1), two), dilation=np.array([2, 2]), **groups), expected)


@pytest.mark.parametrize("op", NORMED)
def test_batch_norm(op):
    weight, bias = ("weight", "bias") if op == "batch_norm_act" else ("bn_weight", "bn_bias")
    if op != "block_conv2d":
        refuses(op, ValueError, "the input must be [N, C, H, W], got shape (4,)", x=torch.ones(4))
    refuses(op, ValueError, "BatchNorm's weight must have shape [4], got (5,)", **{weight: torch.ones(5)})
    refuses(op, ValueError, "running_mean and running_var go together", running_var=None)
    refuses(op, ValueError, "training=False needs", running_mean=None, running_var=None, training=False)
    refuses(op, TypeError, "training must be True or False, got 'yes'", training="yes")
    for value in (0.0, -1.0, math.nan, math.inf):
        refuses(op, ValueError, "eps must be", eps=value)
    refuses(op, TypeError, "eps must be a number", eps="x")
    if op != "block_batch_norm":
        refuses(op, TypeError, "momentum must be a number, got None", momentum=None)
    for dtype in (torch.float64, torch.bfloat16):
        refuses(op, TypeError, f"BatchNorm's bias is {dtype}", **{bias: CHANNELS.to(dtype)})
    refuses(op, ValueError, "more than one value per channel", x=X[:0])
    half = {name: CHANNELS.bfloat16() for name in (weight, bias, "running_mean", "running_var")}
    call(op, x=X.bfloat16())
    call(op, x=X.bfloat16(), **half)
    with torch.autocast("cpu", torch.bfloat16):
        call(op)



@pytest.mark.parametrize("op", ["aiwq_conv2d", "aiwq_conv2d_moments"])
def test_the_layer_of_aiwq(op):
    for shape in ((1, 6, 3, 3), (2, 5, 3, 3), (2, 6, 4, 3), (2, 6, 3, 2), (6, 3, 3)):
        refuses(op, ValueError, f"y_new must be this layer's output (2, 6, 3, 3), got {shape}", y_new=torch.ones(shape))
    refuses(op, ValueError, "needs a_x and c_x", c_x=None)
    refuses(op, ValueError, "one interval and one scale, got c_x with 2 values", c_x=torch.ones(2))


@pytest.mark.parametrize("op", ["aiwq_kl", "aiwq_conv2d"])
def test_eps_of_aiwq(op):
    for value, error in ((-1, ValueError), (math.nan, ValueError), (math.inf, ValueError), (None, TypeError)):
        refuses(op, error, "eps must be", eps=value)


@pytest.mark.parametrize("op", ["depthwise_conv2d", "duq_depthwise_conv2d", "duq_conv2d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_parameters_of_another_dtype_are_taken_to_that_of_the_input(op, dtype):
    parameters = {name: CALLS[op][name].to(dtype).requires_grad_() for name in ("weight", "bias")}
    y = call(op, **parameters)
    torch.testing.assert_close(y, call(op), **tolerances.GRID[torch.bfloat16])
    y.sum().backward()
    assert y.dtype == X.dtype and all(p.grad.dtype == dtype for p in parameters.values())


@pytest.mark.parametrize("op", CONVOLUTIONS[:4])
def test_meta_tensors(op):
    meta = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in CALLS[op].items()}
    with pk.use_backend("auto"):
        assert getattr(pk, op)(**meta).shape == call(op).shape


@pytest.mark.parametrize("shape", [(0, 3), (0, 2, 3, 3)])
def test_no_channels(shape):
    x, a, c = torch.empty(shape, requires_grad=True), torch.empty(0, requires_grad=True), torch.empty(0, requires_grad=True)
    y = pk.duq_fake_quantize(x, a, c, bits=4)
    y.sum().backward()
    assert y.shape == x.shape and a.grad.shape == c.grad.shape == (0,)
    assert pk.duq_codes(x, a, bits=4).shape == x.shape
    assert pk.duq_fake_quantize_weights([x], [a], [c], bits=4)[0].shape == x.shape


@pytest.mark.parametrize("raw", [-80.0, -104.0, -1000.0, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_interval_that_underflows(raw, dtype):
    leaves = [torch.tensor(v, dtype=dtype).requires_grad_() for v in ([-1.0, 0.0, 0.5, 2.0], [raw], [9.0])]
    y = pk.duq_fake_quantize(*leaves, bits=4)
    scale = torch.nn.functional.softplus(leaves[2].detach())
    torch.testing.assert_close(y.detach(), scale * torch.tensor([0, 0, 1, 1], dtype=dtype), **tolerances.GRID[dtype])
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves) and not leaves[0].grad.any()
    assert pk.duq_codes(leaves[0].detach(), leaves[1].detach(), bits=4).tolist() == [0, 0, 15, 15]


@needs_library
def test_errors_of_the_library_name_no_file():
    native.load()
    with pytest.raises(RuntimeError) as caught:
        torch.ops.profit_cpu.aiwq_moments(torch.zeros(3))
    assert str(caught.value) == "aiwq: outputs must be [N, C, H, W] on the CPU"
