"""No file of a data folder is run, and none leads out of the folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tarfile

import pytest

from profit.data import create_data, timm_data
from profit.errors import DataError
from profit.train.recipe import DataRecipe


class Harm:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def stream(folder, **changes) -> DataRecipe:
    values = {"name": "wds/x", "path": str(folder), "workers": 1, "classes": 2, "image_size": 8, "test_split": "train"}
    return DataRecipe(**{**values, **changes})


def described(folder, **changes):
    """A data folder with two shards and the description of one split, changed."""
    folder.mkdir(exist_ok=True)
    for name in ("a.tar", "b.tar"):
        tarfile.open(folder / name, "w").close()
    split = {"name": "train", "num_samples": 4, "filenames": ["a.tar", "b.tar"], "shard_lengths": [2, 2], **changes}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return folder


SHARDS = [
    "pipe:touch CANARY;", "PIPE:touch CANARY;", "http://127.0.0.1:9/x.tar", "gs://b/x.tar", "hf://datasets/x",
    "file:/etc/passwd", "/etc/passwd", "../a.tar", "x/../../a.tar", "a.tar::pipe:touch CANARY", "pipe:cat|sh", "-", "~/a.tar",
    "a\n.tar", "\ud800.tar",
]  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_a_folder_names(name, tmp_path, monkeypatch, alarm):
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    folder = described(tmp_path / "data", filenames=["a.tar", name])
    with pytest.raises(DataError, match="the shard .* is no plain name of a file in the data folder"):
        create_data(stream(folder))
    assert not (tmp_path / "CANARY").exists() and not alarm


@pytest.mark.parametrize(
    "change",
    [
        {"filenames": "pipe:"}, {"filenames": [1]}, {"num_samples": "4"}, {"num_samples": -1}, {"num_samples": True},
        {"shard_lengths": 3}, {"shard_lengths": ["2"]}, {"name": 3}, {"alt_label": []},
    ],
)  # fmt: skip
def test_descriptions_of_wrong_types(change, tmp_path, alarm):
    with pytest.raises(DataError, match="_info.json, split 'train': "):
        create_data(stream(described(tmp_path, **change)))


def test_descriptions_that_are_none(tmp_path, alarm):
    for text, message in (("[]", "mapping of splits"), ('{"splits": 3}', "mapping of splits"), ("{", "not JSON"),
                          ("[" * 100_000, "not JSON"), ('{"splits": {"train": 1}}', "a mapping must describe it")):  # fmt: skip
        (tmp_path / "_info.json").write_text(text)
        with pytest.raises(DataError, match=message):
            create_data(stream(tmp_path))


def test_pipes_and_devices_in_a_folder_are_not_waited_for(tmp_path, alarm):
    pytest.importorskip("webdataset")
    folder = described(tmp_path / "data", filenames=["a.tar", "fifo.tar"])
    os.mkfifo(folder / "fifo.tar")
    with pytest.raises(DataError, match="fifo.tar is no regular file"):
        create_data(stream(folder))
    (folder / "_info.json").unlink()
    os.mkfifo(folder / "_info.json")
    with pytest.raises(DataError, match="_info.json is no regular file"):
        create_data(stream(folder))
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero"):
        for name in ("wds/x", "torch/mnist", "imagefolder"):
            with pytest.raises(DataError, match="is not a folder"):
                create_data(stream(path, name=name))


def test_splits_of_names_stay_in_the_folder(tmp_path, monkeypatch, alarm):
    pytest.importorskip("webdataset")
    folder = described(tmp_path / "data")
    assert create_data(stream(folder, train_split="{a,b}.tar|4", test_split="{a,b}.tar|4")).test_images == 4
    with pytest.raises(DataError, match="the shard '../a.tar' is no plain name"):
        create_data(stream(folder, train_split="{b,..}/a.tar|4"))
    with pytest.raises(DataError, match="lacks 1 of the 2 shards"):
        create_data(stream(folder, train_split="{a,c}.tar|4"))


def test_an_address_behind_the_folder_is_a_file_for_the_stream_library(tmp_path, monkeypatch):
    """The second wall: even where a name was overlooked, webdataset is given absolute paths, which it opens as files."""
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    described(tmp_path / "data", filenames=["pipe:touch CANARY;"], shard_lengths=[4])
    for check in ("check_info", "check_shards"):
        monkeypatch.setattr(timm_data, check, lambda *args: None)
    data = create_data(stream("data"))  # a relative path
    list(data.test)
    assert not (tmp_path / "CANARY").exists()


def test_pickles_of_torchvision_are_opened_where_their_checksum_is_the_published_one(tmp_path, alarm):
    """CIFAR's files are pickles."""
    mark = tmp_path / "executed"
    for folder, names in (("cifar-10-batches-py", [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]),
                          ("cifar-100-python", ["train", "test", "meta"])):  # fmt: skip
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_bytes(pickle.dumps(Harm(mark)))
    for name in ("torch/cifar10", "torch/cifar100"):
        with pytest.raises(DataError, match="not found or corrupted"):
            create_data(DataRecipe(name=name, path=str(tmp_path), image_size=32))
    assert not mark.exists() and not alarm


def test_old_files_of_torchvision_hold_tensors_alone(tmp_path, alarm):
    """What MNIST once kept in training.pt is read by torch's restricted unpickler."""
    mark = tmp_path / "executed"
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (tmp_path / "MNIST" / "processed" / name).write_bytes(pickle.dumps(Harm(mark), protocol=2))
    with pytest.raises(DataError, match="timm cannot open the data set 'torch/mnist'"):
        create_data(DataRecipe(name="torch/mnist", path=str(tmp_path), in_chans=1))
    assert not mark.exists() and not alarm


def test_entries_of_a_tar_file_are_images_and_labels_alone(tmp_path, rng):
    """Endings for which webdataset's own decoders unpickle, or call torch, are left alone."""
    pytest.importorskip("webdataset")
    import io

    from PIL import Image

    folder, mark = described(tmp_path / "data", filenames=["a.tar"], shard_lengths=[2], num_samples=2), tmp_path / "executed"
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    harm = pickle.dumps(Harm(mark))
    with tarfile.open(folder / "a.tar", "w") as tar:
        for sample in ("0", "1"):
            for ending, content in (("png", picture.getvalue()), ("cls", b"1"), ("pyd", harm), ("pickle", harm), ("pth", harm),
                                    ("npy", harm), ("json", b'{"a": 1}')):  # fmt: skip
                member = tarfile.TarInfo(f"{sample}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    data = create_data(stream(folder, eval_batch_size=2))
    assert [labels.tolist() for _, labels in data.test] == [[1, 1]]
    assert not mark.exists()
    shutil.rmtree(folder)
