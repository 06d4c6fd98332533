"""Every Triton kernel compiled for GPUs that are not here: the static bar (docs/kernels.md), and that no kernel is left out.

Compiling needs Triton without its interpreter, which is chosen at import: hence a process of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.static import compiled
from benchmarks.static import suite as static

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[3]


def compile_all(folder: Path, *only: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks", "static", "--jobs", "1", "--json", str(folder / "static.json"), *only]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert run.returncode in (0, 1), run.stderr[-2000:]
    return json.loads((folder / "static.json").read_text())["rows"]


@pytest.mark.parametrize("target", compiled.TARGETS)
@pytest.mark.parametrize("op", static.OPS)
def test_every_kernel_clears_the_bar(op, target, tmp_path):
    """In parts, so that the workers of the tests share the minutes that compiling takes."""
    rows = compile_all(tmp_path, "--op", op, "--target", target)
    assert len(rows) == len(cases(op, target))
    failed = [f"{r['kernel']} ({r['note']}), {r['dtype']}: {r['faults']}" for r in rows if r["faults"]]
    assert not failed, "\n".join(failed)
    for r in rows:
        if r["kernel"] in ("duq_forward", "duq_backward", "duq_codes"):
            assert r["exact_divisions"] > 0, r


def cases(op: str, target: str) -> list[compiled.StaticCase]:
    return import_module(f"benchmarks.static.cases.{op}").cases(target)


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_no_kernel_is_left_out(target):
    launched = set()
    for path in (ROOT / "profit_kernels" / "ops").glob("*/*launch*.py"):
        launched |= set(re.findall(r"\bkernels\w*\.(\w+)\[", path.read_text()))
    assert launched, "no launch was found: does the pattern still fit the launchers?"
    covered = {case.function.__name__ for op in static.OPS for case in cases(op, target)}
    assert launched <= covered, f"no static case for {sorted(launched - covered)}"


def test_the_committed_table_is_whole():
    """It is what a review compares registers with: every case of every target, none that misses the bar."""
    rows = json.loads(static.RESULT.read_text())["rows"]
    for op, target in itertools.product(static.OPS, compiled.TARGETS):
        found = [(r["kernel"], r["note"], r["dtype"]) for r in rows if (r["op"], r["target"]) == (op, target)]
        assert sorted(found) == sorted((c.kernel, c.note, c.dtype) for c in cases(op, target)), (
            f"{op}, {target}: python -m benchmarks static writes it anew"
        )
    assert not [r for r in rows if r["faults"]]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 8}, "8 register spills"),
        ({"narrow_accesses": 2}, "2 accesses below 128 bits"),
        ({"inexact_divisions": 1}, "1 divisions that do not round correctly"),
        ({"fma": 3}, "3 fused multiply-adds"),
    ],
)
def test_faults_are_named(change, fault):
    case = compiled.StaticCase("k", None, {}, {}, "fp32")
    good = {"spills": 0, "narrow_accesses": 0, "inexact_divisions": 0, "fma": 0}
    assert compiled.faults(case, good) == []
    assert compiled.faults(case, good | change) == [fault]


def test_a_jump_in_registers_is_printed():
    row = dict.fromkeys(static.KEY, "x") | {"registers": 40}
    assert static.changes([row | {"registers": 64}], [row]) == ["x (x), x, x: registers 40 -> 64"]
    assert static.changes([row], [row]) == []


def test_the_suite_refuses_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "static"], cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr


def test_the_bar_sees_kernels_that_break_it():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.benchmarks.static.bad_kernels"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for target in compiled.TARGETS:
        assert "fused multiply-adds" in found[f"fused_multiply_add {target}"][0]
        assert "below 128 bits" in found[f"narrow_access {target}"][0]
    for target in ("sm_80", "sm_90"):  # on AMD Triton's plain division rounds correctly too
        assert "do not round correctly" in found[f"approximate_division {target}"][0]
