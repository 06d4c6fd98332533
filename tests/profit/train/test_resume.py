"""An interrupted run, carried on, ends with the very bits of a run that was never interrupted."""

from __future__ import annotations

import json

import pytest

import profit.train.trainer as trainer
from profit.train import train

from .tiny_run import interrupt_after, tiny_recipe

# fp 1-2 | a4: bn 3, train 4, bn2 5 | w4: bn 6, sample 7-8, stages 9-10, 11-12, 13-14, final 15
EPOCHS = 15
# dropout draws from torch's global generator, whose state must be carried on too
CHANGES = ("model.args.drop_rate=0.2", "schedule.fp_epochs=2", "schedule.train_epochs=1", "schedule.weight_bits=[4]")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is not looked at here, and drawing it takes longer than training."""
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run from start to end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_recipe(*CHANGES), folder, quiet=True)
    return folder


def _figures(folder) -> list:
    """Everything measured except times."""
    results = json.loads((folder / "results.json").read_text())
    phases = [{k: v for k, v in phase.items() if k not in ("wall_s", "images_per_s")} for phase in results["phases"]]
    return [phases, results["layers"], results["aiwq"], results["weights"], results["final"]]


@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param((1,), id="full precision"),
        pytest.param((2,), id="before calibration"),
        pytest.param((4, 6), id="before a BN phase, then before sampling"),
        pytest.param((7,), id="inside AIWQ sampling"),
        pytest.param((8,), id="after sampling"),
        pytest.param((11, 13), id="inside stage 1, then stage 2"),
        pytest.param((15,), id="before the final files"),
    ],
)
def test_resumed_weights_are_bit_identical(whole, tmp_path, monkeypatch, epochs: tuple[int, ...]) -> None:
    folder, done = tmp_path / "run", 0
    for target in epochs:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            if target < EPOCHS:
                interrupt_after(patch, target - done)
            else:

                def interrupted(*args):
                    raise KeyboardInterrupt

                patch.setattr(trainer.Trainer, "_finish", interrupted)
            train(tiny_recipe(*CHANGES), folder, resume=done > 0, quiet=True)
        done = target
        assert not (folder / "model.safetensors").exists()
        newest = sorted((folder / "checkpoints").glob("epoch-*.json"))[-1]
        assert newest.stem == f"epoch-{target:05d}"
    train(tiny_recipe(*CHANGES), folder, resume=True, quiet=True)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for name in ("best", "best_ema", f"epoch-{EPOCHS:05d}"):
        tensors = [run / "checkpoints" / f"{name}.safetensors" for run in (folder, whole)]
        assert tensors[0].read_bytes() == tensors[1].read_bytes(), name
    assert _figures(folder) == _figures(whole)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_used(whole, tmp_path, monkeypatch, capsys) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 8)
        train(tiny_recipe(*CHANGES), folder, quiet=True)
    newest = folder / "checkpoints" / "epoch-00008.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    train(tiny_recipe(*CHANGES), folder, resume=True, quiet=True)
    output = capsys.readouterr().out
    assert "epoch-00008.safetensors is damaged" in output and "going back to the checkpoint before it" in output
    assert "from epoch 8," in output
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
