"""An operator is registered by one call: schema, fake, autograd, and the way past the dispatcher for eager calls.

A forward has a backward operator of its own, so that a compiled graph holds both. That has no derivative and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_NAMESPACE = "profit_kernels"


def is_plain(x: Tensor) -> bool:
    """Whether nothing traces, transforms or wraps x, so that an operator may be called without the dispatcher."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def autocast(x: Tensor) -> Tensor:
    """The autocast rule, that of a convolution: to the lower precision, float64 excepted."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):  # meta: to ask more is an error
        return x
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def no_double_backward(name: str) -> Callable[..., None]:
    """An autograd formula that says that `name` has none, instead of a gradient that is silently missing."""

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name} cannot be differentiated twice: its gradient is straight-through, not a function to derive"
        )

    return refuse


def _define(name: str, schema: str, function: Callable, fake: Callable) -> Any:
    """The operator `profit_kernels::name`."""
    torch.library.define(f"{_NAMESPACE}::{name}", schema)
    torch.library.impl(f"{_NAMESPACE}::{name}", "default", function)
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake)
    return getattr(torch.ops.profit_kernels, name).default


def _names(arguments: str) -> tuple[list[str], int]:
    """The names of the arguments of a schema, and how many of them are tensors: the first ones."""
    given = torch._C.parse_schema(f"operator({arguments}) -> Tensor").arguments
    return [a.name for a in given], sum("Tensor" in str(a.type) for a in given)


def operator(name: str, arguments: str, returns: str, function: Callable, fake: Callable) -> Callable:
    """Register an operator without gradients; returns what calls it.

    Args:
        arguments: schema text, the tensors first. returns: schema text.
        function(tensors, rest): the implementation, from the tensors among the arguments and from the others; `fake` alike.
    """
    _, count = _names(arguments)
    registered = _define(
        name, f"({arguments}) -> {returns}",
        lambda *inputs: function(inputs[:count], inputs[count:]), lambda *inputs: fake(inputs[:count], inputs[count:]),
    )  # fmt: skip

    def call(x: Tensor, *rest: Any) -> Any:
        return function((x, *rest[: count - 1]), rest[count - 1 :]) if is_plain(x) else registered(x, *rest)

    return call


def differentiable_lists(
    name: str, arguments: str, forward: Callable, backward: Callable, *, lists: int, public: str
) -> Callable:
    """Register an operator on lists of tensors of one length, which returns such a list; returns what calls it.

    Args:
        arguments: `lists` lists of tensors, then others. The result and all gradients are like the lists.
        forward(*arguments): a list. backward(grads, *arguments): the gradients of the first list, then of the next, ...
    """
    call = _define(name, f"({arguments}) -> Tensor[]", forward, lambda first, *_: [torch.empty_like(t) for t in first])
    call_backward = _define(
        f"{name}_backward", f"(Tensor[] grads, {arguments}) -> Tensor[]", backward,
        lambda grads, *rest: [torch.empty_like(t) for tensors in rest[:lists] for t in tensors],
    )  # fmt: skip

    def setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.save_for_backward(*(t for tensors in inputs[:lists] for t in tensors))
        ctx.rest = inputs[lists:]

    def split(tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        n = len(tensors) // lists
        return [tensors[i * n : (i + 1) * n] for i in range(lists)]

    def gradients(ctx: Any, grads: list[Tensor]) -> tuple:
        found = call_backward(grads, *split(ctx.saved_tensors), *ctx.rest)
        return *split(found), *[None] * len(ctx.rest)

    torch.library.register_autograd(f"{_NAMESPACE}::{name}", gradients, setup_context=setup_context)
    torch.library.register_autograd(f"{_NAMESPACE}::{name}_backward", no_double_backward(public))
    return call


def differentiable(
    name: str, arguments: str, forward: Callable, backward: Callable, fake: Callable, fake_backward: Callable, *,
    gradients: str, needs: Mapping[str, str] | None = None, public: str = "",
) -> Callable[..., Tensor]:  # fmt: skip
    """Register an operator that returns one tensor, with its backward operator; returns what calls it.

    Args:
        arguments, forward, fake: as in `operator`. The tensors are kept for the backward.
        backward(grad, tensors, rest, needed): the gradients; `fake_backward` alike.
        gradients: names of the arguments whose gradients `backward` returns, in its order.
        needs: name of a flag -> the arguments that set it by needing a gradient; `needed` holds the flags in this order.
        public: the name in messages.

    A call on plain tensors goes around the dispatcher's Python layers, which cost as much as a small layer does.
    """
    needs = needs or {}
    given, count = _names(arguments)
    total = len(given)
    places = [given.index(g) for g in gradients.split()]
    flags = [[given.index(n) for n in names.split()] for names in needs.values()]
    call = _define(
        name, f"({arguments}) -> Tensor",
        lambda *inputs: forward(inputs[:count], inputs[count:]), lambda *inputs: fake(inputs[:count], inputs[count:]),
    )  # fmt: skip
    taken, returned = ", ".join([arguments, *(f"bool {flag}" for flag in needs)]), ", ".join(["Tensor?"] * len(places))
    call_backward = _define(
        f"{name}_backward", f"(Tensor grad, {taken}) -> ({returned})",
        lambda grad, *inputs: backward(grad, inputs[:count], inputs[count:total], inputs[total:]),
        lambda grad, *inputs: fake_backward(grad, inputs[:count], inputs[count:total], inputs[total:]),
    )  # fmt: skip

    def registered_backward(grad: Tensor, tensors: Sequence, rest: Sequence, needed: Sequence[bool]) -> tuple:
        return call_backward(grad, *tensors, *rest, *needed)

    def setup_context(ctx: Any, inputs: tuple, output: Tensor | None) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.rest = inputs[count:]

    def run(ctx: Any, grad: Tensor, function: Callable) -> tuple:
        wanted = ctx.needs_input_grad
        needed = [any([wanted[i] for i in group]) for group in flags]
        result: list[Tensor | None] = [None] * total
        for place, gradient in zip(places, function(grad, ctx.saved_tensors, ctx.rest, needed), strict=True):
            result[place] = gradient
        return tuple(result)

    torch.library.register_autograd(
        f"{_NAMESPACE}::{name}", lambda ctx, grad: run(ctx, grad, registered_backward), setup_context=setup_context
    )
    torch.library.register_autograd(f"{_NAMESPACE}::{name}_backward", no_double_backward(public or name))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            setup_context(ctx, inputs, None)
            return forward(inputs[:count], inputs[count:])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple:
            # Where the gradient is to be differentiated, the registered operator is what refuses.
            return run(ctx, grad, registered_backward if torch.is_grad_enabled() else backward)

    def choose(x: Tensor, *rest: Any) -> Tensor:
        return Eager.apply(x, *rest) if is_plain(x) else call(x, *rest)

    return choose
