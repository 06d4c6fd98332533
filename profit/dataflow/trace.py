"""What feeds each layer: one eager forward in which every tensor carries its bounds (see bounds.py).

A `TorchFunctionMode` sees every operation the model calls, whatever the control flow; hooks tell which module is running.
Layers are recognised by the identity of their weight. What can hide from this (scripted modules and functions, custom
autograd functions, weights computed on the fly, layers that did not run) is refused by the layer's name, never guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..checks import first_line
from ..errors import ConversionError
from .bounds import Value
from .flow import LayerFlow
from .recorder import Recorder


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is one of the layers that conversion replaces."""
    return isinstance(module, (nn.Conv2d, nn.Linear))


def trace(
    model: nn.Module, example_inputs: Any, *, layers: Mapping[str, nn.Module] | None = None, decided: Collection[str] = (),
    left_out: Collection[str] = (),
) -> list[LayerFlow]:  # fmt: skip
    """Run `model` once (in eval mode, without gradients) and return the flow of every layer, in order of first use.

    Args:
        example_inputs: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        layers: name -> module of the layers to find; None means every Conv2d and Linear.
        decided: names whose kind is already decided: these may be fed two kinds, or by something that cannot be seen.
        left_out: names of modules that may use weights in operations of their own; anywhere else that is refused.

    The model is left as it was: training flags, buffers of BatchNorm, hooks.

    Raises:
        ConversionError: a layer did not run or its weight was used in an unknown way; another module convolves or multiplies
            with a weight; a layer is fed two kinds of input; what feeds it cannot be seen; the forward fails on
            `example_inputs`.
    """
    if layers is None:
        layers = {name: m for name, m in model.named_modules() if is_layer(m)}
    args, kwargs = _arguments(example_inputs)
    recorder = Recorder(model, layers, decided, left_out)
    with eval_mode(model), recorder.hooked(model), torch.no_grad():
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                recorder.values[tensor] = Value(op="input", raw=True)
        try:
            with recorder:
                output = model(*args, **kwargs)
        except ConversionError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise ConversionError(f"the model does not run on example_inputs: {first_line(error)}") from error
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor in recorder.values:
                recorder.values[tensor].readers.add(-1)
    return recorder.finish()


def _arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs), tensors copied: a model may work on its input in place."""
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    else:
        args, kwargs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {}
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        raise TypeError(
            "example_inputs holds no tensor: pass a tensor, a tuple of arguments or a dict of keyword arguments"
        )
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))


@contextmanager
def eval_mode(model: nn.Module):
    """Eval mode for the time of a `with` block; every module's own flag is restored."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
