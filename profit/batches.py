"""Running a model on whatever a data loader yields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def run_batch(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """The output of `model` on one batch of a loader, moved to `device`.

    Args:
        batch: a tensor, a tuple or list that starts with one, or a mapping of keyword arguments.

    Raises:
        TypeError: anything else.
    """
    if isinstance(batch, Mapping):
        return model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a batch is a {type(images).__name__}: the loader must give tensors, (tensor, ...) tuples or mappings of arguments"
        )
    return model(images.to(device))
