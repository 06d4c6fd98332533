"""Image folders, tar files (`wds/NAME`) and sets of torchvision (`torch/cifar10`, ...), through timm itself.

What a recipe may name is decided in `profit.allowed` before anything comes here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from profit.data.inventory import class_names_of, inventory, numbered
from profit.data.streams import check_info, check_shards
from profit.data.tensors import DataBundle
from profit.errors import DataError, MissingDataError

if TYPE_CHECKING:
    from profit.data.folders import FolderImages

# What readers raise for data that they cannot open or that are not theirs.
_UNOPENABLE = (
    RuntimeError, ValueError, AssertionError, LookupError, OSError, ImportError, TypeError, AttributeError, UnpicklingError,
)  # fmt: skip


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
            # a worker process wraps the message in a traceback, at the end of which it stands
            raise DataError(str(error).strip().split("DataError: ")[-1]) from None


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
    on_error: Literal["refuse", "skip"] = "refuse",
    device: torch.device | str = "cpu",
) -> DataBundle:
    """Train and test loaders of an image folder (`name="imagefolder"`) or of a data set that timm opens.

    Args:
        name: `imagefolder`, or a name timm's `create_dataset` understands; not to be taken from a stranger unchecked.
        path: the root folder; an image folder holds `path/train_split/<class>/...` and `path/test_split/<class>/...`.
        classes: number of classes, needed only where the data set does not tell; it must be the folder's, where both are.
        on_error: "refuse" stops at an unreadable image of a folder, "skip" leaves it out of its batch and counts it.
        Everything else goes to timm's `create_loader` under the same name.

    Raises:
        DataError: missing folder, unreadable image (named), unknown data set, unknown or other number of classes.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_loader
    from timm.data.loader import fast_collate

    from profit.data.folders import SkippingCollate

    device = torch.device(device)
    folders: tuple[FolderImages, ...] = ()
    if name == "imagefolder":
        *folders, found = _folders(path, train_split, test_split, in_chans, on_error == "skip")
        if classes not in (None, found):
            raise DataError(f"data.classes is {classes} but {Path(str(path)) / train_split} holds {found} class folders")
        (train_set, test_set, fixed_set), classes = folders, found
    else:
        if on_error == "skip":
            raise DataError(f"data.on_error=skip is for image folders; timm decides what {name} does with unreadable images")
        train_set, test_set, fixed_set = (
            _named(name, path, split, in_chans, download, batch_size, training)
            for split, training in ((train_split, True), (test_split, False), (train_split, False))
        )
        if isinstance(train_set, IterableDataset):
            _check_stream(name, workers, limit)
        classes = classes or len(class_names_of(train_set)) or None
        if classes is None:
            raise DataError(f"the data set {name} does not tell its number of classes: set data.classes")
    class_names = class_names_of(train_set)
    whole = {"train": (train_set, train_split, len(train_set)), "test": (test_set, test_split, len(test_set))}
    if limit is not None:
        train_set, test_set, fixed_set = (_Limited(dataset, limit) for dataset in (train_set, test_set, fixed_set))

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
    if on_error == "skip":
        common["collate_fn"] = SkippingCollate(fast_collate if common["use_prefetcher"] else default_collate)
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != in_chans:
            raise DataError(f"data.{key} must hold {in_chans} numbers, one per channel, got {list(values)}")
    try:
        train = create_loader(
            train_set, batch_size=min(batch_size, len(train_set)), is_training=True, hflip=hflip,
            color_jitter=None if plain else color_jitter, auto_augment=auto_augment, scale=scale, **common,
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError) as error:
        raise DataError(f"timm cannot augment with data.auto_augment={auto_augment!r}: {error}") from None
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
        unreadable=lambda: sorted({file for folder in folders for file in folder.unreadable_files()}),
        class_names=class_names if len(class_names) == classes else numbered(classes),
        inventory=lambda: {
            key: inventory(dataset, Path(str(path)) / split if name == "imagefolder" else path, images)
            for key, (dataset, split, images) in whole.items()
        },
    )


