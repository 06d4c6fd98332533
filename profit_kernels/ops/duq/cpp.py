"""Calls of the C++ kernels of DuQ (csrc/cpu/duq/duq.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from ...layer import ACTIVATIONS
from .reference import NO_CODE


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y like x; see reference.forward."""
    native.load()
    return torch.ops.profit_cpu.duq_forward(x, a, c, bits, signed, offset, ACTIVATIONS.index(activation))


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx, ga, gc); see reference.backward."""
    native.load()
    return torch.ops.profit_cpu.duq_backward(grad, x, a, c, bits, signed, offset, ACTIVATIONS.index(activation))


def weights_forward(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """All weights in one parallel loop; see reference.weights_forward."""
    native.load()
    return torch.ops.profit_cpu.duq_weights_forward(weights, a, c, bits)


def weights_backward(
    grads: list[Tensor], weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]
) -> list[Tensor]:
    """All dL/dw, then all dL/da, then all dL/dc; see reference.weights_backward."""
    native.load()
    return torch.ops.profit_cpu.duq_weights_backward(grads, weights, a, c, bits)


def codes(x: Tensor, a: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """int8 or uint8 codes; see reference.codes."""
    native.load()
    out = torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)
    in_place = out.stride() == x.stride() and (a.numel() == 1 or x.stride(0) * x.shape[0] == x.numel())
    dense = x if in_place else x.contiguous()
    found = out if in_place else torch.empty_like(dense, dtype=out.dtype)
    settings = (bits, signed, offset, ACTIVATIONS.index(activation))
    if torch.ops.profit_cpu.duq_codes(dense, a, *settings, found):
        raise ValueError(NO_CODE)
    return out if in_place else out.copy_(found)
