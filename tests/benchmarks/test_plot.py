"""The suite plot: a CSV and pictures of the JSON of a suite."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks.__main__ import main
from benchmarks.harness.rows import SKIPPED, Report
from benchmarks.harness.timing import Spread
from benchmarks.plot import suite as plot


def some_rows(path, suite: str) -> None:
    report = Report(suite, "cpu", {}, path)
    for case in ("a case of a name that is so long that it has to be broken into two lines somewhere", "b", "c"):
        report.add(case, "auto", "forward+backward", Spread(2e-3, 1e-3, 3e-3, 1e-3), floor_s=1e-3, kept_bytes=5, peak_bytes=9)
        report.add(case, "auto", "backward", Spread(9.0, 9.0, 9.0, 9.0))
        report.add(case, "brevitas", "forward+backward", status=SKIPPED, note="not installed")
        report.add(case, "copy", "copy", Spread(1e-3, 1e-3, 1e-3, 1e-3))
    report.save()


@pytest.mark.parametrize("suite", ["ops", "memory"])
def test_a_picture_and_a_csv_of_every_row(tmp_path, capsys, monkeypatch, suite):
    monkeypatch.setattr(plot, "PER_PICTURE", 2)
    path = tmp_path / "found.json"
    some_rows(path, suite)
    assert main(["plot", str(path)]) == 0
    content = json.loads(path.read_text())
    with (tmp_path / "found.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["case"] for row in rows] == [row["case"] for row in content["rows"]]
    assert float(rows[0]["median_s"]) == content["rows"][0]["median_s"] and rows[2]["median_s"] == ""
    shown = plot.panels(content)
    assert len(shown) == 3 * (2 if suite == "memory" else 1)
    assert [row.variant for row in shown[0].rows] == ["auto", "brevitas"], "no copy, no backward alone"
    pages = -(-len(shown) // plot.PER_PICTURE)
    assert len(list(tmp_path.glob("found*.png"))) == pages > 1
    assert "found-2.png" in capsys.readouterr().out
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))


def test_what_cannot_be_plotted_is_one_line(tmp_path, capsys, monkeypatch):
    wrong = tmp_path / "wrong.json"
    for text, message in [("{", "cannot be read"), ('{"suite": "zoo"}', "not the JSON of one of the suites"),
                          ('{"suite": "ops", "rows": [{"tea": 1}]}', "unknown column 'tea'"),
                          ('{"suite": "ops", "rows": []}', "has no 'device'")]:  # fmt: skip
        wrong.write_text(text)
        assert main(["plot", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["plot", str(tmp_path / "absent.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert main(["plot"]) == 2
    assert "nothing to plot" in capsys.readouterr().err
