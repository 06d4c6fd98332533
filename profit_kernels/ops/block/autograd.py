"""Autograd of the block's operators, once for the dispatcher and once around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..duq.op import no_double_backward


def is_plain(x: Tensor) -> bool:
    """Whether nothing traces or wraps x, so that an operator may be called without the dispatcher."""
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def differentiable(
    name: str, tensors: int, forward: Callable[..., Tensor], backward: Callable[..., tuple], gradients: Callable[..., tuple]
) -> Callable[..., Tensor]:
    """Give `profit_kernels::name` its implementation, its backward and autograd, and return what calls it.

    Args:
        tensors: how many of the first arguments are tensors; these are kept for the backward.
        forward, backward: the implementations of `name` and `name_backward`.
        gradients: `gradients(ctx, grad, backward)` gives those of all arguments; `ctx.settings` holds the other ones.

    A call on plain tensors goes around the dispatcher's Python layers, which cost as much as a small layer does.
    """
    registered = f"profit_kernels::{name}"
    torch.library.impl(registered, "default", forward)
    torch.library.impl(f"{registered}_backward", "default", backward)
    operator = getattr(torch.ops.profit_kernels, name)
    operator_backward = getattr(torch.ops.profit_kernels, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple, output: Tensor | None) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.settings = inputs[tensors:]

    torch.library.register_autograd(
        registered, lambda ctx, grad: gradients(ctx, grad, operator_backward), setup_context=setup_context
    )
    torch.library.register_autograd(f"{registered}_backward", no_double_backward(name))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            setup_context(ctx, inputs, None)
            return forward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple:
            return gradients(ctx, grad, backward)

    def call(x: Tensor, *rest: Any) -> Tensor:
        return Eager.apply(x, *rest) if is_plain(x) else operator(x, *rest)

    return call
