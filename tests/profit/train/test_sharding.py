"""Which images each process sees: the same per step whatever the number of processes, all of them, and none twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from profit.data import DataBundle, TensorLoader, create_data
from profit.errors import RecipeError
from profit.train import parse_recipe
from profit.train.sharding import epoch_seed, shard

LAYOUTS = [(1, 1), (1, 4), (2, 2), (4, 1)]  # processes, micro-batches of each


def _tensors(count: int) -> DataBundle:
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1)
    labels = torch.arange(count)
    train, fixed = TensorLoader(images, labels, 8, train=True, seed=3), TensorLoader(images, labels, 5)
    return DataBundle("numbers", train, fixed, TensorLoader(images, labels, 4), 10, 1, 1, count, count)


def _folder(root: Path, count: int) -> DataBundle:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count // 2):
                value = 2 * index + (name == "b")
                Image.new("RGB", (8, 8), (value, value, value)).save(root / split / name / f"{value:03}.png")
    values = {"name": "imagefolder", "path": str(root), "image_size": 8, "batch_size": 8, "eval_batch_size": 5, "workers": 0,
              "mean": [0.0] * 3, "std": [1 / 255] * 3, "hflip": 0.0}  # fmt: skip
    return create_data(parse_recipe({"data": values}).data)


@pytest.fixture(params=["tensors", "image folder"])
def data(request, tmp_path):
    """A function that gives a bundle whose images hold their own number."""
    return (lambda count: _tensors(count)) if request.param == "tensors" else (lambda count: _folder(tmp_path, count))


def _numbers(loader) -> list[list[int]]:
    return [[round(float(image.mean())) for image in images] for images, _ in loader]


def _parts(bundle: DataBundle, world: int, accumulate: int) -> list[DataBundle]:
    return [shard(bundle, batch_size=8, accumulate=accumulate, rank=r, world=world, seed=3) for r in range(world)]


def test_a_step_sees_the_same_images_for_every_layout(data) -> None:
    found = {}
    for epoch in (0, 1):
        for world, accumulate in LAYOUTS:
            steps: dict[int, list[list[int]]] = {}
            for part in _parts(data(30), world, accumulate):
                part.train.set_epoch(epoch)
                batches = _numbers(part.train)
                assert len(batches) == len(part.train) == 3 * accumulate, "30 images are three whole batches of 8"
                for index, batch in enumerate(batches):
                    steps.setdefault(index // accumulate, []).append(batch)
            found[epoch, world, accumulate] = steps
    for epoch in (0, 1):
        reference = found[epoch, 1, 4]
        assert sorted(len({*sum(step, [])}) for step in reference.values()) == [8, 8, 8]
        for world, accumulate in LAYOUTS[2:]:
            same = {step: sorted(map(tuple, parts)) for step, parts in found[epoch, world, accumulate].items()}
            assert same == {step: sorted(map(tuple, parts)) for step, parts in reference.items()}, (world, accumulate)
        whole = {step: sorted(sum(parts, [])) for step, parts in found[epoch, 1, 1].items()}
        assert whole == {step: sorted(sum(parts, [])) for step, parts in reference.items()}
    assert found[0, 1, 1] != found[1, 1, 1], "another order in every epoch"


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_test_and_calibration_images_are_dealt_and_none_is_lost(data, world: int) -> None:
    parts = [shard(data(24), batch_size=8 * world, accumulate=1, rank=r, world=world, seed=0) for r in range(world)]
    for name in ("test", "calibration"):
        loaders = [getattr(part, name) for part in parts]
        seen = [number for loader in loaders for batch in _numbers(loader) for number in batch]
        assert sorted(seen) == list(range(24))
        assert [len(loader) for loader in loaders] == [len(_numbers(loader)) for loader in loaders]


def test_a_batch_that_cannot_be_cut_is_refused(data) -> None:
    with pytest.raises(RecipeError, match="data.batch_size=8 cannot be cut into equal parts for 3 processes"):
        shard(data(24), batch_size=8, accumulate=1, rank=0, world=3, seed=0)
    small = shard(_tensors(6), batch_size=8, accumulate=4, rank=0, world=1, seed=0)
    with pytest.raises(RecipeError, match="a batch of 6 images .all there are. cannot be cut into 4 equal parts"):
        list(small.train)


def test_seeds_of_epochs_and_processes_differ() -> None:
    seeds = {epoch_seed(s, e, r) for s in range(3) for e in range(50) for r in range(8)}
    assert len(seeds) == 3 * 50 * 8
