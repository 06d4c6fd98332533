"""`make gpu` as far as it goes without a GPU: the plan, the shares of time, stages that fail, hang or cannot run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import suite as gpu
from benchmarks.gpu.suite import Stage, limits, run_stage, stages

ROOT = Path(__file__).resolve().parents[2]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_the_plan_fits_the_time(capsys):
    plan = stages(Path("out"), "cuda", False)
    assert [stage.name for stage in plan] == ["build", "tests", "memcheck", "racecheck", "ops", "step", "aiwq"]
    assert sum(stage.share for stage in plan) <= gpu.LIMIT_S <= 540
    assert main(["gpu", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{stage.name} " in printed for stage in plan) and "-m gpu" in printed


def test_what_a_stage_leaves_over_goes_to_the_later_ones():
    plan = [Stage("a", (), 10), Stage("b", (), 30, skip="no"), Stage("c", (), 30)]
    assert limits(plan, 80) == 20
    assert limits(plan[2:], 75) == 75


def test_stages_fail_hang_and_are_skipped_alone(tmp_path, capsys):
    python = sys.executable
    good = run_stage(Stage("good", (python, "-c", "print('3 passed in 1s')"), 1), 60, tmp_path)
    assert (good.status, good.note) == ("ok", "3 passed in 1s")
    bad = run_stage(Stage("bad", (python, "-c", "print('it broke'); raise SystemExit(5)"), 1), 60, tmp_path)
    assert bad.status == "failed" and "exit status 5" in bad.note and "it broke" in capsys.readouterr().out
    skipped = run_stage(Stage("tool", ("no-such-tool",), 1, skip="it is not installed"), 60, tmp_path)
    assert (skipped.status, skipped.note) == ("skipped", "it is not installed")
    none = run_stage(Stage("tests", (python, "-c", "print('4 skipped in 1s')"), 1), 60, tmp_path)
    assert none.status == "failed" and "no test passed" in none.note


def test_a_stage_out_of_time_ends_with_all_it_started(tmp_path):
    grandchild = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    start = time.monotonic()
    late = run_stage(Stage("late", (sys.executable, "-c", grandchild), 1), 3, tmp_path)
    assert late.status == "out of time" and time.monotonic() - start < 20


def test_tables_come_from_what_a_stage_left(tmp_path):
    from benchmarks.harness.rows import Report
    from benchmarks.harness.timing import Spread

    report = Report("ops", "cpu", {}, tmp_path / "ops.json")
    report.add("a case", "auto", "forward", Spread(1e-3, 1e-3, 1e-3, 1e-3))
    report.save()
    plan = [Stage("ops", (), 1, json=tmp_path / "ops.json"), Stage("step", (), 1, json=tmp_path / "step.json")]
    printed = gpu.suite_tables(plan)
    assert "a case" in printed and "step" not in printed


@needs_no_gpu
def test_without_a_gpu_one_line_and_no_stage(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert main(["gpu"]) == 2
    error = capsys.readouterr().err
    assert "finds no CUDA GPU" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@needs_no_gpu
def test_make_gpu_says_so_too():
    done = subprocess.run(["make", "-s", "gpu", "VENV=", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.startswith("error: ")


def test_a_python_without_torch_is_told():
    code = "import sys; sys.modules['torch'] = None; from benchmarks.__main__ import main; sys.exit(main(['gpu']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "has no torch" in done.stderr and done.stderr.count("\n") == 1


BARE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
import importlib
for name in {modules!r}:
    importlib.import_module(name)
"""


def test_a_bare_machine_can_import_all_that_make_gpu_needs():
    """torch, numpy and pytest alone."""
    absent = ["timm", "torchvision", "hypothesis", "xdist", "rich", "jinja2", "scipy", "sklearn", "matplotlib", "typer",
              "yaml", "safetensors", "tensorboard", "PIL", "onnx"]  # fmt: skip
    modules = ["benchmarks.gpu.suite", "benchmarks.ops.suite", "benchmarks.step.suite", "benchmarks.aiwq.suite",
               "tests.gpu.bodies", "tests.gpu.test_on_gpu", "tests.gpu.test_small", "tests.profit.tiny_net"]  # fmt: skip
    code = BARE.format(absent=set(absent), modules=modules)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_all_stages_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which would be timed as a backend of the CPU
    code = main(["gpu", "--device", "cpu", "--toy", "--out", str(tmp_path), "--limit", "900"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    for suite in ("ops", "step", "aiwq"):
        assert json.loads((tmp_path / f"{suite}.json").read_text())["rows"]
    assert "memcheck   skipped" in printed
