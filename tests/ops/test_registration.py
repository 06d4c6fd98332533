"""What every operator owes torch: schema, fake, autograd, one graph under torch.compile, a clear word on double backward."""

from __future__ import annotations

import pytest
import torch

import profit_kernels as pk
from profit_kernels import dispatch

OPS = torch.ops.profit_kernels
BACKENDS = ["reference", "cpp", "triton"]


def needs(backend: str, op: str = "duq") -> None:
    """Skip the test, with the reason, where `backend` has no kernel of `op` for float32 on the CPU."""
    reason = dispatch.why_not(op, backend, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def samples(requires_grad: bool = True, kind: str = "block") -> dict[str, tuple]:
    """Arguments of every registered operator; `kind` of call of the convolution: only a block has a norm."""
    x = torch.randn(2, 4, 7, 6, requires_grad=requires_grad)
    w = torch.randn(4, 1, 3, 3, requires_grad=requires_grad)
    a, c, a_w, c_w = (torch.rand(1).requires_grad_(requires_grad) for _ in range(4))
    bias = torch.randn(4, requires_grad=requires_grad)
    g = torch.randn(2, 4, 7, 6)
    quant = (4, False, -0.375, "hardswish")
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    norm = (torch.randn(4), torch.rand(4) + 0.5, *(torch.rand(4).requires_grad_(requires_grad) for _ in range(2)))
    layer = (*(norm if kind == "block" else [None] * 4), a, c, w, bias)
    numbers = (kind == "block", *quant, *geometry, 4, -0.375)
    of_aiwq = tuple(t.detach() for t in (*norm, a, c, w, bias))
    return {
        "duq": (x, a, c, *quant),
        "duq_backward": (g, x, a, c, *quant),
        "duq_codes": (x.detach(), a.detach(), *quant),
        "duq_weights": ([x, w], [a, a_w], [c, c_w], [4, 2]),
        "duq_weights_backward": ([g, w.detach()], [x, w], [a, a_w], [c, c_w], [4, 2]),
        "batch_norm_act": (x, *norm, True, "hardswish"),
        "batch_norm_act_backward": (g, x, *norm, True, "hardswish"),
        "batch_norm_moments": (x.detach(), 1e-5),
        "conv2d": (x, *layer, None, *numbers, kind, None),
        "conv2d_backward": (g, x, *layer, None, *numbers, kind, None, True, True, True),
        "aiwq_kl": (x.detach(), g, 1e-12),
        "aiwq_conv2d": (x.detach(), g, *of_aiwq, None, *numbers, 1e-12),
        "aiwq_conv2d_moments": (x.detach(), g, *of_aiwq, *numbers),
    }  # fmt: skip


def test_every_registered_operator_has_a_sample():
    registered = {
        schema.name.removeprefix("profit_kernels::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("profit_kernels::")
    }
    assert registered == set(samples())


@pytest.mark.parametrize("name", samples())
def test_opcheck_reference(name):
    with pk.use_backend("reference"):
        torch.library.opcheck(getattr(OPS, name).default, samples(requires_grad=not name.endswith("_backward"))[name])


KERNELS = {
    "duq": ("duq", "duq_backward"),
    "block": ("conv2d", "conv2d_backward", "batch_norm_moments", "batch_norm_act", "batch_norm_act_backward"),
    "duq_depthwise": ("conv2d", "conv2d_backward"),
    "aiwq": ("aiwq_kl",),
    "aiwq_conv": ("aiwq_conv2d",),
}


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("op", KERNELS)
def test_opcheck_kernels(op, backend):
    needs(backend, op)
    # What depends on the kernel (the interpreter is slow); autograd is the same for all and checked with the reference.
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    with pk.use_backend(backend, ops=[op, "duq"]):
        for name in KERNELS[op]:
            arguments = samples(requires_grad=False, kind=op if "depthwise" in op else "block")[name]
            torch.library.opcheck(getattr(OPS, name).default, arguments, **checks)


def _net(x, w, a, c):
    """Each public entry once."""
    h = pk.duq_fake_quantize(x, a, c, bits=4, signed=True)
    h = pk.depthwise_conv2d(h, w, padding=1, pad_value=-0.375)
    h = pk.duq_depthwise_conv2d(
        h, w, a, c, a, c, stride=2, padding=1, act_bits=3, weight_bits=4, offset=-0.375, activation="hardswish"
    )
    (h2,) = pk.duq_fake_quantize_weights([h], [a], [c], bits=2)
    kl = pk.aiwq_conv2d(h, h2, w.detach(), padding=1, groups=4) + pk.aiwq_kl(h2, h)
    return h2, kl, pk.duq_codes(x.detach(), a.detach(), bits=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_without_a_graph_break(backend, dtype):
    needs(backend)
    arguments = [torch.randn(2, 4, 8, 8).to(dtype), torch.randn(4, 1, 3, 3).to(dtype), torch.rand(1), torch.rand(1)]
    results = []
    torch.compiler.reset()
    with pk.use_backend(backend, ops=["duq", "aiwq", "aiwq_conv"]):
        for function in (_net, torch.compile(_net, fullgraph=True, backend="aot_eager")):
            leaves = [t.clone().requires_grad_() for t in arguments]
            out, kl, codes = function(*leaves)
            results.append((out, kl, codes, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_inductor(backend):
    needs(backend)
    torch.compiler.reset()
    x, a, c = torch.randn(2, 4, 8, 8), torch.rand(1), torch.rand(1)
    with pk.use_backend(backend, ops=["duq"]):
        function = lambda x, a, c: pk.duq_fake_quantize(x, a, c, bits=4, offset=-0.375, activation="hardswish")  # noqa: E731
        leaves = [t.requires_grad_() for t in (x, a, c)]
        compiled = torch.compile(function, fullgraph=True)(*leaves)
        expected = function(*leaves)
        torch.testing.assert_close(compiled, expected)
        for mine, theirs in zip(
            torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_backward_is_refused(backend):
    needs(backend)
    x, a, c = torch.rand(5, requires_grad=True), torch.ones(1), torch.ones(1)
    with pk.use_backend(backend, ops=["duq"]):
        (g,) = torch.autograd.grad(pk.duq_fake_quantize(x, a, c, bits=4).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="twice"):
            g.sum().backward()
