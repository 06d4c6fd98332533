"""An interrupted run, carried on, ends with the very bits of a run that was never interrupted."""

from __future__ import annotations

import json

import pytest

import profit.train.trainer as trainer
from profit.train import train

from .tiny_run import tiny_recipe

# fp 1-3 | a4: bn 4, train 5-6, bn2 7 | w5: bn 8, train 9-10, bn2 11 | w4: bn 12, sample 13-14, stages 15-20, final 21
EPOCHS = 21


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run from start to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_recipe(), folder, quiet=True)
    return folder


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Raise KeyboardInterrupt when the epoch after `epochs` epochs has been trained but not yet been kept."""
    original, count = trainer.train_epoch, []

    def interrupted(*args, **kwargs):
        stats = original(*args, **kwargs)
        count.append(1)
        if len(count) > epochs:
            raise KeyboardInterrupt
        return stats

    monkeypatch.setattr(trainer, "train_epoch", interrupted)


def _figures(folder) -> list:
    """Everything measured except times."""
    results = json.loads((folder / "results.json").read_text())
    phases = [{k: v for k, v in phase.items() if k not in ("wall_s", "images_per_s")} for phase in results["phases"]]
    return [phases, results["layers"], results["aiwq"], results["weights"], results["final"]]


@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param((2,), id="full precision"),
        pytest.param((3,), id="before calibration"),
        pytest.param((5, 11), id="training, then before a phase"),
        pytest.param((13,), id="inside AIWQ sampling"),
        pytest.param((14,), id="after sampling"),
        pytest.param((17, 19), id="inside stage 1, then stage 2"),
        pytest.param((21,), id="before the final files"),
    ],
)
def test_resumed_weights_are_bit_identical(whole, tmp_path, monkeypatch, epochs: tuple[int, ...]) -> None:
    folder, done = tmp_path / "run", 0
    for target in epochs:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if target < EPOCHS:
                _interrupt_after(patch, target - done)
            else:

                def interrupted(*args):
                    raise KeyboardInterrupt

                patch.setattr(trainer.Trainer, "_finish", interrupted)
            train(tiny_recipe(), folder, resume=done > 0, quiet=True)
        done = target
        assert not (folder / "model.safetensors").exists()
        newest = sorted((folder / "checkpoints").glob("epoch-*.json"))[-1]
        assert newest.stem == f"epoch-{target:05d}"
    train(tiny_recipe(), folder, resume=True, quiet=True)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("best", "best_ema", f"epoch-{EPOCHS:05d}"):
        tensors = [run / "checkpoints" / f"{name}.safetensors" for run in (folder, whole)]
        assert tensors[0].read_bytes() == tensors[1].read_bytes(), name
    assert _figures(folder) == _figures(whole)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(whole, tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _interrupt_after(patch, 5)
        train(tiny_recipe(), folder, quiet=True)
    newest = folder / "checkpoints" / "epoch-00005.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    train(tiny_recipe(), folder, resume=True, quiet=True)
    output = capsys.readouterr().out
    assert "epoch-00005.safetensors is damaged" in output and "going back to the checkpoint before it" in output
    assert "from epoch 5," in output
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
