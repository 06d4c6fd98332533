"""The suites of the benchmarks from the command line: what they refuse, and that they run at toy size."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import launches
from benchmarks.__main__ import main

# Command lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--model", "mobilenetv9"], "'mobilenetv9'"),
        (["memory", "--model", "mobilenetv9"], "'mobilenetv9'"),
        (["step", "--variants", "fast"], "'fast' is not one of auto"),
        (["ops", "--device", "cuda"], "torch finds no CUDA GPU"),
        (["ops", "--toy", "--filter", "nothing of that name", "--group", "weights"], "nothing to measure"),
        (["aiwq", "--variants", "fast"], "'fast' is not one of"),
        (["launches", "--variants", "cpp"], "'cpp' is not one of"),
        (["gpu", "--only", "tea", "--device", "cpu"], "no stage 'tea'"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, arguments, message):
    if torch.cuda.is_available() and "cuda" in arguments:
        pytest.skip("there is a GPU")
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")  # in this process
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--batch", "-1"], ["--size", "x"], ["--dtype", "int4"]])
def test_wrong_values_exit_with_2(monkeypatch, capsys, arguments):
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")
    with pytest.raises(SystemExit) as stop:
        main(["step", *arguments])
    assert stop.value.code == 2 and "error: argument" in capsys.readouterr().err


# The suites at toy size


@pytest.fixture
def compiled_triton(monkeypatch):
    """The processes of the suites without Triton's interpreter, which would be timed as a backend of the CPU."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def variants(path, suite) -> dict[str, set[str]]:
    content = json.loads(path.read_text())
    assert content["suite"] == suite and "mmap_max=0" in content["allocator"]
    found: dict[str, set[str]] = {}
    for row in content["rows"]:
        found.setdefault(row["case"], set()).add(row["variant"])
        assert row["status"] == "ok", row
    return found


def test_ops_at_toy_size(tmp_path, capfd, compiled_triton):
    path = tmp_path / "ops.json"
    assert main(["ops", "--toy", "--json", str(path), "--device", "cpu"]) == 0
    found = variants(path, "ops")
    assert {case.split()[0] for case in found} == {"duq", "weights", "depthwise", "block"}
    assert all({"auto", "reference-eager", "copy"} <= names for names in found.values())
    assert "torch-learnable" in next(names for case, names in found.items() if case.startswith("duq hardswish"))
    assert "allocator: GLIBC_TUNABLES" in capfd.readouterr().out


def test_step_at_toy_size(tmp_path, capfd, compiled_triton):
    path = tmp_path / "step.json"
    asked = ["auto", "reference-eager", "float-eager"]
    assert main(["step", "--toy", "--device", "cpu", "--json", str(path), "--variants", *asked]) == 0
    (names,) = variants(path, "step").values()
    assert names == set(asked)
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert rows["reference-eager"]["kept_bytes"] > rows["float-eager"]["kept_bytes"] > 0


def test_aiwq_at_toy_size(tmp_path, capfd, compiled_triton):
    path = tmp_path / "aiwq.json"
    asked = ["auto", "auto-aiwq", "conv-kl"]
    assert main(["aiwq", "--toy", "--device", "cpu", "--json", str(path), "--variants", *asked]) == 0
    found = variants(path, "aiwq")
    assert {"auto", "auto-aiwq"} in found.values()
    assert {"auto", "conv-kl", "copy"} in found.values()


# Launches


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
