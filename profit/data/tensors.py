"""A loader over images that already lie in memory, and the bundle every data source hands to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Loader(Protocol):
    """What the trainer asks of a loader: batches of (images `[N, C, H, W]` float32, labels `[N]` int64)."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True)
class DataBundle:
    """The loaders of one data set and what a model must know of it.

    `calibration` shows the training images in a fixed order and without augmentation. `unreadable()` lists the files that
    were left out so far because they cannot be read (`data.on_error=skip`). `class_names` stand in the order of the labels, as
    numbers where the data set has no names. `inventory()` tells, for "train" and "test", the number of images and a digest
    (profit.data.inventory).
    """

    name: str
    train: Loader
    test: Loader
    calibration: Loader
    classes: int
    in_chans: int
    image_size: int
    train_images: int
    test_images: int
    unreadable: Callable[[], list[str]] = list
    class_names: tuple[str, ...] = ()
    inventory: Callable[[], dict[str, Any]] = dict


class TensorLoader:
    """Batches of two tensors, shuffled and shifted on the device they lie on.

    Order and shifts are a function of (seed, epoch) alone, so a resumed run sees the same batches without storing a
    generator.

    Args:
        images: `[N, C, H, W]`.
        labels: `[N]` int64.
        batch_size: images per batch.
        train: shuffle, shift and drop the last incomplete batch (BatchNorm would see too few images in it).
        shift: largest displacement in pixels, both ways, filled with `fill`.
        fill: the value of the background after normalisation.
        seed: of the order and the shifts.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        train: bool = False,
        shift: int = 0,
        fill: float = 0.0,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels")
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, max(len(images), 1))
        self.train, self.shift, self.fill, self.seed, self.epoch = train, shift, fill, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.images), self.batch_size)
        return full if self.train or not rest else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.train:
            for start in range(0, len(self.images), self.batch_size):
                yield self.images[start : start + self.batch_size], self.labels[start : start + self.batch_size]
            return
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        count = len(self) * self.batch_size
        if not count:
            return
        device = self.images.device
        order = torch.randperm(len(self.images), generator=generator)[:count].to(device)
        images = self.images[order]
        if self.shift:
            images = shifted(images, self.shift, self.fill, generator)
        labels = self.labels[order]
        yield from zip(images.split(self.batch_size), labels.split(self.batch_size), strict=True)


def shifted(images: Tensor, shift: int, fill: float, generator: torch.Generator) -> Tensor:
    """Move every image `[N, C, H, W]` by its own random whole number of pixels in -shift..shift, both ways."""
    count, _, height, width = images.shape
    offsets = torch.randint(0, 2 * shift + 1, (2, count, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, (shift,) * 4, value=fill)
    which = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]  # advanced indexing puts the channels last
    return moved.permute(0, 3, 1, 2).contiguous()
