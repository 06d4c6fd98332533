"""The suite recompute, at toy size and in this process."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.harness import options, registry
from profit_kernels import native
from profit_kernels.ops.norm import cpp


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """No process of its own, whose operators could not be replaced."""
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")


@pytest.fixture
def needs_library():
    if not native.available():
        pytest.skip(native.why_missing())


def test_every_pointwise_layer_and_the_sums(tmp_path, capsys, needs_library):
    path = tmp_path / "recompute.json"
    assert main(["recompute", "--toy", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    layers = [layer for layer in registry.layers(options.TOY_MODEL, 32, 8) if layer.pointwise]
    assert len({row["case"] for row in content["rows"]}) == len(layers) > 10
    (sums,) = content["sums"].values()
    assert sums["layers"] == len(layers)
    for variant in ("anew", "write"):
        times = [row["median_s"] for row in content["rows"] if row["variant"] == variant]
        assert sums[f"{variant}_s"] == pytest.approx(sum(times)) and min(times) > 0
    assert f"{len(layers)} layers: anew " in capsys.readouterr().out


def test_a_wrong_result_gets_no_figure(tmp_path, capsys, monkeypatch, needs_library):
    path, right = tmp_path / "recompute.json", cpp.quantized_input
    monkeypatch.setattr(cpp, "quantized_input", lambda *args: 1.01 * right(*args))
    name = next(layer.name for layer in registry.layers(options.TOY_MODEL, 32, 8) if layer.pointwise)
    assert main(["recompute", "--toy", "--json", str(path), "--filter", name]) == 1
    content = json.loads(path.read_text())
    assert [row["status"] for row in content["rows"]] == ["failed"] and "sums" not in content
    assert "failed: wrong result" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "leave --device cuda out"),
        (["--variants", "kept"], "'kept' is not one of anew, write"),
        (["--toy", "--filter", "nothing of that name"], "nothing to measure"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, message, needs_library):
    assert main(["recompute", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_without_the_library_it_says_why(capsys, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_missing", lambda: "it was not built")
    assert main(["recompute", "--toy"]) == 2
    assert "it was not built" in capsys.readouterr().err
