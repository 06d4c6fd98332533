"""The C++ kernels of DuQ against the reference, at every instruction set this processor has."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from profit_kernels import native
from profit_kernels.ops.duq import cpp, reference
from profit_kernels.testing import assert_close_banded, edge_data
from tests.ops.duq.common import INPUTS, compare_with_reference

needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
compare = partial(compare_with_reference, "cpp", "cpu")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_random_data(rng, poisoned_empty, record_band, isa, dtype, signed, offset, activation):
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = (torch.randn(3, 5, 37, 43, generator=rng) * 2).to(dtype)
    grad = torch.randn(x.shape, generator=rng).to(dtype)
    for bits in (2, 3, 4, 5, 8):
        a, c = (torch.randn(1, generator=rng).to(parameters) for _ in range(2))
        report = record_band(f"cpp {isa}, random", compare(x, a, c, grad, bits, signed, offset, activation))
        if dtype == torch.float32:
            assert report.fraction_inside < 0.01


@needs_library
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("signed", "offset"), [(False, 0.0), (False, -0.375), (True, 0.0)])
def test_data_at_the_edges(rng, poisoned_empty, record_band, isa, bits, signed, offset):
    a, c = (torch.randn(1, generator=rng) for _ in range(2))
    x = edge_data(20000, a, bits=bits, signed=signed, offset=offset, generator=rng)
    report = compare(x, a, c, torch.ones(20000), bits, signed, offset, "none")
    record_band(f"cpp {isa}, edges", report)
    assert report.inside > 500


@needs_library
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_nan_and_infinities(isa, signed, offset, activation):
    # 37 copies: vector lanes and the scalar remainder both see every value.
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.3, -0.0]).repeat(37)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raw = torch.zeros(1, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        compare(x.to(dtype), raw, raw, torch.ones_like(x, dtype=dtype), 4, signed, offset, activation)


@needs_library
def test_nan_in_a_parameter_reaches_the_output():
    y = cpp.forward(torch.ones(3), torch.tensor([float("nan")]), torch.zeros(1), 4, False, 0.0, "none")
    assert y.isnan().all()


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "every other row": lambda t: t[:, :, ::2],
    "narrowed": lambda t: t[1:, 1:],
    "expanded": lambda t: t[:, :1].expand(-1, 7, -1, -1),
    "flipped and cut": lambda t: t.flip(2)[..., 1:],
}


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_layouts(rng, poisoned_empty, layout, per_channel):
    x = LAYOUTS[layout](torch.randn(6, 5, 4, 3, generator=rng))
    n = x.shape[0] if per_channel else 1
    a, c = torch.randn(n, generator=rng), torch.randn(n, generator=rng)
    contiguous = torch.randn(x.shape, generator=rng)
    for grad in (contiguous, contiguous.transpose(1, 2).contiguous().transpose(1, 2), torch.ones(()).expand(x.shape)):
        compare(x, a, c, grad, 4, True, 0.0, "none")


@needs_library
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3, 3), (1, 1, 1, 1), (16384,), (16385,), (3, 32769), (70001,)])
def test_odd_and_empty_shapes(rng, poisoned_empty, shape):
    x, grad = torch.randn(shape, generator=rng), torch.randn(shape, generator=rng)
    compare(x, torch.zeros(1), torch.zeros(1), grad, 4, False, 0.0, "relu")
    if len(shape) == 2:
        a = torch.randn(shape[0], generator=rng)
        compare(x, a, a, grad, 4, True, 0.0, "none")


@needs_library
@pytest.mark.parametrize("shape", [(0, 2, 1), (1, 2, 3), (2, 1, 3), (3, 0, 2), (1, 1, 4)])
def test_strides_are_those_of_empty_like(rng, shape):
    """Also of dimensions of size 0 and 1, as the fake kernel promises them."""
    raw = torch.zeros(1)
    for order in itertools.permutations(range(3)):
        x = torch.randn(shape, generator=rng).permute(order)
        y = cpp.forward(x, raw, raw, 4, True, 0.0, "none")
        gx, _, _ = cpp.backward(torch.ones_like(x), x, raw, raw, 4, True, 0.0, "none")
        assert y.stride() == gx.stride() == torch.empty_like(x).stride()
        assert_close_banded(y, reference.forward(x, raw, raw, 4, True, 0.0, "none"), x, raw, raw, bits=4, signed=True)


@needs_library
def test_one_interval_with_a_scale_per_channel(rng):
    w, grad = torch.randn(6, 3, 5, 5, generator=rng), torch.randn(6, 3, 5, 5, generator=rng)
    one, six = torch.zeros(1), torch.randn(6, generator=rng)
    compare(w, one, six, grad, 4, True, 0.0, "none")
    compare(w, six, one, grad, 4, True, 0.0, "none")


@needs_library
def test_parameters_in_the_dtype_of_a_half_precision_model(rng):
    """model.to(torch.bfloat16) moves a and c too."""
    x, grad = (torch.randn(4, 33, generator=rng).bfloat16() for _ in range(2))
    a, c = torch.zeros(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.bfloat16)
    quantizer = (x, a, c, 4, True, 0.0, "none")
    assert torch.equal(cpp.forward(*quantizer), reference.forward(*quantizer))
    for mine, theirs in zip(cpp.backward(grad, *quantizer), reference.backward(grad, *quantizer), strict=True):
        assert mine.dtype == torch.bfloat16 and mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs)


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(2, 9), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    bits=st.integers(2, 8),
    kind=st.sampled_from(INPUTS),
    order=st.randoms(use_true_random=False),
    per_channel=st.booleans(),
    raw=st.floats(-6, 25),
    seed=st.integers(0, 2**31),
)
def test_any_shape_stride_dtype_and_width(shape, dtype, bits, kind, order, per_channel, raw, seed):
    generator = torch.Generator().manual_seed(seed)
    dims = list(range(len(shape)))
    order.shuffle(dims)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype).permute(dims)
    grad = torch.randn(x.shape, generator=generator).to(dtype)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    channels = x.shape[0] if per_channel else 1
    a = (torch.randn(channels, generator=generator) + raw).to(parameters)
    c = torch.randn(channels, generator=generator).to(parameters)
    compare(x, a, c, grad, bits, *kind)


@needs_library
@pytest.mark.parametrize(("signed", "offset", "activation"), INPUTS)
def test_float64_in_more_channels_than_a_vector_has_lanes(rng, isa, signed, offset, activation):
    """Softplus of float64 differs in its last bits between torch's vector lanes and libm: the intervals must not."""
    for _ in range(20):
        x, grad = (torch.randn(67, 3, generator=rng).double() * 3 for _ in range(2))
        a, c = torch.randn(67, generator=rng).double(), torch.randn(67, generator=rng).double()
        compare(x, a, c, grad, 8, signed, offset, activation)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(rng, dtype):
    x, grad = (torch.randn(6, 70001, generator=rng).to(dtype) for _ in range(2))
    before, results = torch.get_num_threads(), []
    per_tensor, per_channel = torch.zeros(1), torch.randn(6, generator=rng)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(
                [
                    t
                    for raw in (per_tensor, per_channel)
                    for t in (
                        cpp.forward(x, raw, raw, 4, False, 0.0, "relu"),
                        *cpp.backward(grad, x, raw, raw, 4, False, 0.0, "relu"),
                    )
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


@needs_library
def test_interval_gradients_of_a_large_tensor_match_float64(rng):
    """The sums run in double: no drift over 3 million terms."""
    x, grad = torch.rand(3_000_000, generator=rng) * 2, torch.rand(3_000_000, generator=rng)
    a, c = torch.zeros(1), torch.ones(1)
    _, ga, gc = cpp.backward(grad, x, a, c, 8, False, 0.0, "none")
    _, da, dc = reference.backward(grad.double(), x.double(), a.double(), c.double(), 8, False, 0.0, "none")
    # A few float32 codes differ from the float64 ones, by one step each: far below one part in a million of the sum.
    torch.testing.assert_close(torch.cat([ga, gc]).double(), torch.cat([da, dc]), rtol=2e-6, atol=0)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"activation": 7}, "unknown activation 7"),
        ({"a": torch.zeros(2)}, "one per index of dimension 0"),
        ({"x": torch.zeros(3, dtype=torch.int32)}, "float32, bfloat16, float16 or float64"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    call = {"x": torch.zeros(3), "a": torch.zeros(1), "c": torch.zeros(1), "bits": 4, "is_signed": False, "offset": 0.0}
    call |= {"activation": 0} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.profit_cpu.duq_forward(**call)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.profit_cpu.duq_backward(torch.zeros_like(call["x"]), **call)


@needs_library
def test_a_gradient_of_another_shape_or_dtype_is_refused():
    x, raw = torch.zeros(3), torch.zeros(1)
    with pytest.raises(RuntimeError, match="shape of x"):
        cpp.backward(torch.zeros(1), x, raw, raw, 4, False, 0.0, "none")
    with pytest.raises(RuntimeError, match="dtype of x"):
        cpp.backward(torch.zeros(3).double(), x, raw, raw, 4, False, 0.0, "none")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """native.py looking for its library in an empty folder."""
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native.why_missing.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    native.why_missing.cache_clear()


def test_a_missing_library_says_why(empty_folder):
    assert not native.available()
    assert "never installed" in native.why_missing()
    native.why_missing.cache_clear()
    (empty_folder / "_build_info.json").write_text('{"built": false, "reason": "no C++ compiler"}')
    assert native.why_missing() == "the C++ kernels were not built: no C++ compiler"
    assert native.isa() is None
    with pytest.raises(RuntimeError, match="no C\\+\\+ compiler.*profit doctor"):
        native.load()


def test_a_broken_library_says_why(empty_folder):
    (empty_folder / "_cpu.abi3.so").write_bytes(b"not a library")
    assert "do not load under torch" in native.why_missing()
    assert "\n" not in native.why_missing()


def test_an_unknown_instruction_set_is_refused(empty_folder, monkeypatch):
    monkeypatch.setenv("PROFIT_CPU_ISA", "mmx")
    assert native.why_missing() == "PROFIT_CPU_ISA='mmx' is not one of baseline, avx2, avx512"