def _folders(
    path: str | None, train_split: str, test_split: str, in_chans: int, skip: bool
) -> tuple[FolderImages, FolderImages, FolderImages, int]:
    from profit.data.folders import FolderImages, FolderReader

    if not path:
        raise DataError("data.name is imagefolder but data.path is not set: give the folder that holds the splits")
    root = Path(path)
    if not root.is_dir():
        raise MissingDataError(f"data.path {path} is not a folder")
    for split in (train_split, test_split):
        if not (root / split).is_dir():
            there = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())) or "none"
            raise DataError(f"{path} holds no folder {split!r} (folders there: {there}): set data.train_split and "
                            "data.test_split")
    mode = "L" if in_chans == 1 else "RGB"
    train = FolderReader(root / train_split)
    test = FolderReader(root / test_split, train.class_to_idx)
    sets = [FolderImages(reader, mode, skip) for reader in (train, test, train)]
    return *sets, len(train.class_to_idx)


def _named(
    name: str, path: str | None, split: str, in_chans: int, download: bool, batch_size: int, training: bool
) -> Any:
    from timm.data import create_dataset

    if not path:
        raise DataError(f"data.name is {name} but data.path is not set: give the folder of the data")
    stream, root = name.startswith("wds/"), Path(path).absolute()
    if not (root.is_dir() if root.exists() else download and not stream):
        missing = "is not a folder" if root.exists() else "does not exist"
        fetch = "" if stream else f" (-s data.download=true fetches {name} where torchvision can)"
        kind = DataError if root.exists() else MissingDataError
        raise kind(f"data.path {path} {missing}{fetch}")
    if stream:
        check_info(root)
    mode = {} if name.startswith("torch/") else {"input_img_mode": "L" if in_chans == 1 else "RGB"}
    try:
        dataset = create_dataset(
            name, root=str(root), split=split, is_training=training, download=download, batch_size=batch_size, **mode
        )
    except _UNOPENABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"timm cannot open the data set {name!r}, split {split!r}: {reason}") from error
    if stream:  # timm only logs what it cannot read of one
        check_shards(root, dataset.reader.split_info.filenames, split)
    return dataset


def _check_stream(name: str, workers: int, limit: int | None) -> None:
    """Raise DataError for settings that a data set without an index, as webdataset's, cannot serve."""
    if workers < 1:
        # timm's reader would shuffle on from where it is in this process, so that a resumed run saw other batches
        raise DataError(f"{name} is read as a stream, which needs data.workers to be at least 1")
    if limit is not None:
        raise DataError(f"{name} is read as a stream, which data.limit={limit} cannot pick from: leave data.limit out and give "
                        "a split of fewer shards")  # fmt: skip


class _Limited(torch.utils.data.Dataset):
    """Every n-th sample, so that all classes of a sorted folder stay present. timm sets `transform` from outside."""

    def __init__(self, dataset: Any, limit: int) -> None:
        count = min(limit, len(dataset))
        self.dataset, self.transform = dataset, None
        self.chosen = [index * len(dataset) // count for index in range(count)]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Any:
        self.dataset.transform = self.transform
        return self.dataset[self.chosen[index]]


def _spread(loader: Any) -> Any:
    """The same images in a fixed mixed order: a folder is sorted by class and calibration reads only some batches.

    A stream stays in its order, in which its shards were mixed when they were written.
    """
    inner = getattr(loader, "loader", loader)
    dataset = inner.dataset
    if isinstance(dataset, IterableDataset):
        return loader
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = torch.utils.data.DataLoader(
        dataset, batch_size=inner.batch_size, sampler=order, num_workers=inner.num_workers, collate_fn=inner.collate_fn
    )
    if inner is loader:
        return mixed
    loader.loader = mixed  # timm's prefetcher keeps the plain loader inside
    return loader
