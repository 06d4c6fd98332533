"""A case, and the ways to compute it that are compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import profit_kernels as pk

from ..harness import registry
from ..harness.data import backend_context

Forward = Callable[[], Sequence[Tensor]]
# (outputs, gradients of the leaves) of a variant, and of the reference
Gate = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. `leaves`: what it is differentiated by; `gate`: None where it computes something else."""

    forward: Forward
    leaves: Sequence[Tensor]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    gate: Gate | None = None
    compiled: bool = False


@dataclass
class Case:
    """`moved`: tensors of `numel` elements that must move once, by direction; `parameters` are not counted as kept."""

    name: str
    numel: int
    dtype: torch.dtype
    moved: dict[str, float]
    grads: Sequence[Tensor]
    parameters: Sequence[Tensor]
    variants: dict[str, Variant] = field(default_factory=dict)


def add_ours(case: Case, ops: Sequence[str], forward: Forward, leaves: Sequence[Tensor], gate: Gate, device: str) -> None:
    """Add auto, every backend that can serve the first of `ops`, and the reference in eager mode and compiled."""
    case.variants["auto"] = Variant(forward, leaves, backend_context("auto", pk.dispatch.OPS), gate)
    for backend in registry.backends(ops[0], device, case.dtype):
        served = [op for op in ops if backend in registry.backends(op, device, case.dtype)]
        case.variants[backend] = Variant(forward, leaves, backend_context(backend, served), gate)
    reference = backend_context("reference", pk.dispatch.OPS)
    case.variants["reference-eager"] = Variant(forward, leaves, reference, gate)
    compiled = torch.compile(forward, dynamic=False)
    case.variants["reference-compile"] = Variant(compiled, leaves, reference, gate, compiled=True)


def add_float(case: Case, forward: Forward, leaves: Sequence[Tensor]) -> None:
    """Add the same layer in full precision, in eager mode and compiled."""
    case.variants["float-eager"] = Variant(forward, leaves)
    case.variants["float-compile"] = Variant(torch.compile(forward, dynamic=False), leaves, compiled=True)
