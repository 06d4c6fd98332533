"""A network is built and tried once on two random images, so that what does not work is told at the start, by its setting."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from profit.checks import brief, first_line
from profit.errors import ProfitError, RecipeError, out_of_memory
from profit.memory import bounded
from profit_kernels import dispatch

if TYPE_CHECKING:
    from profit.train.network import Architecture

# What the code of a network raises for arguments it was not made for. Not Exception: Ctrl-C and exits pass.
NETWORK_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


def tried(architecture: Architecture, pretrained: bool, device: torch.device | str, copies: int = 1) -> nn.Module:
    """The network, in full precision on `device`, after one forward pass of two random images.

    Args:
        copies: of the weights, that will be needed in memory.

    Raises:
        RecipeError: it cannot be built, does not run, does not give logits `[2, classes]`, or needs more memory than there
            is; the setting that is to blame is named.
        ProfitError: the kernels' settings are wrong, or what the constructor says in such a line itself.
    """
    wrong = dispatch.wrong_setting(torch.device(device).type)
    if wrong is not None:
        raise ProfitError(wrong)
    try:
        return _attempt(architecture, pretrained, device, copies)
    except NETWORK_ERRORS as error:
        cause = error.__cause__ if isinstance(error, RecipeError) else error
        if cause is None and not isinstance(error, _Unfit):
            raise  # told already, by its setting
        told = " ".join(_told(cause or error).split())
    if pretrained and _works(architecture, architecture.args, copies):
        raise RecipeError(f"model.pretrained: the weights of {architecture.name} cannot be had: {told}")
    culprit = _culprit(architecture, copies)
    where = f"model.args.{culprit}={brief(architecture.args[culprit])}" if culprit else f"model.name: {architecture.name}"
    raise RecipeError(f"{where}: the network cannot be used: {told}")


class _Unfit(RecipeError):
    """The network runs, but gives something else than logits."""


def _attempt(architecture: Architecture, pretrained: bool, device: torch.device | str, copies: int) -> nn.Module:
    with bounded(copies):
        model = architecture.build(pretrained)
    model = model.to(device)
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model  # refused as such, a network without a convolution
    training = model.training
    with torch.no_grad():
        output = model.eval()(architecture.example_input(device))
    model.train(training)
    shape = (2, architecture.classes)
    if not isinstance(output, Tensor):
        raise _Unfit(f"it gives a {type(output).__name__}, not logits of shape {list(shape)}")
    if tuple(output.shape) != shape or not output.is_floating_point():
        raise _Unfit(f"it gives {output.dtype} of shape {list(output.shape)}, not logits of shape {list(shape)}")
    return model


def _told(error: BaseException) -> str:
    if out_of_memory(error):
        return f"out of memory ({first_line(error)}): take a smaller one, or a smaller data.image_size"
    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, KeyError):
        return f"there is no {error}"
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__


def _works(architecture: Architecture, args: dict[str, Any], copies: int) -> bool:
    try:
        _attempt(replace(architecture, args=args), False, "cpu", copies)
    except NETWORK_ERRORS:
        return False
    return True


def _culprit(architecture: Architecture, copies: int) -> str | None:
    """The argument without which the network works, else the first that alone breaks it; None if it is none of them."""
    args = architecture.args
    if not args or _works(architecture, args, copies):
        return None
    for key in args:
        if _works(architecture, {name: value for name, value in args.items() if name != key}, copies):
            return key
    if not _works(architecture, {}, copies):
        return None
    return next((key for key, value in args.items() if not _works(architecture, {key: value}, copies)), None)
