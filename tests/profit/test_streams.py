"""Data sets that are read as a stream: webdataset's tar files, through timm."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace

import pytest
import torch
from PIL import Image

from profit.data import create_data
from profit.errors import DataError
from profit.train import train
from profit.train.recipe import DataRecipe
from profit.train.sharding import epoch_seed, shard

from .train.tiny_run import interrupt_after, tiny_recipe

pytest.importorskip("webdataset")
SHARDS, EACH, CLASSES = 4, 8, 2
TINY = ("data.name=wds/toy", "data.workers=1", "data.image_size=8", "data.limit=null", "data.batch_size=8", "data.classes=2",
        "data.train_split=train", "data.test_split=test", "data.shift=0", "teacher.source=null",
        "schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]")  # fmt: skip


@pytest.fixture
def folder(tmp_path, rng):
    """Shards of images whose grey tells the class, and the _info.json that timm reads."""
    splits = {}
    for split, shards in (("train", SHARDS), ("test", 2)):
        names = [f"toy-{split}-{shard:04d}.tar" for shard in range(shards)]
        for name in names:
            with tarfile.open(tmp_path / name, "w") as tar:
                for image in range(EACH):
                    label = image % CLASSES
                    pixels = torch.randint(0, 60, (10, 10, 3), generator=rng, dtype=torch.uint8) + 150 * label
                    file = io.BytesIO()
                    Image.fromarray(pixels.numpy()).save(file, "PNG")
                    for ending, data in (("png", file.getvalue()), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{name[:-4]}{image:04d}.{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        splits[split] = {
            "name": split, "num_samples": shards * EACH, "filenames": names, "shard_lengths": [EACH] * shards
        }  # fmt: skip
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    return tmp_path


def recipe_of(folder, **changes) -> DataRecipe:
    recipe = DataRecipe(name="wds/toy", path=str(folder), image_size=8, batch_size=8, workers=1, test_split="test", classes=2)
    return replace(recipe, **changes)


def batches(folder, epoch):
    data = shard(create_data(recipe_of(folder)), batch_size=8, accumulate=2, rank=0, world=1, seed=0)
    torch.manual_seed(epoch_seed(0, epoch, 0))
    data.train.set_epoch(epoch)
    found = list(data.train)
    assert len(found) == len(data.train) == SHARDS * EACH // 4 and all(len(images) == 4 for images, _ in found)
    return torch.cat([images for images, _ in found])


def test_the_order_is_a_function_of_the_epoch(folder):
    assert torch.equal(batches(folder, 3), batches(folder, 3))
    assert not torch.equal(batches(folder, 3), batches(folder, 4))


def test_all_test_images_are_seen_and_calibration_has_a_fixed_order(folder):
    data = create_data(recipe_of(folder))
    assert (data.train_images, data.test_images, data.classes) == (SHARDS * EACH, 2 * EACH, 2)
    assert sum(len(images) for images, _ in data.test) == 2 * EACH
    first, again = (torch.cat([images for images, _ in data.calibration]) for _ in range(2))
    assert len(first) == SHARDS * EACH and torch.equal(first, again)


def test_a_run_on_a_stream_is_resumed_bit_for_bit(folder, tmp_path, monkeypatch):
    recipe = tiny_recipe(*TINY, f"data.path={folder}")
    whole = train(recipe, tmp_path / "whole", quiet=True)
    assert whole["final"]["accuracy"] >= 0

    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "parts", quiet=True)
    parts = train(recipe, tmp_path / "parts", resume=True, quiet=True)
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (tmp_path / "parts/model.safetensors").read_bytes()
    assert [row["train_loss"] for row in whole["phases"]] == [row["train_loss"] for row in parts["phases"]]


def test_what_a_stream_cannot_do_is_refused(folder):
    with pytest.raises(DataError, match="wds/toy is read as a stream, which needs data.workers to be at least 1"):
        create_data(recipe_of(folder, workers=0))
    with pytest.raises(DataError, match="a stream, which data.limit=5 cannot pick from"):
        create_data(recipe_of(folder, limit=5))
    with pytest.raises(DataError, match="timm decides what wds/toy does with unreadable images"):
        create_data(recipe_of(folder, on_error="skip"))
    with pytest.raises(DataError, match="split 'nothing': split nothing not found"):
        create_data(recipe_of(folder, train_split="nothing"))
    with pytest.raises(DataError, match="does not tell its number of classes: set data.classes"):
        create_data(recipe_of(folder, classes=None))
    (folder / "toy-train-0002.tar").unlink()
    with pytest.raises(DataError, match="lacks 1 of the 4 shards of split 'train', the first is toy-train-0002.tar"):
        create_data(recipe_of(folder))
