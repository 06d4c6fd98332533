"""Data sets: the embedded digits, image folders, tar files of webdataset and some sets of torchvision."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from profit.allowed import data_problem
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
        recipe: its `data` section; `name` is `digits`, `imagefolder`, `imagefolder:PATH`, `wds/NAME` or one of `torch/*`.
        seed: of the order of the batches.
        device: where batches are delivered.

    Raises:
        DataError: when the data cannot be found, opened or used, or would have to be fetched or run (docs/security.md).
    """
    wrong = data_problem(recipe)
    if wrong:
        raise DataError(wrong)
    values = asdict(recipe)
    if recipe.name == "digits":
        from profit.data.digits import digits_data

        return digits_data(seed=seed, device=device, **{key: values[key] for key in _DIGITS})
    name, _, path = recipe.name.partition(":")
    if path and values["path"]:
        raise DataError("the data folder is given twice: in data.name and in data.path")
    from profit.data.timm_data import timm_data

    for key in _NOT_TIMM:
        values.pop(key)
    values.update(name=name, path=path or values["path"])
    return timm_data(device=device, **values)
