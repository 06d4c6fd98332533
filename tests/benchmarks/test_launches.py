"""The suite launches."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks.__main__ import main
from benchmarks.launches import suite as launches


def test_launches_are_counted_by_phase(monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "launches.json"
    assert main(["launches", "--toy", "--json", str(path)]) == 0
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["float-eager", "reference-eager", "triton"]
    # MobileNetV2: 52 convolutions; every weight is quantized, and every input but the image.
    assert rows["float-eager"]["by_name"]["forward"]["torch"]["convolution"] == 52
    assert rows["float-eager"]["total"] < rows["triton"]["total"] < rows["reference-eager"]["total"]
    assert rows["float-eager"]["triton"] == rows["reference-eager"]["triton"] == 0
    assert rows["triton"]["by_name"]["forward"]["triton"] and rows["triton"]["by_name"]["backward"]["triton"]
    assert "mobilenetv2_050" in capsys.readouterr().out


def test_a_view_is_no_launch_and_a_border_is_two():
    counts = launches.Counts(phase="forward")
    with launches._Counting(counts):
        x = torch.empty(2, 3, 4, 4)
        F.pad(x.transpose(2, 3)[1:], (1, 1, 1, 1), value=-0.375).view(-1).add_(1)
    assert dict(counts.torch["forward"]) == {"constant_pad_nd": 2, "add_": 1}
    assert counts.totals() == {"forward": 3, "backward": 0, "optimizer": 0}
