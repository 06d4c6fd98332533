"""Calls of the C++ kernels of DuQ (csrc/cpu/duq.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import native
from .reference import ACTIVATIONS


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
