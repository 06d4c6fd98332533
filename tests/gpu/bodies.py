"""What the GPU tests do, on any device: test_on_gpu.py runs it on CUDA, test_bodies.py a little of it on the CPU.

Each operator is an entry of OPERATORS: from a generator to (tensors, function of them, differentiable or not). The function is
the public entry with its settings; the same one computes the expectation, in float64 on the CPU by the reference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import profit_kernels as pk
from profit_kernels import dispatch
from tests import tolerances

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Sample:
    """`data` are in the dtype under test, `intervals` always in float32; `run(*data, *intervals)` gives tensors; `step`: how
    far one flipped code moves the output, None where the output is compared by its L2 distance alone."""

    data: list[Tensor]
    intervals: list[Tensor]
    run: Callable[..., Sequence[Tensor]]
    step: float | None = None
    differentiable: bool = True


def _normal(rng: torch.Generator, *shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=rng) * std


def _interval(rng: torch.Generator, numel: int = 1) -> Tensor:
    return torch.rand(numel, generator=rng) + 0.5


def _duq(rng, bits: int, signed: bool, offset: float, activation: str, shape=(2, 8, 9, 7)) -> Sample:
    settings = {"bits": bits, "signed": signed, "offset": offset, "activation": activation}
    a, c = _interval(rng), _interval(rng)
    step = torch.nn.functional.softplus(c).item() / (2 ** (bits - 1) - 1 if signed else 2**bits - 1)
    return Sample([_normal(rng, *shape, std=2.0)], [a, c], lambda x, a, c: [pk.duq_fake_quantize(x, a, c, **settings)], step)


def _weights(rng, bits: int, **_: object) -> Sample:
    shapes = [(8, 3, 3, 3), (16, 1, 3, 3), (24, 16, 1, 1), (10, 24)]
    n = len(shapes)
    raw = [_interval(rng, shape[0] if i == 1 else 1) for _ in range(2) for i, shape in enumerate(shapes)]
    return Sample(
        [_normal(rng, *shape, std=0.5) for shape in shapes], raw,
        lambda *t: pk.duq_fake_quantize_weights(t[:n], t[n : 2 * n], t[2 * n :], bits=bits),
    )  # fmt: skip


def _codes(rng, bits: int, signed: bool, offset: float, activation: str) -> Sample:
    settings = {"bits": bits, "signed": signed, "offset": offset, "activation": activation}
    run = lambda x, a: [pk.duq_codes(x, a, **settings)]  # noqa: E731
    return Sample([_normal(rng, 2, 8, 9, 7, std=2.0)], [_interval(rng)], run, 1.0, differentiable=False)


def _depthwise(rng, kernel: int, stride: int, dilation: int, padding, **_: object) -> Sample:
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "pad_value": -0.375}
    data = [_normal(rng, 2, 8, 15, 13), _normal(rng, 8, 1, kernel, kernel, std=0.3), _normal(rng, 8)]
    return Sample(data, [], lambda x, w, b: [pk.depthwise_conv2d(x, w, b, **settings)])


def _fused(rng, kernel: int, stride: int, dilation: int, padding, bits: int, signed, offset, activation) -> Sample:
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "act_bits": bits, "weight_bits": bits}
    settings |= {"signed": signed, "offset": offset, "activation": activation}
    data = [_normal(rng, 2, 8, 15, 13, std=2.0), _normal(rng, 8, 1, kernel, kernel, std=0.3)]
    run = lambda x, w, a, c, aw, cw: [pk.duq_depthwise_conv2d(x, w, a, c, aw, cw, **settings)]  # noqa: E731
    return Sample(data, [_interval(rng) for _ in range(4)], run)


def _kl(rng, **_: object) -> Sample:
    new = _normal(rng, 4, 8, 9, 7)
    old = new + _normal(rng, 4, 8, 9, 7, std=0.1)
    return Sample([new, old], [], lambda new, old: [pk.aiwq_kl(new, old)], differentiable=False)


def _conv_kl(rng, depthwise: bool, bits: int, signed, offset, activation, **_: object) -> Sample:
    groups, kernel = (8, 3) if depthwise else (1, 1)
    settings = {"padding": kernel // 2, "groups": groups, "pad_value": offset, "act_bits": bits}
    settings |= {"signed": signed, "offset": offset, "activation": activation}
    data = [_normal(rng, 4, 8, 9, 7, std=2.0), _normal(rng, 4, 8, 9, 7), _normal(rng, 8, 8 // groups, kernel, kernel, std=0.3)]
    run = lambda x, y, w, a, c: [pk.aiwq_conv2d(x, y, w, a_x=a, c_x=c, **settings)]  # noqa: E731
    return Sample(data, [_interval(rng) for _ in range(2)], run, differentiable=False)


HSWISH = {"signed": False, "offset": -0.375, "activation": "hardswish"}
RELU6 = {"signed": False, "offset": 0.0, "activation": "relu6"}
SIGNED = {"signed": True, "offset": 0.0, "activation": "none"}
KINDS = {"hardswish": HSWISH, "relu6": RELU6, "signed": SIGNED}
PLAIN = {"kernel": 3, "stride": 1, "dilation": 1, "padding": 1}
GEOMETRIES = {
    "k3": PLAIN,
    "k3s2": {**PLAIN, "stride": 2},
    "k5s2": {**PLAIN, "kernel": 5, "stride": 2, "padding": 2},
    "k7": {**PLAIN, "kernel": 7, "padding": 3},
    "dilated": {**PLAIN, "dilation": 2, "padding": 2},
    "same": {**PLAIN, "stride": 2, "padding": (0, 1, 0, 1)},
}
# name -> (operators of dispatch that it calls, sample of given bits, geometry and kind)
OPERATORS: dict[str, tuple[tuple[str, ...], Callable[..., Sample]]] = {
    "duq": (("duq",), lambda rng, bits, geometry, kind: _duq(rng, bits, **kind)),
    "duq_weights": (("duq_weights", "duq"), lambda rng, bits, geometry, kind: _weights(rng, bits)),
    "duq_codes": (("duq_codes",), lambda rng, bits, geometry, kind: _codes(rng, bits, **kind)),
    "depthwise": (("depthwise",), lambda rng, bits, geometry, kind: _depthwise(rng, **geometry)),
    "duq_depthwise": (
        ("duq_depthwise", "depthwise", "duq"),
        lambda rng, bits, geometry, kind: _fused(rng, **geometry, bits=bits, **kind),
    ),
    "aiwq_kl": (("aiwq",), lambda rng, bits, geometry, kind: _kl(rng)),
    "aiwq_conv_depthwise": (("aiwq_conv",), lambda rng, bits, geometry, kind: _conv_kl(rng, True, bits, **kind)),
    "aiwq_conv_pointwise": (("aiwq_conv",), lambda rng, bits, geometry, kind: _conv_kl(rng, False, bits, **kind)),
}


def why_not(name: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot serve the operator itself (its first operator of dispatch) here; None if it can."""
    return None if backend == "auto" else dispatch.why_not(OPERATORS[name][0][0], backend, device, dtype)


