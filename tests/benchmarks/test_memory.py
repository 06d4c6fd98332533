"""The suite memory, and how the peak of a call is found."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.harness import peak

needs_peak = pytest.mark.skipif(peak.why_no_peak("cpu") is not None, reason=peak.why_no_peak("cpu") or "")
MEGABYTE = 1 << 20

@needs_peak
def test_the_peak_is_what_a_call_needs_at_most():
    def call() -> torch.Tensor:
        first = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
        second = first + 1  # both alive: 128 MB
        del first
        return second

    call()  # what is freed and kept by the allocator must not hide the next call's need
    assert 126 * MEGABYTE <= peak.peak_bytes(call, "cpu") < 160 * MEGABYTE


@needs_peak
def test_gradients_count_as_part_of_the_step():
    weight = torch.zeros(32 * MEGABYTE // 4, requires_grad=True)

    def call() -> None:
        weight.grad = None
        weight.sum().backward()
        weight.grad.add_(1.0)  # an expanded scalar becomes memory only when it is written

    call()
    assert 31 * MEGABYTE <= peak.peak_bytes(call, "cpu", [weight]) < 96 * MEGABYTE


def test_where_the_peak_cannot_be_measured_it_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peak, "_STATUS", tmp_path / "status")
    assert "peak memory needs VmHWM" in peak.why_no_peak("cpu")
    (tmp_path / "status").write_text("Name: x\n")
    assert "no VmRSS" in peak.why_no_peak("cpu")
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")
    assert main(["memory", "--toy", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: peak memory needs")
    monkeypatch.setattr("sys.platform", "darwin")
    assert "this is darwin" in peak.why_no_peak("cpu")


@needs_peak
def test_memory_at_toy_size(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "memory.json"
    asked = ["auto", "float-eager"]
    assert main(["memory", "--toy", "--device", "cpu", "--json", str(path), "--variants", *asked]) == 0
    content = json.loads(path.read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert set(rows) == set(asked) and content["suite"] == "memory" and "mmap_max=0" in content["allocator"]
    assert all(row["peak_bytes"] > row["kept_bytes"] > 0 and row["median_s"] is None for row in rows.values())
    assert "peak MB" in capfd.readouterr().out
