"""The suites ops, step and aiwq at toy size, from the command line."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main


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
