"""A checkpoint is the old one or the new one, whatever moment the process dies at; a full disk is one line."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from profit.errors import ProfitError
from profit.train import load_checkpoint, load_recipe, save_checkpoint, train
from profit.train.checkpoint import checkpoints, prune
from profit.train.runs import locked

from .tiny_run import VALUES, tiny_recipe

REPOSITORY = Path(__file__).resolve().parents[3]


class Died(BaseException):
    """Stands for SIGKILL: nothing catches it, and what `finally` cleans up is put back below."""


def _die_at(patch: pytest.MonkeyPatch, event: int) -> list[int]:
    """Die before or after the `event`-th fsync, rename or unlink; returns the counter."""
    count = [0]

    def watched(call):
        def replacement(*args, **kwargs):
            for moment in range(2):
                count[0] += 1
                if count[0] == event:
                    patch.undo()
                    patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # a killed process cleans up nothing
                    raise Died
                if moment == 0:
                    result = call(*args, **kwargs)
            return result

        return replacement

    for name in ("fsync", "replace", "unlink"):
        patch.setattr(os, name, watched(getattr(os, name)))
    return count


def test_overwriting_a_checkpoint_never_loses_both(tmp_path, rng, monkeypatch) -> None:
    states = [{"w": torch.randn(3, 4, generator=rng), "n": n} for n in range(3)]
    event, seen = 0, set()
    while True:
        event += 1
        folder = tmp_path / str(event)
        folder.mkdir()
        save_checkpoint(folder / "best", states[0])
        with monkeypatch.context() as patch:
            count = _die_at(patch, event)
            try:
                save_checkpoint(folder / "best", states[1])
            except Died:
                pass
            else:
                assert count[0] == event - 1
                break
        found = load_checkpoint(folder / "best")
        assert torch.equal(found["w"], states[found["n"]]["w"]) and found["n"] in (0, 1)
        seen.add(found["n"])
        if event % 2:  # a resumed run tidies, or writes without tidying first
            prune(folder, keep=2)
            assert load_checkpoint(folder / "best")["n"] == found["n"]
        save_checkpoint(folder / "best", states[2])
        assert load_checkpoint(folder / "best")["n"] == 2
        prune(folder, keep=2)
        assert sorted(path.name for path in folder.iterdir()) == ["best.json", "best.safetensors"]
    assert seen == {0, 1} and event > 12


def test_pruning_that_was_interrupted_leaves_only_whole_checkpoints(tmp_path, monkeypatch) -> None:
    for event in range(1, 10):
        folder = tmp_path / str(event)
        folder.mkdir()
        for n in range(4):
            save_checkpoint(folder / f"epoch-{n:05d}", {"n": n})
        with monkeypatch.context() as patch:
            _die_at(patch, event)
            try:
                prune(folder, keep=2)
            except Died:
                pass
        for path in folder.glob("*.json"):
            load_checkpoint(path)
        prune(folder, keep=2)
        assert sorted(path.stem for path in folder.glob("epoch*")) == ["epoch-00002"] * 2 + ["epoch-00003"] * 2


@pytest.fixture
def no_report(monkeypatch):
    """The report is not looked at here, and drawing it takes longer than training."""
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


@pytest.mark.usefixtures("no_report")
def test_how_many_are_kept_is_a_setting(tmp_path) -> None:
    short = ["schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]", "teacher.source=null"]
    train(tiny_recipe(*short, "schedule.fp_epochs=4", "run.keep_checkpoints=3", "run.weights=ema"), tmp_path / "r", quiet=True)
    kept = sorted(path.stem for path in (tmp_path / "r" / "checkpoints").glob("epoch-*.json"))
    assert kept == ["epoch-00002", "epoch-00003", "epoch-00004"]


def test_two_runs_do_not_share_a_folder(tmp_path) -> None:
    with locked(tmp_path / "run"), pytest.raises(ProfitError, match="is in use: another process trains in it"):
        train(tiny_recipe(), tmp_path / "run", quiet=True)
    with locked(tmp_path / "run"):
        pass  # free again


@pytest.mark.usefixtures("no_report")
def test_a_teacher_left_by_an_attempt_that_came_to_nothing_is_not_used(tmp_path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(VALUES))
    (folder / "teacher.safetensors").write_bytes(b"of other weights")
    short = ["schedule.fp_epochs=1", "schedule.train_epochs=1", "schedule.weight_bits=[]", "schedule.profit_bits=[]"]
    train(tiny_recipe(*short), folder, quiet=True)
    assert (folder / "teacher.safetensors").stat().st_size > 1000


@pytest.mark.parametrize("limit", [30_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_the_run_carries_on_after_it(tmp_path, monkeypatch, limit: int) -> None:
    """A limit on the size of files stands for the disk: some write fails half way, as it would there."""
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(VALUES))
    changes = "schedule.fp_epochs=1 schedule.act_bits=[] schedule.weight_bits=[] schedule.profit_bits=[]".split()
    command = [sys.executable, "-m", "profit", "train", str(recipe), "--out", str(folder), "-q"]
    command += [part for change in changes for part in ("-s", change)]

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    failed = subprocess.run(command, cwd=REPOSITORY, preexec_fn=small, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1, failed.stderr
    assert failed.stderr.startswith("error: ") and "File too large" in failed.stderr, failed.stderr
    assert not list(folder.rglob(".*.tmp"))
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)
    assert train(load_recipe(folder), folder, resume=True, quiet=True)["run"]["finished"]


def test_a_last_checkpoint_that_was_broken_off_is_put_in_its_place(tmp_path) -> None:
    """Killed after its .json, before its tensors got their name: the run has nothing left to train."""
    recipe = tiny_recipe()
    train(recipe, tmp_path / "run", quiet=True)
    folder = tmp_path / "run" / "checkpoints"
    expected = sorted(path.name for path in folder.iterdir())
    newest = checkpoints(folder)[-1].name
    (folder / f"{newest}.safetensors").rename(folder / f".{newest}.safetensors.new")
    (tmp_path / "run" / "model.safetensors").unlink()
    train(recipe, tmp_path / "run", resume=True, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == expected
