"""What stops a run is told before its first phase, by the dry run as well, and leaves no folder."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
import yaml

import profit.memory
from profit.cli import main
from profit.errors import RecipeError
from profit.train.network import Architecture
from profit.train.recipe_io import parse_recipe
from profit.train.trial import tried

from .tiny_run import VALUES

CASES = {
    "sampling": (["data.batch_size=64", "schedule.sample_epochs=1"], "phase w4.sample has 1 steps, and AIWQ needs at least 2"),
    "sampling seldom": (["aiwq.every=9"], "has 4 steps, and AIWQ needs at least 10 (aiwq.every=9)"),
    "stages": (["schedule.stages=17"], "schedule.stages=17, but digits_mobilenetv3 has 16 convolutions to freeze"),
    "million stages": (["schedule.stages=1000000"], "stages must be a whole number, within 1..1000"),
    "epochs": (["schedule.fp_epochs=1000000000"], "fp_epochs must be a whole number, within 0..1000000"),
    "fold": (["data.fold=7"], "data.fold must lie in 0..data.folds-1"),
    "folds": (["data.folds=5000"], "data.folds must be at most 174"),
    "image": (["data.image_size=4096"], "data.image_size=4096: the digits take"),
    "shift": (["data.shift=16"], "data.shift must be below data.image_size"),
    "init": (["model.init=/no/such.safetensors"], "there is no weight file"),
    "pretrained": (["model.pretrained=true"], "there are no pretrained weights for digits_mobilenetv3"),
    "teacher": (["teacher.source=/no/such"], "teacher.source: there is no file or folder /no/such"),
    "data set": (["data.name=my/images"], "my/images"),
    "head 0": (["model.args.head=0"], "model.args.head=0: the network cannot be used"),
    "head -1": (["model.args.head=-1"], "model.args.head=-1: the network cannot be used"),
    "head text": (["model.args.head=1e9"], "model.args.head='1e9': digits_mobilenetv3 takes a whole number"),
    "head large": (["model.args.head=1000000000"], "model.args.head=1000000000: the network cannot be used: out of memory"),
    "rate": (["schedule.lr=1e308"], "schedule.lr must be above 0 and at most 1e+30"),
    "nan": (["model.args.drop_rate=.nan"], "model.args.drop_rate must be a finite number, got nan"),
    "date": (["model.args.drop_rate=2020-01-01"], "model.args.drop_rate must be a number"),
    "half a letter": (['run.name="\\ud800"'], "is no text that a file could hold"),
    "tag": (["data.fold=!!map [1]"], "holds a value that cannot be read"),
}


@pytest.mark.parametrize("name", CASES)
def test_train_and_dry_run_say_the_same(name, tmp_path, capsys) -> None:
    changes, message = CASES[name]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALUES))
    settings = [part for change in changes for part in ("-s", change)]
    lines = []
    for options in ([], ["--dry-run"]):
        assert main(["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "-q", *options, *settings]) == 2
        lines.append(capsys.readouterr().err)
    assert lines[0] == lines[1] and lines[0].count("\n") == 1 and message in lines[0]
    assert not (tmp_path / "run").exists()


ARGUMENTS = {
    "a list of maps": ({"features_only": True}, "model.args.features_only=True"),
    "indices": ({"drop_rate": 0.1, "out_indices": [99]}, "model.args.out_indices="),
    "pooling": ({"global_pool": "bogus"}, "model.args.global_pool='bogus'"),
    "no pooling": ({"global_pool": ""}, "model.args.global_pool=''"),
    "activation": ({"act_layer": "bogus"}, "model.args.act_layer='bogus'"),
    "two": ({"act_layer": "bogus", "drop_rate": "x"}, "model.args."),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_argument_that_is_to_blame_is_named(name) -> None:
    args, message = ARGUMENTS[name]
    with pytest.raises(RecipeError, match="model.args") as caught:
        tried(Architecture("mobilenetv2_050", 10, 3, 32, args), False, "cpu")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_network_for_another_size_is_told_by_its_name() -> None:
    with pytest.raises(RecipeError, match="model.name: vit_tiny_patch16_224: .*doesn't match"):
        tried(Architecture("vit_tiny_patch16_224", 10, 3, 32, {}), False, "cpu")


def test_weights_are_counted_before_they_are_written(monkeypatch) -> None:
    monkeypatch.setattr(profit.memory, "available_bytes", lambda: 10**6)
    with pytest.raises(MemoryError, match="of weights"), profit.memory.bounded(2):
        torch.empty(150_000)  # 600,000 bytes
    with profit.memory.bounded(2):
        torch.empty(100_000)


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_memory_and_disk_that_do_not_suffice(option, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(VALUES))
    command = ["train", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "run"), "-q", *option]
    with monkeypatch.context() as patch:
        patch.setattr("profit.train.preflight.available_bytes", lambda: 10**5)
        assert main(command) == 2
        assert "data.batch_size=32 of 16 x 16 pixels needs more than" in capsys.readouterr().err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**4))
    assert main(command) == 2
    assert "the checkpoints of this run take 0.00 GB" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    command[3] = str(tmp_path / "file" / "run")
    assert main(command) == 2 and "cannot write the output folder" in capsys.readouterr().err


def test_numbers_that_only_look_harmless() -> None:
    values = {"data.batch_size": 10**12, "optim.clip_grad": 1e300, "schedule.weight_decay": 1e300, "run.timeout_s": 1e300,
              "schedule.lr": 10**400}  # fmt: skip
    for name, value in values.items():
        section, key = name.split(".")
        with pytest.raises(RecipeError, match=f"{section}.{key} "):
            parse_recipe({section: {key: value}})
