"""Every public operator on the GPU, against the reference there and in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

import profit_kernels as pk
from tests.gpu import bodies
from tests.gpu.bodies import GEOMETRIES, HSWISH, KINDS, OPERATORS, PLAIN

pytestmark = pytest.mark.gpu
BACKENDS = ("auto", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_GEOMETRY = ("depthwise", "duq_depthwise")


def needs(name: str, backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = bodies.why_not(name, backend, "cuda", dtype)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("layout", bodies.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_against_the_reference(rng, poisoned_empty, name, backend, kind, dtype, layout):
    needs(name, backend, dtype)
    bodies.compare(name, backend, "cuda", dtype, layout, rng, 4, PLAIN, KINDS[kind])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", [name for name in OPERATORS if "duq" in name or "conv" in name])
def test_every_bit_width(rng, name, bits):
    bodies.compare(name, "auto", "cuda", torch.float32, "channels_last", rng, bits, PLAIN, HSWISH)


@pytest.mark.parametrize("layout", bodies.LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BY_GEOMETRY)
def test_every_geometry(rng, poisoned_empty, name, backend, geometry, dtype, layout):
    needs(name, backend, dtype)
    bodies.compare(name, backend, "cuda", dtype, layout, rng, 4, GEOMETRIES[geometry], HSWISH)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_deterministic(rng, name, backend):
    needs(name, backend)
    bodies.twice_the_same(name, backend, "cuda", rng)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "duq_codes"])
def test_one_graph(rng, name, backend):
    needs(name, backend)
    bodies.compiled_in_one_graph(name, backend, "cuda", rng, "aot_eager")


def test_one_graph_by_inductor(rng):
    bodies.compiled_in_one_graph("duq_depthwise", "auto", "cuda", rng, "inductor")


@pytest.mark.parametrize("name", OPERATORS)
def test_autocast(rng, name):
    bodies.under_autocast(name, "auto", "cuda", rng)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_step(rng, backend):
    bodies.training_step("cuda", backend, torch.float32, rng)


def leaves_and_eager(name, rng):
    sample = OPERATORS[name][1](rng, 4, PLAIN, HSWISH)
    leaves = bodies.place(sample, "cuda", torch.float32, "channels_last")
    return sample, leaves, bodies.evaluate(sample, leaves)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "duq_codes"])  # which looks for a NaN on the host
def test_cuda_graph(rng, name):
    sample, leaves, eager = leaves_and_eager(name, rng)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            bodies.evaluate(sample, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        kept = [leaf.detach().clone() for leaf in leaves]
        for leaf in leaves:
            leaf.mul_(0.5)
    with torch.cuda.graph(graph):
        found = bodies.evaluate(sample, leaves)
    with torch.no_grad():  # replayed on other data than it was captured with
        for leaf, value in zip(leaves, kept, strict=True):
            leaf.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip((*found[0], *found[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_another_stream(rng, name):
    sample, leaves, eager = leaves_and_eager(name, rng)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = bodies.evaluate(sample, leaves)
    side.synchronize()
    for got, want in zip((*found[0], *found[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", OPERATORS)
def test_the_other_gpu(rng, name):
    sample, _, eager = leaves_and_eager(name, rng)
    with torch.cuda.device(0):
        found = bodies.evaluate(sample, bodies.place(sample, "cuda:1", torch.float32, "channels_last"))
    for got, want in zip((*found[0], *found[1]), (*eager[0], *eager[1]), strict=True):
        assert got.device.index == 1
        torch.testing.assert_close(got.cpu(), want.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    n = (1 << 31) + 4099
    needed = 5 * 2 * n
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory")
    pattern = torch.linspace(-4, 4, 4096, device="cuda", dtype=torch.bfloat16)
    x = pattern.repeat(n // 4096 + 1)[:n].requires_grad_()
    a, c = (torch.ones(1, device="cuda", requires_grad=True) for _ in range(2))
    with pk.use_backend(backend, ["duq"]):
        y = pk.duq_fake_quantize(x, a, c, bits=4, **HSWISH)
        (gx,) = torch.autograd.grad(y, x, torch.ones((), device="cuda", dtype=x.dtype).expand(n))
    with pk.use_backend("reference"):
        small = pattern.clone().requires_grad_()
        want = pk.duq_fake_quantize(small, a, c, bits=4, **HSWISH)
        (want_gx,) = torch.autograd.grad(want.sum(), small)
    for got, expected in ((y, want), (gx, want_gx)):
        for start in (0, (1 << 31) - 4096, 1 << 31):  # the first, the last below 2^31, the first above
            torch.testing.assert_close(got[start : start + 4096], expected, rtol=0, atol=0)
        torch.testing.assert_close(got[-3:], expected[:3], rtol=0, atol=0)


def test_an_empty_batch():
    x = torch.empty(0, 8, 5, 5, device="cuda", requires_grad=True)
    w = torch.randn(8, 1, 3, 3, device="cuda", requires_grad=True)
    raw = [torch.zeros(1, device="cuda") for _ in range(4)]
    y = pk.duq_depthwise_conv2d(x, w, *raw, padding=1, act_bits=4, weight_bits=4)
    gx, gw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == (0, 8, 5, 5) and gx.shape == x.shape and not gw.any()
