"""Running a model on whatever a data loader yields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .checks import brief, first_line
from .errors import CalibrationError, ProfitError


def arguments_of(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the forward on one batch of a loader, moved to `device`.

    Args:
        batch: a tensor, a tuple or list that starts with one, or a mapping of keyword arguments.

    Raises:
        TypeError: anything else.
    """
    if isinstance(batch, Mapping):
        return (), {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a batch is a {type(images).__name__}: the loader must give tensors, (tensor, ...) tuples or mappings of arguments"
        )
    return (images.to(device),), {}


def run_batches(
    model: nn.Module, loader: Iterable[Any], number: int, device: torch.device, what: str,
    place: Callable[[], str] = lambda: "",
) -> int:  # fmt: skip
    """Run `model` on up to `number` batches of `loader` and return how many there were.

    Args:
        what: what this is for. place: where the forward is, such as " in layer 'dw'"; both are for the error.

    Raises:
        CalibrationError: the model does not run on a batch. TypeError: a batch of another form, or no loader.
    """
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader must give batches, got {brief(loader)}")
    used = 0
    for batch in islice(loader, number):
        args, kwargs = arguments_of(batch, device)
        try:
            model(*args, **kwargs)
        except (ProfitError, torch.cuda.OutOfMemoryError):  # these say what they are
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise CalibrationError(
                f"{what}: the model does not run on batch {used + 1} of the loader{place()}: {first_line(error)}"
            ) from error
        used += 1
    return used
