"""Image folders and every data set that timm's loader knows (`torch/cifar10`, `hfds/...`), through timm itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from profit.data.tensors import DataBundle
from profit.errors import DataError


class TimmLoader:
    """A timm loader whose batches depend on nothing but the seed and the epoch.

    The trainer seeds the generators at the start of an epoch and the workers are started anew each time; persistent
    workers would carry their own generators over and a resumed run would see other crops.
    """

    def __init__(self, loader: Any, device: torch.device) -> None:
        self.loader, self.device = loader, device

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: order and augmentation follow torch's global generator."""

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            for images, labels in self.loader:
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        except DataError as error:
            # a worker process wraps the message in a traceback; its last line is the message itself
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None


def timm_data(
    *,
    name: str,
    path: str | None,
    image_size: int,
    in_chans: int = 3,
    batch_size: int = 64,
    eval_batch_size: int = 256,
    train_split: str = "train",
    test_split: str = "val",
    classes: int | None = None,
    workers: int = 2,
    download: bool = False,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    crop_pct: float | None = None,
    interpolation: str = "bilinear",
    hflip: float = 0.5,
    color_jitter: float | None = None,
    auto_augment: str | None = None,
    scale: tuple[float, ...] | None = None,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> DataBundle:
    """Train and test loaders of an image folder (`name="imagefolder"`) or a timm data set name.

    Args:
        name: `imagefolder`, or a name timm's `create_dataset` understands.
        path: the root folder; an image folder holds `path/train_split/<class>/...` and `path/test_split/<class>/...`.
        classes: number of classes, needed only where the data set does not tell.
        Everything else goes to timm's `create_loader` under the same name.

    Raises:
        DataError: missing folder, unreadable image (named), unknown data set, unknown number of classes.
    """
    device = torch.device(device)
    if name == "imagefolder":
        train_set, test_set, fixed_set, classes = _folders(path, train_split, test_split, in_chans)
    else:
        train_set = _named(name, path, train_split, in_chans, download, True)
        test_set = _named(name, path, test_split, in_chans, download, False)
        fixed_set = _named(name, path, train_split, in_chans, download, False)
        classes = classes or _classes_of(train_set)
        if classes is None:
            raise DataError(f"the data set {name} does not tell its number of classes: set data.classes")
    if limit is not None:
        train_set, test_set, fixed_set = (_limited(dataset, limit) for dataset in (train_set, test_set, fixed_set))

    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader

    plain = in_chans != 3
    common: dict[str, Any] = {
        "input_size": (in_chans, image_size, image_size),
        "mean": tuple(mean or ((0.5,) * in_chans if plain else IMAGENET_DEFAULT_MEAN)),
        "std": tuple(std or ((0.5,) * in_chans if plain else IMAGENET_DEFAULT_STD)),
        "interpolation": interpolation,
        "num_workers": workers,
        "persistent_workers": False,
        "use_prefetcher": device.type == "cuda",
        "device": device,
    }
    train = create_loader(
        train_set, batch_size=min(batch_size, len(train_set)), is_training=True, hflip=hflip,
        color_jitter=None if plain else color_jitter, auto_augment=auto_augment, scale=scale, **common,
    )  # fmt: skip
    test = create_loader(test_set, batch_size=eval_batch_size, crop_pct=crop_pct, **common)
    calibration = create_loader(fixed_set, batch_size=batch_size, crop_pct=crop_pct, **common)
    return DataBundle(
        name=name if name != "imagefolder" else f"imagefolder:{Path(str(path)).name}",
        train=TimmLoader(train, device),
        test=TimmLoader(test, device),
        calibration=TimmLoader(_spread(calibration), device),
        classes=classes,
        in_chans=in_chans,
        image_size=image_size,
        train_images=len(train_set),
        test_images=len(test_set),
    )


def _folders(path: str | None, train_split: str, test_split: str, in_chans: int) -> tuple[Any, Any, Any, int]:
    if not path:
        raise DataError("data.name is imagefolder but data.path is not set: give the folder that holds the splits")
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"data.path {path} is not a folder")
    for split in (train_split, test_split):
        if not (root / split).is_dir():
            there = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())) or "none"
            raise DataError(f"{path} holds no folder {split!r} (folders there: {there}): set data.train_split and "
                            "data.test_split")
    train_set = _strict(root / train_split, None, in_chans)
    class_map = train_set.reader.class_to_idx
    unknown = sorted(set(_strict(root / test_split, None, in_chans).reader.class_to_idx) - set(class_map))
    if unknown:
        raise DataError(f"{root / test_split} holds classes that {train_split} lacks: {', '.join(unknown[:5])}")
    fixed_set = _strict(root / train_split, class_map, in_chans)
    return train_set, _strict(root / test_split, class_map, in_chans), fixed_set, len(class_map)


def _strict(root: Path, class_map: dict[str, int] | None, in_chans: int) -> Any:
    """timm's ImageDataset, but an unreadable image stops the run: timm puts the next image in its place."""
    from PIL import Image, UnidentifiedImageError
    from timm.data import ImageDataset

    class StrictImageDataset(ImageDataset):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            file, target = self.reader[index]
            try:
                with file:
                    image = Image.open(file).convert(self.input_img_mode)
            except OSError as error:
                reason = "it is no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
                where = self.filename(index, absolute=True)
                raise DataError(f"cannot read the image {where}: {reason}".replace("\n", " ")) from error
            return (image if self.transform is None else self.transform(image)), target

    try:
        return StrictImageDataset(
            str(root), reader="", class_map=class_map or "", input_img_mode="L" if in_chans == 1 else "RGB"
        )
    except RuntimeError as error:
        raise DataError(f"{root} holds no image in class folders") from error


def _named(name: str, path: str | None, split: str, in_chans: int, download: bool, training: bool) -> Any:
    from timm.data import create_dataset

    if path and not download and not Path(path).exists():
        raise DataError(f"data.path {path} does not exist (data.download=true fetches {name} where timm can)")
    mode = {} if name.startswith("torch/") else {"input_img_mode": "L" if in_chans == 1 else "RGB"}
    try:
        return create_dataset(name, root=path, split=split, is_training=training, download=download, **mode)
    except (RuntimeError, ValueError, AssertionError, KeyError, OSError, ImportError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"timm cannot open the data set {name!r}, split {split!r}: {reason}") from error


def _classes_of(dataset: Any) -> int | None:
    for holder, key in ((dataset, "classes"), (getattr(dataset, "reader", None), "class_to_idx")):
        found = getattr(holder, key, None)
        if found:
            return len(found)
    return None


def _limited(dataset: Any, limit: int) -> Any:
    """Every n-th sample, so that all classes of a sorted folder stay present."""
    count = min(limit, len(dataset))
    chosen = [index * len(dataset) // count for index in range(count)]

    class Limited(torch.utils.data.Dataset):
        transform: Any = None

        def __len__(self) -> int:
            return len(chosen)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            dataset.transform = self.transform
            return dataset[chosen[index]]

    return Limited()


def _spread(loader: Any) -> Any:
    """The same images in a fixed mixed order: a folder is sorted by class and calibration reads only some batches."""
    inner = getattr(loader, "loader", loader)
    dataset = inner.dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = torch.utils.data.DataLoader(
        dataset, batch_size=inner.batch_size, sampler=order, num_workers=inner.num_workers, collate_fn=inner.collate_fn
    )
    if inner is loader:
        return mixed
    loader.loader = mixed  # timm's prefetcher keeps the plain loader inside
    return loader
