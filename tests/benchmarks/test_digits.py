"""The suite digits: its statistics, and one small study."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.digits import suite as digits


def test_interval_against_scipy(rng) -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    values = torch.randn(5, generator=rng).tolist()
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    found = digits.interval(values)
    assert found["mean"] - found["half_width"] == pytest.approx(low)
    assert found["mean"] + found["half_width"] == pytest.approx(high)
    assert digits.interval([3.0]) == {"mean": 3.0, "half_width": 0.0}


def test_differences_are_paired_by_fold() -> None:
    found = {
        "full precision": [{"accuracy": 99.0}, {"accuracy": 97.0}],
        "W4A4 plain": [{"accuracy": 98.0, "epochs": 7}, {"accuracy": 96.0, "epochs": 7}],
        "W4A4 profit": [{"accuracy": 98.5, "epochs": 7}, {"accuracy": 96.5, "epochs": 7}],
    }
    summary = digits.summarise(found)
    assert summary["differences"]["W4A4 profit - W4A4 plain"] == {"mean": 0.5, "half_width": 0.0}
    assert summary["differences"]["W4A4 plain - full precision"] == {"mean": -1.0, "half_width": 0.0}
    table = digits.markdown(found, summary)
    assert "| W4A4 profit | 98.50 | 96.50 | **97.50** | 7 |" in table
    assert "| W4A4 profit - W4A4 plain | +0.50 | +0.50 .. +0.50 |" in table


NAMES = ["full precision", "full precision, continued", "W4A4 calibration", "W4A4 plain", "W4A4 profit"]


@pytest.mark.slow
def test_a_small_study_and_its_repetition(tmp_path, capsys) -> None:
    changes = ["data.limit=64", "schedule.train_epochs=1", "schedule.stage_epochs=1", "schedule.sample_epochs=2",
               "schedule.bn_epochs=1", "schedule.final_bn_epochs=1"]  # fmt: skip
    arguments = ["digits", "--folds", "2", "--bits", "4", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "r.json")]
    arguments += [part for change in changes for part in ("-s", change)]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "r.json").read_text())
    assert list(first["folds"]) == NAMES
    epochs = {first["folds"][name][0]["epochs"] for name in NAMES[1:2] + NAMES[3:]}
    assert len(epochs) == 1, "the same budget for all that is trained from the full-precision network"
    assert main(arguments) == 0
    second = json.loads((tmp_path / "r.json").read_text())
    assert second["folds"]["W4A4 profit"] == first["folds"]["W4A4 profit"]
    assert "| full precision |" in capsys.readouterr().out
    assert main([*arguments, "-s", "schedule.nonsense=1"]) == 2
    assert "unknown recipe key schedule.nonsense" in capsys.readouterr().err
