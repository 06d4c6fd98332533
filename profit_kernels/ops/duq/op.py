"""Schema, registrations and public entry of DuQ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ... import dispatch
from ...checks import check_quantizer
from . import reference

_SETTINGS = "int bits, bool signed, float offset, str activation"

torch.library.define("profit_kernels::duq", f"(Tensor x, Tensor a, Tensor c, {_SETTINGS}) -> Tensor")
torch.library.define(
    "profit_kernels::duq_backward",
    f"(Tensor grad, Tensor x, Tensor a, Tensor c, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("profit_kernels::duq_codes", f"(Tensor x, Tensor a, {_SETTINGS}) -> Tensor")
torch.library.define(
    "profit_kernels::duq_weights", "(Tensor[] weights, Tensor[] a, Tensor[] c, int[] bits) -> Tensor[]"
)
# The gradients of all weights, then those of all a, then those of all c.
torch.library.define(
    "profit_kernels::duq_weights_backward",
    "(Tensor[] grads, Tensor[] weights, Tensor[] a, Tensor[] c, int[] bits) -> Tensor[]",
)


@torch.library.impl("profit_kernels::duq", "default")
def _duq(x, *rest):
    return dispatch.serving(__package__, "duq", x).forward(x, *rest)


@torch.library.impl("profit_kernels::duq_backward", "default")
def _duq_backward(grad, x, *rest):
    return dispatch.serving(__package__, "duq", x).backward(grad, x, *rest)


@torch.library.impl("profit_kernels::duq_codes", "default")
def _duq_codes(x, *rest):
    return dispatch.serving(__package__, "duq_codes", x).codes(x, *rest)


def _serving_weights(weights):
    return dispatch.serving(__package__, "duq_weights", weights[0], triton="weights_launch")


@torch.library.impl("profit_kernels::duq_weights", "default")
def _duq_weights(weights, *rest):
    return _serving_weights(weights).weights_forward(weights, *rest)


@torch.library.impl("profit_kernels::duq_weights_backward", "default")
def _duq_weights_backward(grads, weights, *rest):
    return _serving_weights(weights).weights_backward(grads, weights, *rest)


@torch.library.register_fake("profit_kernels::duq")
def _(x, a, c, bits, signed, offset, activation):
    return torch.empty_like(x)


@torch.library.register_fake("profit_kernels::duq_backward")
def _(grad, x, a, c, bits, signed, offset, activation):
    return torch.empty_like(x), torch.empty_like(a), torch.empty_like(c)


@torch.library.register_fake("profit_kernels::duq_codes")
def _(x, a, bits, signed, offset, activation):
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


@torch.library.register_fake("profit_kernels::duq_weights")
def _(weights, a, c, bits):
    return [torch.empty_like(w) for w in weights]


@torch.library.register_fake("profit_kernels::duq_weights_backward")
def _(grads, weights, a, c, bits):
    return [torch.empty_like(t) for t in (*weights, *a, *c)]


def _setup_context(ctx, inputs, output):
    x, a, c, *settings = inputs
    ctx.save_for_backward(x, a, c)
    ctx.settings = settings


def _autograd(ctx, grad):
    grads = torch.ops.profit_kernels.duq_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return *grads, None, None, None, None


def no_double_backward(name: str):
    """An autograd formula that says that `name` has none, instead of a gradient that is silently missing."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} cannot be differentiated twice: its gradient is straight-through, not a function to derive"
        )

    return refuse


def _setup_weights(ctx, inputs, output):
    weights, a, c, bits = inputs
    ctx.save_for_backward(*weights, *a, *c)
    ctx.bits = bits


def _autograd_weights(ctx, grads):
    n = len(ctx.bits)
    saved = ctx.saved_tensors
    weights, a, c = saved[:n], saved[n : 2 * n], saved[2 * n :]
    found = torch.ops.profit_kernels.duq_weights_backward(grads, weights, a, c, ctx.bits)
    return found[:n], found[n : 2 * n], found[2 * n :], None


def _register_autograd(name: str, public: str, formula, setup) -> None:
    torch.library.register_autograd(f"profit_kernels::{name}", formula, setup_context=setup)
    torch.library.register_autograd(f"profit_kernels::{name}_backward", no_double_backward(public))


_register_autograd("duq", "duq_fake_quantize", _autograd, _setup_context)
_register_autograd("duq_weights", "duq_fake_quantize_weights", _autograd_weights, _setup_weights)


