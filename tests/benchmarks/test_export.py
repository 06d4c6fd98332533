"""The suite `export`, small."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.export import suite as export
from profit.train.trainer import train
from tests.profit.train.tiny_run import tiny_recipe

pytest.importorskip("onnxruntime")


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)
    for name, bits in (("digits_w4a4", 4), ("digits_w3a3", 3)):
        train(tiny_recipe(f"schedule.weight_bits=[{bits}]", f"schedule.profit_bits=[{bits}]"), tmp_path / name, quiet=True)
    small = ["--nets", "mobilenetv3_small_050", "--size", "48", "--images", "2", "--repeats", "2"]
    out = tmp_path / "export.json"
    assert main(["export", *small, "--work", str(tmp_path), "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert set(results["agreement"]) == {"digits", "mobilenetv3_small_050"}
    for rows in results["agreement"].values():
        assert list(rows) == list(export.CONFIGURATIONS)
        for row in rows.values():
            proof = row["codes"]["model in float64 / integer runtime"]
            assert proof["codes"] > 5 * 10**4 and proof["differing_outside"] == 0 and not row["failures"]
    size = results["sizes"]["mobilenetv3_small_050"]
    assert size["4"]["codes"] == pytest.approx(size["8"]["codes"] / 2, rel=1e-3)
    assert size["2"]["packed"] < size["3"]["packed"] < size["4"]["packed"] < size["8"]["packed"] < size["float32 state"]
    assert all(entry["ms"] > 0 for row in results["latency"].values() for entry in row.values())
    assert "| digits | W4A4 |" in capsys.readouterr().out
