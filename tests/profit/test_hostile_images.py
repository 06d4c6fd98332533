"""Image folders with everything wrong that people's folders have wrong: refused by name, or left out and counted."""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from profit.cli import main
from profit.data import create_data
from profit.data.folders import read_image
from profit.errors import DataError
from profit.train.recipe import DataRecipe

from .train.tiny_run import VALUES


@pytest.fixture
def folder(tmp_path, rng):
    """Two classes, six training and three test images each, 20 px."""
    for split, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(count):
                pixels = torch.randint(0, 255, (20, 20, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / name / f"{image}.png")
    return tmp_path


def recipe_of(folder, **changes) -> DataRecipe:
    return replace(DataRecipe(name="imagefolder", path=str(folder), image_size=8, batch_size=4, workers=0), **changes)


def pixels(rng, *shape):
    return torch.randint(0, 255, shape, generator=rng, dtype=torch.uint8).numpy()


def encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bomb():
    """A PNG of 40000 x 40000 pixels in 200 kB."""

    def chunk(tag, data):
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 5001)) + chunk(b"IEND", b"")


DAMAGED = {
    "truncated.jpg": lambda rng: encoded(Image.fromarray(pixels(rng, 64, 64, 3)), "JPEG")[:600],
    "truncated.png": lambda rng: encoded(Image.fromarray(pixels(rng, 64, 64, 3)), "PNG")[:3000],
    "empty.png": lambda rng: b"",
    "text.jpg": lambda rng: b"hello",
    "bomb.png": lambda rng: bomb(),
    "new\nline.png": lambda rng: b"x",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images(name, folder, rng):
    path = folder / "train" / "bee" / name
    path.write_bytes(DAMAGED[name](rng))
    with pytest.raises(DataError, match="cannot read the image .*train/bee/.*data.on_error=skip") as caught:
        list(create_data(recipe_of(folder)).calibration)
    assert "\n" not in str(caught.value)
    data = create_data(recipe_of(folder, on_error="skip"))
    labels = torch.cat([batch[1] for batch in data.calibration])
    assert sorted(labels.tolist()) == [0] * 6 + [1] * 6 and data.unreadable() == [str(path)]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipping_in_training_and_in_worker_processes(workers, folder):
    (folder / "train" / "ant" / "1.png").write_bytes(b"x")
    (folder / "val" / "bee" / "1.png").unlink()
    (folder / "val" / "bee" / "1.png").symlink_to("/nowhere/at/all.png")
    data = create_data(recipe_of(folder, on_error="skip", workers=workers))
    assert sorted(len(images) for images, _ in data.train) == [3, 4, 4] and len(list(data.test)[0][0]) == 5
    assert [os.path.relpath(file, folder) for file in data.unreadable()] == ["train/ant/1.png", "val/bee/1.png"]


def test_a_batch_of_nothing_but_unreadable_images_is_refused(folder):
    for file in (folder / "train").glob("*/*.png"):
        file.write_bytes(b"x")
    with pytest.raises(DataError, match="none of the 4 images of a batch can be read.*train/.*png"):
        list(create_data(recipe_of(folder, on_error="skip")).train)


def test_what_unusual_images_become(tmp_path, rng):
    """By hand: 16 bits are scaled, not clipped; CMYK, palettes, transparency and the first frame are converted."""
    grey16 = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(grey16).save(tmp_path / "16.png")
    assert np.asarray(read_image(str(tmp_path / "16.png"), "L")).tolist() == [[0, 0, 1, 128, 255]]
    Image.fromarray(np.full((4, 4, 4), 255, dtype=np.uint8), mode="CMYK").save(tmp_path / "cmyk.tif")
    assert np.asarray(read_image(str(tmp_path / "cmyk.tif"), "RGB")).max() == 0  # full ink is black
    first, second = (Image.fromarray(np.full((4, 4, 3), grey, dtype=np.uint8)) for grey in (10, 200))
    first.save(tmp_path / "animated.png", save_all=True, append_images=[second])
    assert np.asarray(read_image(str(tmp_path / "animated.png"), "L")).tolist() == [[10] * 4] * 4
    first.quantize(2).save(tmp_path / "palette.png", transparency=b"\0\1")
    assert np.asarray(read_image(str(tmp_path / "palette.png"), "RGB")).max() == 10
    Image.fromarray(pixels(rng, 4, 4, 4)).save(tmp_path / "alpha.webp")
    assert read_image(str(tmp_path / "alpha.webp"), "RGB").mode == "RGB"
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="float.tif: it holds floating-point numbers; convert it to 8 bits"):
        read_image(str(tmp_path / "float.tif"), "RGB")


