"""The Figure 6 benchmark: its files, and what it must show whatever the data."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("matplotlib", reason="the plot needs the [train] extra")

from benchmarks.figure6 import suite as figure6


def test_files_and_order_of_the_quantizers(tmp_path, capsys, rng):
    plot, numbers = tmp_path / "docs" / "figure6.png", tmp_path / "results" / "figure6.json"
    seed = int(torch.randint(10**6, (1,), generator=rng))
    arguments = ["--plot", str(plot), "--json", str(numbers), "--samples", "3000", "--steps", "5", "--seed", str(seed)]
    assert figure6.main(arguments) == 0
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = json.loads(numbers.read_text())
    assert result["settings"]["seed"] == seed and result["versions"]["torch"]
    rows = {(r["quantizer"], r["bits"], r["std"]): r for r in result["rows"]}
    assert len(rows) == 5 * 3 * 3
    for (name, bits, std), row in rows.items():
        assert row["values_used"] <= 2**bits
        if name in ("pact", "qil"):
            assert row["values_below_zero"] == 0
        if std <= 2.0:  # the negative part is much of such data
            least = {n: rows[n, bits, std]["mse"] for n in ("pact", "lsq", "lsq+", "duq")}
            assert max(least["lsq+"], least["duq"]) < least["lsq"]
            if bits == 4:
                assert max(least["lsq+"], least["duq"]) < 0.5 * least["pact"]
    assert "SQNR dB" in capsys.readouterr().out


def test_only_known_options():
    with pytest.raises(SystemExit):
        figure6.main(["--bits", "4"])
