"""Calls of the C++ kernels of DuQ (csrc/cpu/duq/duq.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...layer import ACTIVATIONS
from .reference import NO_CODE, interval


def _parameter(raw: Tensor, x: Tensor) -> Tensor:
    """What the kernels take for a or c: for a float64 x, A or C themselves.

    Two softplus of float64 differ by up to 3 ulp, from one vector lane to the next in torch alone; one of float32 is rounded
    from float64, to the same bits.
    """
    return interval(raw, x).flatten() if x.dtype == torch.float64 else raw


def _raw_grad(grad: Tensor, raw: Tensor, x: Tensor) -> Tensor:
    """dL/da or dL/dc from what the kernels return."""
    return (grad * torch.sigmoid(raw.double()).view_as(grad)).to(raw.dtype).view_as(raw) if x.dtype == torch.float64 else grad


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y like x; see reference.forward."""
    native.load()
    settings = (bits, signed, offset, ACTIVATIONS.index(activation))
    return torch.ops.profit_cpu.duq_forward(x, _parameter(a, x), _parameter(c, x), *settings)


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, ga, gc); see reference.backward."""
    native.load()
    settings = (bits, signed, offset, ACTIVATIONS.index(activation))
    gx, ga, gc = torch.ops.profit_cpu.duq_backward(grad, x, _parameter(a, x), _parameter(c, x), *settings)
    return gx, _raw_grad(ga, a, x), _raw_grad(gc, c, x)


def weights_forward(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """All weights in one parallel loop; see reference.weights_forward."""
    native.load()
    A, C = ([_parameter(*pair) for pair in zip(raw, weights, strict=True)] for raw in (a, c))
    return torch.ops.profit_cpu.duq_weights_forward(weights, A, C, bits)


def weights_backward(
    grads: list[Tensor], weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]
) -> list[Tensor]:
    """All dL/dw, then all dL/da, then all dL/dc; see reference.weights_backward."""
    native.load()
    A, C = ([_parameter(*pair) for pair in zip(raw, weights, strict=True)] for raw in (a, c))
    found, n = torch.ops.profit_cpu.duq_weights_backward(grads, weights, A, C, bits), len(weights)
    raw = zip(found[n:], [*a, *c], [*weights, *weights], strict=True)
    return [*found[:n], *(_raw_grad(*each) for each in raw)]


def codes(x: Tensor, a: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """int8 or uint8 codes; see reference.codes."""
    native.load()
    out = torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)
    in_place = out.stride() == x.stride() and (a.numel() == 1 or x.stride(0) * x.shape[0] == x.numel())
    dense = x if in_place else x.contiguous()
    found = out if in_place else torch.empty_like(dense, dtype=out.dtype)
    settings = (bits, signed, offset, ACTIVATIONS.index(activation))
    if torch.ops.profit_cpu.duq_codes(dense, _parameter(a, x), *settings, found):
        raise ValueError(NO_CODE)
    return out if in_place else out.copy_(found)