def duq_fake_quantize(
    x: Tensor, a: Tensor, c: Tensor, *, bits: int, signed: bool = False, offset: float = 0.0, activation: str = "none"
) -> Tensor:
    """Quantize and dequantize `act(x)` with DuQ; differentiable in x, a and c.

    Args:
        x: any shape, float32, bfloat16, float16 (computed in float32) or float64. Non-contiguous and empty are fine.
        a, c: raw clipping interval and raw scale, A = softplus(a) and C = softplus(c); one value, or one per index of
            dimension 0 of x (weights: per output channel). float32, or float64 with float64 x.
        bits: 2 to 8.
        signed: codes from -(2^(bits-1) - 1) to 2^(bits-1) - 1, else 0 to 2^bits - 1.
        offset: the lower bound d <= 0 of the input, such as -0.375 for h-swish; unsigned only.
        activation: "none", "relu", "relu6" or "hardswish", applied to x first.

    Returns:
        C * q + d, with the shape, dtype and memory format of x. NaN stays NaN; infinities clip.

    Raises:
        ValueError, TypeError: an argument out of its range. BackendError: the backend asked for cannot serve the call.

    Source: PROFIT (Park & Yoo, ECCV 2020), section 4.1; the gradients are in docs/maths.md, section 1.
    Under autocast x is taken in the dtype it comes in, and a, c stay in float32.
    """
    check_quantizer("duq_fake_quantize", x, bits, signed, offset, activation, a=a, c=c)
    if dispatch.choose("duq", x) == "reference":  # plain PyTorch, so that torch.compile can fuse it
        return reference.duq(x, a, c, bits, signed, offset, activation)
    return torch.ops.profit_kernels.duq(x, a, c, bits, signed, offset, activation)


def duq_codes(
    x: Tensor, a: Tensor, *, bits: int, signed: bool = False, offset: float = 0.0, activation: str = "none"
) -> Tensor:
    """The integer codes round(u * s) of `duq_fake_quantize`, as int8 (signed) or uint8; not differentiable.

    Arguments as there. Raises ValueError if the input holds NaN, which has no code.
    """
    check_quantizer("duq_codes", x, bits, signed, offset, activation, a=a)
    return torch.ops.profit_kernels.duq_codes(x, a, bits, signed, offset, activation)


def duq_fake_quantize_weights(
    weights: Sequence[Tensor], a: Sequence[Tensor], c: Sequence[Tensor], *, bits: int | Sequence[int]
) -> list[Tensor]:
    """Signed DuQ of all weights of a net at once: one kernel launch for all of them where the backend has one.

    Args:
        weights: float tensors of any shapes, with the output channels in dimension 0; of any number of dtypes and devices.
        a, c: raw interval and scale of each weight, one value, or one per output channel.
        bits: one width from 2 to 8, or one per weight.

    Returns: the quantized weights, each like its weight (shape, dtype, memory format); differentiable in all tensors.
    Raises: as duq_fake_quantize, and ValueError where the lists differ in length.
    """
    op = "duq_fake_quantize_weights"
    for name, values in (("weights", weights), ("a", a), ("c", c)):
        if isinstance(values, Tensor) or not isinstance(values, Iterable):
            raise TypeError(f"{op}: {name} must be a list of tensors, got {type(values).__name__}")
    widths = list(bits) if isinstance(bits, (list, tuple)) else [bits] * len(weights)
    if not len(weights) == len(a) == len(c) == len(widths):
        raise ValueError(
            f"{op}: weights, a, c and bits must have one length, got {len(weights)}, {len(a)}, {len(c)} and {len(widths)}"
        )
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, w in enumerate(weights):
        check_quantizer(f"{op}: weight {i}", w, widths[i], True, 0.0, "none", a=a[i], c=c[i])
        groups.setdefault((w.device, w.dtype), []).append(i)
    result: list[Tensor] = list(weights)
    for members in groups.values():
        for i, q in zip(members, _quantize_group(*([s[i] for i in members] for s in (weights, a, c, widths))), strict=True):
            result[i] = q
    return result


def _quantize_group(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """Weights of one device and dtype."""
    if dispatch.choose("duq_weights", weights[0]) == "reference":
        # No kernel for lists here: one by one, each on the backend that serves it best.
        rows = zip(weights, a, c, bits, strict=True)
        return [duq_fake_quantize(w, a_i, c_i, bits=k, signed=True) for w, a_i, c_i, k in rows]
    return torch.ops.profit_kernels.duq_weights(weights, a, c, bits)