def flat(folder):
    (folder / "train" / "ant" / "0.png").rename(folder / "train" / "loose.png")


def one_class(folder):
    for split in ("train", "val"):
        (folder / split / "bee").rename(folder / f"away_{split}")


STRUCTURES = {
    "empty class": (lambda folder: (folder / "train" / "cow").mkdir(), "train/cow holds no image: add some, or remove"),
    "one class": (one_class, "train holds one class only .ant."),
    "no class": (flat, "train/loose.png is in no class.*one folder per class"),
    "loop": (lambda folder: (folder / "train" / "bee" / "loop").symlink_to(folder / "train"), "link to a folder that cont"),
    "pipe": (lambda folder: os.mkfifo(folder / "train" / "bee" / "p.png"), "p.png is no file but a pipe"),
    "unknown class": (lambda folder: (folder / "val" / "bee").rename(folder / "val" / "cow"), "classes that the training.*cow"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_folders_that_are_refused(name, folder):
    spoil, message = STRUCTURES[name]
    spoil(folder)
    for on_error in ("refuse", "skip"):
        with pytest.raises(DataError, match=message):
            create_data(recipe_of(folder, on_error=on_error))


def test_a_number_of_classes_that_is_not_the_folders(folder):
    with pytest.raises(DataError, match="data.classes is 7 but .*train holds 2 class folders"):
        create_data(recipe_of(folder, classes=7))
    with pytest.raises(DataError, match="data.on_error=skip is for image folders"):
        create_data(DataRecipe(name="torch/cifar10", on_error="skip"))


def test_folders_that_are_fine(folder):
    """Linked classes and images, files of the system, folders inside a class, an empty class in the test split."""
    (folder / "train" / "bee").rename(folder / "elsewhere")
    (folder / "train" / "bee").symlink_to(folder / "elsewhere")
    (folder / "train" / "ant" / "link.png").symlink_to(folder / "train" / "ant" / "0.png")
    for name in ("._0.png", "Thumbs.db", "readme.txt"):
        (folder / "train" / "ant" / name).write_bytes(b"x")
    (folder / "train" / "ant" / "deep").mkdir()
    (folder / "train" / "ant" / "1.png").rename(folder / "train" / "ant" / "deep" / "1.png")
    (folder / "val" / "cow").mkdir()
    data = create_data(recipe_of(folder))
    assert (data.classes, data.train_images, data.test_images) == (2, 13, 6)
    assert sorted(torch.cat([batch[1] for batch in data.calibration]).tolist()) == [0] * 7 + [1] * 6


def test_the_run_counts_what_was_left_out(folder, tmp_path, capsys, monkeypatch):
    import json

    import yaml

    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)
    (folder / "val" / "ant" / "0.png").write_bytes(b"x")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALUES))
    settings = [f"data.path={folder}", "data.name=imagefolder", "data.batch_size=4", "data.workers=0", "data.limit=null",
                "data.on_error=skip", "schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]",
                "teacher.source=null"]  # fmt: skip
    arguments = [part for setting in settings for part in ("-s", setting)]
    assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "-q", *arguments]) == 0
    assert capsys.readouterr().out.count("val/ant/0.png', which cannot be read (1 so far)") == 1
    assert json.loads((tmp_path / "run" / "results.json").read_text())["data"]["unreadable"] == 1
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert "on 5 test images" in (text := capsys.readouterr().out) and "(1 unreadable left out)" in text
