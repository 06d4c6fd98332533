"""Everything that is proven on a GPU, within a time limit: `make gpu`.

Stages: build in place, the GPU tests, compute-sanitizer on small shapes where it is installed, then the suites ops, step and
aiwq. Each stage has its share of the time; what one leaves over, the later ones have. A stage that fails or runs out of
time costs the others nothing, and the exit status says so. Needs a CUDA torch and pytest; no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..harness.place import RESULTS, ROOT

LIMIT_S = 540.0
# What the stages can do without, and what is lost.
OPTIONAL = {
    "timm": "networks in plain torch instead",
    "pytest": "no GPU tests",
    "setuptools": "no C++ kernels for the CPU",
    "triton": "no Triton kernels and no torch.compile on the GPU",
}
SUITES = ("ops", "step", "aiwq")


@dataclass(frozen=True)
class Stage:
    """A command with its share of the time. `skip`: why it cannot run here. `json`: what it leaves behind."""

    name: str
    command: tuple[str, ...]
    share: float
    skip: str | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Result:
    """What became of a stage: "ok", "failed", "out of time" or "skipped"."""

    name: str
    status: str
    seconds: float
    note: str = ""


def stages(out: Path, device: str, toy: bool) -> list[Stage]:
    """The plan."""
    python, has = sys.executable, importlib.util.find_spec
    no_pytest = None if has("pytest") else "pytest is not installed"
    no_build = None if has("setuptools") else "setuptools is not installed"
    gpu = device == "cuda"
    marked = ("-m", "gpu") if gpu else ()
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *marked)
    found = [
        Stage("build", (python, "setup.py", "-q", "build_ext", "--inplace"), 60, no_build),
        Stage("tests", (*tests, "tests/gpu"), 130, no_pytest),
    ]
    sanitizer = shutil.which("compute-sanitizer")
    no_sanitizer = no_pytest or (None if sanitizer else "compute-sanitizer is not installed")
    for tool in ("memcheck", "racecheck"):
        command = (sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        skip = no_sanitizer if gpu else "it needs a GPU"
        found.append(Stage(tool, (*command, *tests, "-x", "tests/gpu/test_small.py"), 40, skip))
    shared = ("--device", device, *(("--toy",) if toy else ()))
    specific = {
        "ops": ("--rounds", "3"),
        "step": ("--rounds", "3", "--dtype", "bf16"),
        "aiwq": ("--rounds", "3", "--dtype", "bf16", "--group", "step", "layers"),
    }
    for suite, share in zip(SUITES, (90, 110, 70), strict=True):
        target = out / f"{suite}.json"
        arguments = specific[suite] if gpu else ()
        command = (python, "-m", "benchmarks", suite, *shared, *arguments, "--json", str(target))
        found.append(Stage(suite, command, share, json=target))
    return found


def missing() -> str:
    """Which optional packages are not here and what that costs, in one line; empty if all are."""
    absent = [f"{name} ({loss})" for name, loss in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    return f"not installed: {'; '.join(absent)}" if absent else ""


def why_no_gpu() -> str | None:
    """Why there is nothing to run on, in one line; None with a CUDA torch and a GPU."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no torch; run with a python that has: make gpu PYTHON=/path/to/python3"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU here; nothing was run (`--device cpu --toy` tries the stages)"
    return None


def limits(plan: Sequence[Stage], left_s: float) -> float:
    """The seconds that the first stage of what is left to do may take: its share of the time left."""
    total = sum(stage.share for stage in plan if stage.skip is None)
    return left_s * plan[0].share / total if total else left_s


def run_stage(stage: Stage, limit_s: float, out: Path, say: Callable[[str], None] = print) -> Result:
    """Run one stage with its output in `<out>/<stage>.log`; everything it started is ended with it."""
    if stage.skip is not None:
        return Result(stage.name, "skipped", 0.0, stage.skip)
    command = list(stage.command)
    if stage.name in SUITES:
        command += ["--budget", f"{0.75 * limit_s:.0f}"]  # it ends by itself, with all it measured
    log, start = out / f"{stage.name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit_s)
            status, note = ("ok", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            status, note = "out of time", f"ended after {limit_s:.0f} s"
        finally:
            end_group(process)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if status != "ok":
        say("\n".join(f"  | {line}" for line in lines[-15:]))
    summary = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|skipped)", line)), "")
    if stage.name == "tests" and status == "ok" and "passed" not in summary:
        status, note = "failed", "no test passed"
    return Result(stage.name, status, time.monotonic() - start, "; ".join(filter(None, (note, summary))))


def end_group(process: subprocess.Popen) -> None:
    """Kill what is left of the session that `process` leads."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all of it has ended by itself
    process.wait()


def table(results: Sequence[Result]) -> str:
    """The stages and what became of them."""
    return "\n".join(f"{r.name:<10} {r.status:<12} {r.seconds:6.1f} s  {r.note}".rstrip() for r in results)


def suite_tables(plan: Sequence[Stage]) -> str:
    """The tables of the suites, from the files they left, whole or not."""
    from ..harness.rows import Row
    from ..harness.rows import table as rows_table

    parts = []
    for stage in plan:
        if stage.json is not None and stage.json.is_file():
            content = json.loads(stage.json.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in content["rows"]]
            parts.append(f"{stage.name}: {content['device']}, commit {content['commit']}\n{rows_table(rows)}")
    return "\n\n".join(parts)


def default_out(device: str) -> Path:
    """benchmarks/results/gpu-<name of the device>."""
    from ..harness.rows import device_name

    return RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}"


def main(argv: Sequence[str]) -> int:
    """Run the plan; 0 if no stage failed or ran out of time, 1 if one did, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for JSON and logs (default: $OUT, or benchmarks/results/gpu-<name>)")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="SECONDS", help="for all stages (default 540)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the stages without a GPU")
    parser.add_argument("--toy", action="store_true", help="tiny shapes")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and run nothing")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not given.dry_run:
        reason = why_no_gpu()
        if reason is not None:
            print(f"error: {reason}", file=sys.stderr)
            return 2
    named = given.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else None)
    out = named or (Path("<out>") if given.dry_run else default_out(given.device))
    plan = stages(out, given.device, given.toy)
    strange = set(given.only or ()) - {stage.name for stage in plan}
    if strange:
        known = ", ".join(stage.name for stage in plan)
        print(f"error: --only: there is no stage {min(strange)!r}; there are {known}", file=sys.stderr)
        return 2
    plan = [stage for stage in plan if not given.only or stage.name in given.only]
    print(missing() or "all optional packages are installed")
    start = time.monotonic()
    if given.dry_run:
        for i, stage in enumerate(plan):
            what = f"skipped: {stage.skip}" if stage.skip else " ".join(stage.command)
            print(f"{stage.name:<10} {0 if stage.skip else limits(plan[i:], given.limit * _rest(plan, i)):4.0f} s  {what}")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    results = []
    for i, stage in enumerate(plan):
        limit_s = limits(plan[i:], given.limit - (time.monotonic() - start))
        if stage.skip is None:
            print(f"{stage.name}: up to {limit_s:.0f} s", flush=True)
        results.append(run_stage(stage, limit_s, out))
    print(f"\n{suite_tables(plan)}\n\n{table(results)}\n\nin {out}")
    return 0 if all(result.status in ("ok", "skipped") for result in results) else 1


def _rest(plan: Sequence[Stage], i: int) -> float:
    """The part of the time that is left for stage i and later ones if each before took its share."""
    total = sum(stage.share for stage in plan if stage.skip is None)
    return sum(stage.share for stage in plan[i:] if stage.skip is None) / total if total else 0.0
