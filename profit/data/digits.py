"""Scikit-learn's handwritten digits: 1797 real 8 x 8 images, ten classes, no download (UCI, Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from profit.data.inventory import numbered
from profit.data.tensors import DataBundle, TensorLoader
from profit.errors import DataError
from profit.files import sha256_of_tensors
from profit.memory import available_bytes


def digits_data(
    *,
    image_size: int = 16,
    folds: int = 5,
    fold: int = 0,
    batch_size: int = 64,
    eval_batch_size: int = 256,
    shift: int = 0,
    limit: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> DataBundle:
    """One stratified fold of the digits, normalised to -1..1 and enlarged bilinearly to `image_size`.

    Args:
        image_size: side of the square image, at least 8.
        folds: number of folds; fold number `fold` is the test set, the others train.
        batch_size: images per training batch.
        eval_batch_size: images per test or calibration batch.
        shift: largest random shift of the training images in pixels.
        limit: keep only this many training and this many test images (for quick trials).
        seed: of the order of the training batches; the folds themselves never change.
        device: where the images are kept.

    Raises:
        DataError: for an impossible fold or size, or when scikit-learn is missing.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise DataError(f"data.fold must lie in 0..data.folds-1 with data.folds >= 2, got fold {fold} of {folds}")
    if image_size < 8:
        raise DataError(f"data.image_size must be at least 8 for the digits, got {image_size}")
    if limit is not None and limit < 10:
        raise DataError(f"data.limit must be at least 10 (one image per class), got {limit}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import StratifiedKFold
    except ImportError as error:
        raise DataError("the digits need scikit-learn: pip install 'profit-kernels[train]'") from error
    raw = load_digits()
    smallest = int(np.bincount(raw.target).min())
    if folds > smallest:
        raise DataError(f"data.folds must be at most {smallest}, the images of the rarest digit, got {folds}")
    if shift >= image_size:
        raise DataError(f"data.shift must be below data.image_size, which is {image_size}, got {shift}")
    count, free = len(raw.images), available_bytes()
    needed = 4 * image_size**2 * (count + 2 * min(count, limit or count))  # all, the fold, and a shuffled epoch of it
    if free is not None and needed > free:
        raise DataError(f"data.image_size={image_size}: the digits take {needed / 1e9:.1f} GB of memory, and "
                        f"{free / 1e9:.1f} GB are free")  # fmt: skip
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8.0 - 1.0  # grey levels are 0..16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    if image_size != images.shape[-1]:
        images = F.interpolate(images, size=(image_size, image_size), mode="bilinear", align_corners=False)
    splitter = StratifiedKFold(n_splits=folds, shuffle=True, random_state=0)
    train_index, test_index = list(splitter.split(raw.images, raw.target))[fold]
    train_index, test_index = torch.as_tensor(train_index)[:limit], torch.as_tensor(test_index)[:limit]
    images, labels = images.to(device), labels.to(device)

    def content(index: Tensor) -> dict[str, Any]:
        # the values as they are stored: those that train depend on how this machine enlarges them
        stored = {"images": torch.as_tensor(raw.images[index]), "labels": torch.as_tensor(raw.target[index])}
        return {"images": len(index), "sha256": sha256_of_tensors("digits", stored)}

    train_images, train_labels = images[train_index], labels[train_index]
    test_images, test_labels = images[test_index], labels[test_index]
    return DataBundle(
        name="digits",
        train=TensorLoader(
            train_images, train_labels, batch_size, train=True, shift=shift, fill=-1.0, seed=seed
        ),
        test=TensorLoader(test_images, test_labels, eval_batch_size),
        calibration=TensorLoader(train_images, train_labels, eval_batch_size),
        classes=10,
        in_chans=1,
        image_size=image_size,
        train_images=len(train_images),
        test_images=len(test_images),
        class_names=numbered(10),
        inventory=lambda: {"train": content(train_index), "test": content(test_index)},
    )
