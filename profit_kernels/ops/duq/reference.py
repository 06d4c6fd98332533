"""DuQ in plain PyTorch: the definition every kernel is tested against.

    A = softplus(a), C = softplus(c) (at least 2^-100), h = act(x)
    u = clip((h - d) / A, lo, 1)          lo = -1 if signed else 0
    q = round(u * s) / s                  half to even, s = 2^(bits-1) - 1 if signed else 2^bits - 1
    y = C * q + d

Gradients are straight-through in the rounding, and zero through the clip (PROFIT, section 4.1; docs/maths.md, section 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...layer import ACTIVATIONS, levels

SMALLEST = 2.0**-100  # of A and C: by an interval that underflows to 0 a quotient would be NaN
NO_CODE = "duq_codes: the input (or its interval) holds NaN, which has no integer code"


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def activate(x: Tensor, activation: str) -> Tensor:
    """h = act(x)."""
    if activation == "none":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation != "hardswish":
        raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    # Spelled out, in this order and with a true division, so that every backend computes the same bits
    # (F.hardswish multiplies by 1/6 on some devices). The clamp makes -inf give 0 where -inf * 0 would give NaN.
    return x.clamp(min=-3) * F.hardtanh(x + 3, 0.0, 6.0) / 6


def activate_grad(x: Tensor, activation: str) -> Tensor:
    """act'(x); at a kink, the same one-sided value as torch's own activation. 0 where x is NaN."""
    if activation == "none":
        return torch.ones_like(x)
    if activation == "relu":
        return (x > 0).to(x.dtype)
    if activation == "relu6":
        return ((x > 0) & (x < 6)).to(x.dtype)
    slope = (x.clamp(-3, 3) / 3 + 0.5).nan_to_num(0.0)
    return ((x > -3) & (x < 3)) * slope + (x >= 3)


def interval(raw: Tensor, x: Tensor) -> Tensor:
    """softplus(raw) in the compute dtype, shaped to broadcast over dimension 0 of x where there is one value per channel.

    At least SMALLEST. Through float64: softplus in float32 differs in its last bit from one vector lane to the next, and with
    it codes would.
    """
    value = F.softplus(raw.double()).clamp(min=SMALLEST).to(compute_dtype(x))
    return value.view([1] * x.dim()) if raw.numel() == 1 else value.view(-1, *[1] * (x.dim() - 1))


def scaled(x: Tensor, A: Tensor, offset: float, activation: str) -> Tensor:
    """(h - d) / A in the compute dtype, before clipping."""
    h = activate(x.to(compute_dtype(x)), activation)
    return (h - offset) / A


def _round_clipped(u: Tensor, bits: int, signed: bool) -> Tensor:
    return torch.round(u.clamp(-1.0 if signed else 0.0, 1.0) * levels(bits, signed))


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y, with the dtype and memory format of x."""
    A, C = interval(a, x), interval(c, x)
    q = _round_clipped(scaled(x, A, offset, activation), bits, signed) / levels(bits, signed)
    y = C * q + offset
    # Not y.to(x.dtype) in any case: where that does nothing, torch.compile of torch 2.11 returns zero gradients.
    return y if y.dtype == x.dtype else y.to(x.dtype)


def codes(x: Tensor, a: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """round(u * s) as int8 (signed) or uint8. A NaN has no code: raises ValueError."""
    code = _round_clipped(scaled(x, interval(a, x), offset, activation), bits, signed)
    refuse_nan(bool(torch.isnan(code).any()))
    return code.to(torch.int8 if signed else torch.uint8)


def refuse_nan(found: bool) -> None:
    """Raise the ValueError of a NaN among the inputs of `codes`."""
    if found:
        raise ValueError(NO_CODE)


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dx, dL/da, dL/dc) of the raw a and c.

    Where x is NaN, dL/dx is 0, and dL/da and dL/dc are NaN, so that the fault is seen.
    """
    A, C = interval(a, x), interval(c, x)
    g = grad.to(A.dtype)
    u = scaled(x, A, offset, activation)
    lo = -1.0 if signed else 0.0
    # A mask as a factor, as in the formulas; torch.where costs seven times as much on the CPU.
    inside = (u > lo) & (u < 1.0)
    q = _round_clipped(u, bits, signed) / levels(bits, signed)

    gh = g * (C / A) * inside
    gx = gh * activate_grad(x.to(A.dtype), activation)
    gA = -gh * u.clamp(lo, 1.0)  # clipped, so that an infinity outside adds 0 and not 0 * inf
    gC = g * q

    def reduce(per_element: Tensor, raw: Tensor) -> Tensor:
        other_dims = list(range(x.dim())) if raw.numel() == 1 else list(range(1, x.dim()))
        total = per_element.sum(other_dims) if other_dims else per_element
        return (total.view(raw.shape) * torch.sigmoid(raw.to(A.dtype))).to(raw.dtype)

    return gx.to(x.dtype), reduce(gA, a), reduce(gC, c)


def weights_forward(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """`forward` of each weight: signed, without offset or activation."""
    return [forward(w, *raw, k, True, 0.0, "none") for w, *raw, k in zip(weights, a, c, bits, strict=True)]


def weights_backward(
    grads: list[Tensor], weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]
) -> list[Tensor]:
    """`backward` of each weight: first all dL/dw, then all dL/da, then all dL/dc."""
    rows = [backward(g, w, *raw, k, True, 0.0, "none") for g, w, *raw, k in zip(grads, weights, a, c, bits, strict=True)]
    return [gradient for kind in zip(*rows, strict=True) for gradient in kind]


class DuQ(torch.autograd.Function):
    """Autograd over the two formulas; keeps x alone. torch.compile sees through it."""

    @staticmethod
    def forward(ctx, x, a, c, bits, signed, offset, activation):
        ctx.save_for_backward(x, a, c)
        ctx.settings = (bits, signed, offset, activation)
        return forward(x, a, c, bits, signed, offset, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def duq(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """Differentiable DuQ."""
    return DuQ.apply(x, a, c, bits, signed, offset, activation)
