"""Data sets: the embedded digits, image folders, and whatever timm's loader accepts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from profit.data.tensors import DataBundle, Loader, TensorLoader
from profit.errors import DataError

if TYPE_CHECKING:
    from profit.train.recipe import DataRecipe

__all__ = ["DataBundle", "Loader", "TensorLoader", "create_data"]

_DIGITS = ("image_size", "folds", "fold", "batch_size", "eval_batch_size", "shift", "limit")
_NOT_TIMM = ("folds", "fold", "shift")


def create_data(recipe: DataRecipe, *, seed: int = 0, device: torch.device | str = "cpu") -> DataBundle:
    """The loaders a recipe's `data` section describes.

    Args:
        recipe: its `data` section; `name` is `digits`, `imagefolder`, `imagefolder:PATH` or a timm data set name.
        seed: of the order of the batches.
        device: where batches are delivered.

    Raises:
        DataError: when the data cannot be found, opened or used.
    """
    values = asdict(recipe)
    if recipe.name == "digits":
        from profit.data.digits import digits_data

        return digits_data(seed=seed, device=device, **{key: values[key] for key in _DIGITS})
    name, _, path = recipe.name.partition(":")
    if path and values["path"]:
        raise DataError("the data folder is given twice: in data.name and in data.path")
    if name != "imagefolder" and "/" not in name:
        raise DataError(f"unknown data.name {recipe.name!r}: digits, imagefolder:PATH, or a timm name as torch/cifar10")
    from profit.data.timm_data import timm_data

    for key in _NOT_TIMM:
        values.pop(key)
    values.update(name=name, path=path or values["path"])
    return timm_data(device=device, **values)
