"""What layers are measured on: random data, raw intervals, a choice of backend."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import profit_kernels as pk
from profit.nn.quantizer import inverse_softplus

BITS = 4


def backend_context(name: str, ops: Sequence[str]) -> Callable[[], contextlib.AbstractContextManager]:
    """A choice of backend `name` for the operators `ops`, to be entered again and again."""
    return lambda: pk.use_backend(name, ops)


def raw_interval(value: float, device: str, numel: int = 1) -> Tensor:
    """A raw interval or scale whose softplus is `value`."""
    raw = inverse_softplus(torch.full((numel,), value, dtype=torch.float64)).float()
    return raw.to(device).requires_grad_()


def random_data(shape: Sequence[int], dtype: torch.dtype, device: str, std: float = 1.0) -> Tensor:
    """Normal data; four dimensions come in channels_last."""
    data = torch.randn(tuple(shape), device=device, dtype=torch.float32).mul_(std).to(dtype)
    return data.to(memory_format=torch.channels_last) if data.dim() == 4 else data
