"""The data sources: folds, order, shifts, image folders and their errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from profit.data import TensorLoader, create_data
from profit.data.tensors import shifted
from profit.errors import DataError
from profit.train.recipe import DataRecipe


def test_every_digit_is_tested_in_exactly_one_fold() -> None:
    raw = load_digits()
    seen = []
    for fold in range(5):
        data = create_data(DataRecipe(fold=fold, image_size=8))
        assert data.train_images + data.test_images == len(raw.images)
        seen.append(data.test.images)
        shares = np.bincount(data.test.labels.numpy()) / np.bincount(raw.target)
        assert np.abs(shares - 0.2).max() < 0.02, "a stratified fold holds a fifth of every class"
    tested = sorted(tuple(image.flatten().tolist()) for image in torch.cat(seen))
    everything = sorted(tuple((image / 8 - 1).flatten().tolist()) for image in raw.images)
    assert tested == everything


def test_digits_are_enlarged_and_lie_within_minus_one_and_one() -> None:
    data = create_data(DataRecipe(image_size=16))
    assert data.train.images.shape == (data.train_images, 1, 16, 16)
    assert data.train.images.min() == -1 and data.train.images.max() == 1
    assert (data.classes, data.in_chans, data.image_size) == (10, 1, 16)


def test_order_depends_on_seed_and_epoch_only() -> None:
    images, labels = torch.arange(40.0).reshape(10, 1, 2, 2), torch.arange(10)

    def labels_of(seed: int, epoch: int) -> list[int]:
        loader = TensorLoader(images, labels, 3, train=True, shift=1, seed=seed)
        loader.set_epoch(epoch)
        torch.manual_seed(seed + epoch)  # must not matter
        return torch.cat([batch[1] for batch in loader]).tolist()

    assert labels_of(1, 2) == labels_of(1, 2)
    assert labels_of(1, 2) != labels_of(1, 3) != labels_of(2, 3)
    assert len(labels_of(1, 2)) == 9, "the incomplete batch is left out in training"
    plain = TensorLoader(images, labels, 3)
    assert torch.cat([batch[1] for batch in plain]).tolist() == list(range(10)) and len(plain) == 4


@pytest.mark.parametrize("shift", [1, 3])
def test_shift_moves_whole_images_and_fills_the_border(rng: torch.Generator, shift: int) -> None:
    images = torch.rand(32, 2, 5, 6, generator=rng) + 1
    moved = shifted(images, shift, -7.0, rng)
    assert moved.shape == images.shape
    for image, result in zip(images.numpy(), moved.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), constant_values=-7)
        windows = [
            padded[:, row : row + 5, column : column + 6]
            for row in range(2 * shift + 1)
            for column in range(2 * shift + 1)
        ]
        assert any(np.array_equal(result, window) for window in windows)
    assert len({tuple((moved[i] == -7).flatten().tolist()) for i in range(32)}) > 1, "every image moves by its own amount"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": 5}, "data.fold must lie in 0"),
        ({"image_size": 4}, "data.image_size must be at least 8"),
        ({"limit": 3}, "data.limit must be at least 10"),
        ({"name": "digitz"}, "unknown data.name 'digitz'"),
        ({"name": "imagefolder"}, "data.path is not set"),
        ({"name": "imagefolder:/nowhere/at/all"}, "/nowhere/at/all is not a folder"),
        ({"name": "torch/cifar10", "path": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"name": "torch/nonsense"}, "timm cannot open the data set 'torch/nonsense'"),
    ],
)
def test_impossible_data_are_refused(change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        create_data(replace(DataRecipe(), **change))


@pytest.fixture
def folder(tmp_path, rng):
    """Three classes of 12 px images, distinguishable by their grey level."""
    for split, count in (("train", 6), ("val", 3)):
        for index, name in enumerate(("ant", "bee", "cow")):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = torch.randint(80 * index, 80 * index + 60, (12, 12, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{image}.png")
    return tmp_path


def _folder_recipe(folder, **changes) -> DataRecipe:
    return replace(DataRecipe(name="imagefolder", path=str(folder), image_size=12, batch_size=4, workers=0), **changes)


def test_image_folder(folder) -> None:
    data = create_data(_folder_recipe(folder))
    assert (data.classes, data.in_chans, data.train_images, data.test_images) == (3, 3, 18, 9)
    images, labels = next(iter(data.test))
    assert images.shape == (9, 3, 12, 12) and labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    levels = images.mean((1, 2, 3))
    assert levels[labels == 0].max() < levels[labels == 1].min() < levels[labels == 2].min()
    assert len(data.train) == 4 and all(len(batch[1]) == 4 for batch in data.train)
    calibration = torch.cat([batch[1] for batch in data.calibration])
    assert sorted(calibration.tolist()) == [0] * 6 + [1] * 6 + [2] * 6
    assert len(set(calibration[:6].tolist())) > 1, "calibration reads the first batches: these must not be one class"


def test_image_folder_in_grey_and_limited(folder) -> None:
    data = create_data(_folder_recipe(folder, in_chans=1, limit=6))
    assert data.train_images == 6
    images, labels = next(iter(data.test))
    assert images.shape == (6, 1, 12, 12) and set(labels.tolist()) == {0, 1, 2}


def test_image_folder_batches_follow_the_global_generators(folder) -> None:
    from profit.train.checkpoint import seed_everything

    data = create_data(_folder_recipe(folder))

    def epoch() -> torch.Tensor:
        seed_everything(3)
        return torch.cat([batch[0] for batch in data.train])

    first = epoch()
    assert torch.equal(first, epoch())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(folder, workers: int) -> None:
    bad = folder / "train" / "bee" / "3.png"
    bad.write_bytes(b"no image")
    data = create_data(_folder_recipe(folder, workers=workers))
    with pytest.raises(DataError, match="cannot read the image .*train/bee/3.png") as caught:
        for _ in range(3):  # training leaves out the last incomplete batch, which may hold the bad image
            list(data.train)
    assert "\n" not in str(caught.value)


def test_image_folder_errors(folder) -> None:
    with pytest.raises(DataError, match="holds no folder 'test' .folders there: train, val."):
        create_data(_folder_recipe(folder, test_split="test"))
    with pytest.raises(DataError, match="given twice"):
        create_data(_folder_recipe(folder, name=f"imagefolder:{folder}"))
    (folder / "val" / "dog").mkdir()
    (folder / "val" / "ant" / "0.png").rename(folder / "val" / "dog" / "0.png")
    with pytest.raises(DataError, match="holds classes that the training images lack: dog"):
        create_data(_folder_recipe(folder))
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        create_data(_folder_recipe(folder, train_split="empty"))
