"""Checkpoints: complete, checked, replaced in one step, and nothing pickled."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from profit.errors import CheckpointError, ProfitError
from profit.files import write_atomic
from profit.report.results import check_measured
from profit.train import load_checkpoint, save_checkpoint
from profit.train.checkpoint import checkpoints, prune


def _state(rng: torch.Generator) -> dict:
    shared = torch.randn(4, 6, generator=rng)
    return {
        "model": {"w": shared, "view": shared.t(), "flag": torch.tensor(True), "half": shared.bfloat16()},
        "optimizer": {"state": {0: {"momentum": torch.randn(3, generator=rng)}, 7: {}}, "groups": [{"lr": 0.1, "n": None}]},
        "empty": {}, "text": "ä", "nan": float("nan"), "third": 1 / 3, "list": [1, [2.5, True]],
    }  # fmt: skip


def _equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_a_state_comes_back_exactly(tmp_path, rng) -> None:
    state = _state(rng)
    save_checkpoint(tmp_path / "c", state)
    for name in ("c", "c.json", "c.safetensors"):
        assert _equal(load_checkpoint(tmp_path / name), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "c.safetensors"]


def test_damage_is_noticed(tmp_path, rng) -> None:
    save_checkpoint(tmp_path / "c", _state(rng))
    for name in ("c.safetensors", "c.json"):
        path = tmp_path / name
        good = path.read_bytes()
        bad = bytearray(good)
        bad[-20] ^= 1
        for content, message in ((bytes(bad), "damaged"), (good[: len(good) // 2], "damaged"), (None, "no checkpoint")):
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(tmp_path / "c")
        path.write_bytes(good)
    (tmp_path / "d.json").write_text(json.dumps({"format": "other"}))
    (tmp_path / "d.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a checkpoint of this program"):
        load_checkpoint(tmp_path / "d")


def test_a_pickle_is_not_opened(tmp_path) -> None:
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "c.safetensors").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "c.json").write_bytes(pickle.dumps(Trap()))
    from profit.train.network import read_weights

    for path in (tmp_path / "c.safetensors", tmp_path / "c.pt"):
        with pytest.raises(CheckpointError):
            read_weights(path)
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ProfitError, match="cannot write .*No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in (("pipe", "no regular file"), (".", "a folder"), ("/dev/full", "no regular file")):
        with pytest.raises(ProfitError, match=f"cannot write .*: it is {what}"):
            write_atomic(tmp_path / path, "text")
    target = tmp_path / "target"
    target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "new"


def test_prune_keeps_the_newest_and_the_best(tmp_path) -> None:
    for name in ("epoch-00002", "epoch-00010", "epoch-00009", "best"):
        save_checkpoint(tmp_path / name, {"x": 1})
    (tmp_path / ".epoch-00011.json.tmp").write_text("half")
    (tmp_path / "epoch-00011.safetensors").write_text("its json was never written")
    prune(tmp_path, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch-00009", "epoch-00010"]
    assert (tmp_path / "best.json").exists() and not list(tmp_path.glob(".*"))
    assert not (tmp_path / "epoch-00002.safetensors").exists()


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("best", {"best W4A4": "many"}), ("best", {"best W4A4": None}), ("frozen_stage", {"conv": "a"}),
        ("history", [{"accuracy": "x"}]), ("history", [None]), ("phases", [{"name": "fp"}]),
        ("best", {"best W4A4": float("nan")}), ("history", [{"accuracy": float("inf"), "train_loss": 1.0, "test_loss": 1.0}]),
        ("aiwq", {"scores": {"conv": "x"}}), ("aiwq", {"scores": {"conv": None}}),
    ],
)  # fmt: skip
def test_measurements_of_another_type_are_told_by_their_place(section, value) -> None:
    """A checkpoint may be crafted, with a checksum that fits."""
    measured = {"phases": [], "history": [], "aiwq": None, "best": {"best W4A4": 50.0}, "frozen_stage": {"conv": 1}}
    check_measured(measured)
    with pytest.raises(ValueError, match=section):
        check_measured({**measured, section: value})