def backend_context(name: str, backend: str, device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """The backend for those of the operators that have a kernel; `auto` for all."""
    ops = [op for op in OPERATORS[name][0] if backend == "auto" or dispatch.why_not(op, backend, device, dtype) is None]
    return pk.use_backend(backend, ops)


def place(sample: Sample, device: str, dtype: torch.dtype, layout: str, wide: bool = False) -> list[Tensor]:
    """The sample's tensors as leaves on a device; `wide`: rounded to dtype, then everything in float64."""
    exact = torch.float64 if wide else torch.float32
    data = [t.to(dtype).to(exact if wide else dtype) for t in sample.data]
    data = [t.to(memory_format=LAYOUTS[layout]) if t.dim() == 4 else t for t in data]
    return [t.to(device).requires_grad_(sample.differentiable) for t in (*data, *(i.to(exact) for i in sample.intervals))]


def evaluate(sample: Sample, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(outputs, gradients of the leaves) for upstream gradients that depend on the place alone."""
    outputs = sample.run(*leaves)
    if not sample.differentiable:
        return list(outputs), []
    grads = [torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y) for y in outputs]
    return [y.detach() for y in outputs], list(torch.autograd.grad(outputs, leaves, grads))


def assert_near(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, step: float | None) -> None:
    """Close in L2, and where `step` is given no value further than one code (and the rounding of the output) away."""
    assert got.shape == want.shape and not got.isnan().any(), name
    got, want = got.cpu().double(), want.cpu().double()
    apart, size = (got - want).norm(), want.norm().clamp(min=1e-30)
    assert apart <= tolerances.DEVICE_L2[dtype] * size, f"{name}: {float(apart / size):.2g} apart in L2"
    if step is not None:
        slack = step + torch.finfo(dtype).eps * want.abs().max() if dtype.is_floating_point else step
        assert (got - want).abs().max() <= slack, f"{name}: more than one code apart"


def compare(name: str, backend: str, device: str, dtype: torch.dtype, layout: str, rng, bits: int, geometry, kind) -> None:
    """An operator against the reference on the same device and against the reference in float64 on the CPU."""
    sample = OPERATORS[name][1](rng, bits, geometry, kind)
    with backend_context(name, backend, device, dtype):
        out, grads = evaluate(sample, place(sample, device, dtype, layout))
    with pk.use_backend("reference"):
        references = [evaluate(sample, place(sample, device, dtype, layout))]
        references.append(evaluate(sample, place(sample, "cpu", dtype, layout, wide=True)))
    for want_out, want_grads in references:
        for got, want in zip(out, want_out, strict=True):
            assert_near(f"{name} output", got, want, dtype, sample.step)
        for i, (got, want) in enumerate(zip(grads, want_grads, strict=True)):
            if i < len(sample.data):
                assert_near(f"{name} gradient {i}", got, want, dtype, None)
            else:  # a sum of terms of mixed sign, one flipped code each
                slack = tolerances.DEVICE_INTERVAL[dtype] * sum(y.numel() for y in out) ** 0.5
                assert (got.cpu().double() - want.cpu().double()).abs().max() <= slack, f"{name} interval gradient {i}"


def twice_the_same(name: str, backend: str, device: str, rng) -> None:
    """Two runs give the same bits."""
    sample = OPERATORS[name][1](rng, 4, PLAIN, HSWISH)
    with backend_context(name, backend, device, torch.float32):
        first, second = (evaluate(sample, place(sample, device, torch.float32, "channels_last")) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True))


def compiled_in_one_graph(name: str, backend: str, device: str, rng, compiler: str) -> None:
    """torch.compile(fullgraph=True) gives what eager mode gives."""
    sample = OPERATORS[name][1](rng, 4, PLAIN, HSWISH)
    torch.compiler.reset()
    with backend_context(name, backend, device, torch.float32):
        eager = evaluate(sample, place(sample, device, torch.float32, "channels_last"))
        function = torch.compile(sample.run, fullgraph=True, backend=compiler)
        compiled = evaluate(Sample(sample.data, sample.intervals, function, sample.step, sample.differentiable),
                            place(sample, device, torch.float32, "channels_last"))  # fmt: skip
    for got, want in zip((*compiled[0], *compiled[1]), (*eager[0], *eager[1]), strict=True):
        torch.testing.assert_close(got, want, **tolerances.COMPILED)


def under_autocast(name: str, backend: str, device: str, rng) -> None:
    """Under autocast it runs, and the gradients come in the dtypes of the leaves."""
    sample = OPERATORS[name][1](rng, 4, PLAIN, HSWISH)
    leaves = place(sample, device, torch.float32, "channels_last")
    with backend_context(name, backend, device, torch.bfloat16), torch.autocast(device, torch.bfloat16):
        out = sample.run(*leaves)
    assert all(bool(y.isfinite().all()) for y in out)
    if sample.differentiable:
        grads = torch.autograd.grad(out, leaves, [torch.ones_like(y) for y in out])
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in leaves]


def training_step(device: str, backend: str, dtype: torch.dtype, rng) -> None:
    """Loss and gradients of a small quantized net against the reference on the CPU in float64."""
    from tests.profit.tiny_net import batch, tiny_net

    net = tiny_net(rng).double()
    images, labels = batch(rng, 32)
    results = []
    for where, name, kind in ((device, backend, dtype), ("cpu", "reference", torch.float64)):
        net = net.to(where, kind)
        net.zero_grad(set_to_none=True)
        ops = [op for op in dispatch.OPS if name == "auto" or dispatch.why_not(op, name, where, kind) is None]
        with pk.use_backend(name, ops):
            loss = torch.nn.functional.cross_entropy(net(images.to(where, kind)), labels.to(where))
            loss.backward()
        results.append([loss.detach().cpu().double(), *(p.grad.cpu().double() for p in net.parameters() if p.grad is not None)])
    for got, want in zip(*results, strict=True):
        slack = tolerances.DEVICE_STEP * want.norm().clamp(min=1e-3)
        assert (got - want).norm() <= slack
