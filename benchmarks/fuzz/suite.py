"""Damage the files of a run, one at a time, call the commands on them, and count how they end.

Every case is a process of its own with a time limit, forked from this one where everything is imported already; some are real
`python -m profit` processes. What is wanted: the same result, one line and a non-zero status, or another result that is told.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from ..harness.place import ROOT
from . import mutations

LIMIT_S = 60.0
BAD = ("TRACEBACK", "HANG", "SILENT DIFFERENCE")
VALUES: dict[str, Any] = {
    "model": {"args": {"width": 0.34, "head": 16}},
    "data": {"limit": 64, "batch_size": 32},
    "calibration": {"batches": 1},
    "schedule": {
        "fp_epochs": 1, "act_bits": [4], "weight_bits": [4], "profit_bits": [4], "bn_epochs": 1, "train_epochs": 1,
        "sample_epochs": 1, "stages": 2, "stage_epochs": 1, "final_bn_epochs": 1,
    },
    "teacher": {"source": "self"},
    "run": {"name": "fuzzed", "device": "cpu", "threads": 1, "tensorboard": False},
}  # fmt: skip
Damage = Callable[[bytes, Random], tuple[bytes, str]]


def _yaml(data: bytes, random: Random) -> tuple[bytes, str]:
    import yaml

    if random.random() < 0.35:
        return mutations.damaged_bytes(data, random)
    tree, what = mutations.damaged_values(yaml.safe_load(data), random)
    try:
        text = yaml.safe_dump(tree, allow_unicode=False)
    except RecursionError:  # YAML's writer gives up earlier than JSON's, which is YAML too
        text = json.dumps(tree)
    return text.encode("utf-8", "surrogatepass"), what


def _json(data: bytes, random: Random) -> tuple[bytes, str]:
    if random.random() < 0.35:
        return mutations.damaged_bytes(data, random)
    tree, what = mutations.damaged_values(json.loads(data), random)
    return json.dumps(tree).encode(), what


@dataclass(frozen=True)
class Target:
    """A file (relative to the folder of a case), its damages, the command, and whether another result is told by itself.

    `told`: the output shows the file's own content (a plan, a page, a test on other images). Otherwise another result
    without a word is a silent difference.
    """

    name: str
    file: str
    damage: Damage
    command: tuple[str, ...]
    told: bool
    share: int = 1


_EVALUATE = ("evaluate", "run", "--json")
_VERIFY = ("--against", "run", "--images", "16", "--json")
_LAST, _NEWEST, _RESUME = "run/checkpoints/last", (*_EVALUATE, "--checkpoint", "last"), ("train", "begun", "--resume", "-q")
_PLAN = ("train", "recipe.yaml", "--dry-run", "--images", "64", "--throughput", "9")
TARGETS = (
    Target("recipe", "recipe.yaml", _yaml, _PLAN, True, 3),
    Target("recipe of a run", "run/recipe.yaml", _yaml, _EVALUATE, True),
    Target("results, report", "run/results.json", _json, ("report", "run"), True, 2),
    Target("results, resumed", "run/results.json", _json, ("train", "run", "--resume", "-q"), True, 2),
    Target("weights", "run/model.safetensors", mutations.damaged_safetensors, _EVALUATE, False, 2),
    Target("teacher", "begun/teacher.safetensors", mutations.damaged_safetensors, _RESUME, False),
    Target("checkpoint, .json", f"{_LAST}.json", _json, _NEWEST, False),
    Target("checkpoint, tensors", f"{_LAST}.safetensors", mutations.damaged_safetensors, _NEWEST, False),
    Target("checkpoint, crafted", "begun/checkpoints/last.json", mutations.damaged_checkpoint, _RESUME, True, 2),
    Target("packed", "net.safetensors", mutations.damaged_safetensors, ("verify", "net.safetensors", *_VERIFY), False, 2),
    Target("ONNX", "net.onnx", mutations.damaged_onnx, ("verify", "net.onnx", *_VERIFY), True, 2),
    Target("image", "images/val/3/1.png", mutations.damaged_bytes, (*_EVALUATE, "--data", "images", "-s", "data.in_chans=1",
           "-s", "data.workers=0"), True),
)  # fmt: skip


def make_base(folder: Path) -> None:
    """The files to damage: a finished run, one that is half done, two exports, images."""
    import yaml
    from PIL import Image

    import profit.report
    from profit.cli import main
    from profit.train import parse_recipe, trainer

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(VALUES))
    draw, epoch, count = profit.report.write_report, trainer.train_epoch, [0]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > len(parse_recipe(VALUES).schedule) - 2:
            raise KeyboardInterrupt
        return epoch(*args, **kwargs)

    def run(*command: str) -> int:
        return main([str(folder / part) if "/" in part or part in ("run", "begun") else part for part in command])

    try:
        profit.report.write_report = lambda run_dir: run_dir
        done = [run("train", "./recipe.yaml", "--out", "run", "-q")]
        trainer.train_epoch = interrupted
        done.append(run("train", "./recipe.yaml", "--out", "begun", "-q") - 130)
    finally:
        profit.report.write_report, trainer.train_epoch = draw, epoch
    done.append(run("export", "run", "--format", "packed", "--out", "./net.safetensors"))
    done.append(run("export", "run", "--format", "onnx", "--out", "./net.onnx"))
    if any(done):
        raise SystemExit(f"error: the files to damage could not be made (status {done})")
    for split in ("train", "val"):
        for label in range(10):
            (folder / "images" / split / str(label)).mkdir(parents=True)
            for index in range(2):
                pixels = Random(label + 10 * index).randbytes(64)
                Image.frombytes("L", (8, 8), pixels).save(folder / "images" / split / str(label) / f"{index}.png")


def place(target: Target, case: Path) -> Path:
    """The file of a target in the folder of a case; `last` stands for the newest checkpoint."""
    path = case / target.file
    if path.stem != "last":
        return path
    newest = max(path.parent.glob("epoch-*.json"))
    return newest if path.suffix == ".json" else newest.with_suffix(".safetensors")


def start(case: Path, command: Sequence[str], real: bool) -> int:
    """Start the command in the folder of a case, its output in files there; returns the process id."""
    with open(case / "stdout", "wb") as out, open(case / "stderr", "wb") as err:
        if real:
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(
                [sys.executable, "-m", "profit", *command], cwd=case, stdout=out, stderr=err, env=environment
            ).pid
        process = os.fork()
        if process:
            return process
        code = 99
        try:
            os.chdir(case)
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", errors="backslashreplace") for number in (1, 2))
            import profit.report
            from profit.cli import main

            if command[0] == "train":  # drawing takes longer than training
                profit.report.write_report = lambda run_dir: run_dir
            code = main(list(command))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def outcome(target: Target, case: Path, status: int | None, expected: str) -> str:
    """How a case ended; `status` None: it did not, in time. `expected`: the output on the undamaged files."""
    if status is None:
        return "HANG"
    out, err = ((case / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
    lines = [line for line in err.splitlines() if line.strip()]
    if status == 2:
        return "refused in one line" if len(lines) == 1 and lines[0].startswith("error: ") else "TRACEBACK"
    if status == 1 and target.command[0] == "verify" and not lines:
        return "different, and told"
    if status or lines:
        return "TRACEBACK"
    if result(target, case, out) == expected:
        return "the same"
    return "different, and told" if target.told or "warning:" in out else "SILENT DIFFERENCE"


def result(target: Target, case: Path, out: str) -> str:
    """What a command gave, without what differs from run to run."""
    if target.command[0] == "train" and "--dry-run" not in target.command:
        weights = case / target.command[1] / "model.safetensors"
        return weights.read_bytes().hex() if weights.exists() else ""
    return out


def _wait(process: int, limit: float) -> int | None:
    """Exit status (negative: the signal), None where the process was ended for being too slow."""
    until, pause = time.monotonic() + limit, 0.002
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause)
        pause = min(2 * pause, 0.1)
    os.kill(process, 9)
    os.waitpid(process, 0)
    return None


def one_case(base: Path, case: Path, target: Target, random: Random | None, real: bool, expected: str) -> dict[str, Any]:
    """Damage the target's file (None: leave it), call its command and judge."""
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(base, case)
    what = "nothing"
    if random is not None:
        path = place(target, case)
        damaged, what = target.damage(path.read_bytes(), random)
        path.write_bytes(damaged)
    status = _wait(start(case, target.command, real), LIMIT_S)
    ended = outcome(target, case, status, expected)
    line = (case / "stderr").read_text(encoding="utf-8", errors="replace").strip()
    return {"target": target.name, "damage": what, "outcome": ended, "status": status, "line": line[-300:]}


def campaign(work: Path, cases: int, seed: int, real_every: int = 50, only: int | None = None) -> dict[str, Any]:
    """Run the cases; case number `i` is a function of `seed` and `i` alone."""
    make_base(work / "base")
    slots = [target for target in TARGETS for _ in range(target.share)]
    expected: dict[str, str] = {}
    for target in TARGETS:
        row = one_case(work / "base", work / "case", target, None, False, "")
        if row["status"]:
            raise SystemExit(f"error: {target.name}: the undamaged files end with status {row['status']}: {row['line']}")
        expected[target.name] = result(target, work / "case", (work / "case" / "stdout").read_text())
    rows = []
    for number in range(cases) if only is None else [only]:
        target = slots[number % len(slots)]
        real = bool(real_every) and number % real_every == real_every - 1
        row = one_case(work / "base", work / "case", target, Random(f"{seed}/{number}"), real, expected[target.name])
        rows.append({"case": number, "real_process": real, **row})
        if row["outcome"] in BAD or only is not None:
            told = f"{target.name}, {row['damage']} [{row['status']}] {row['line']}"
            print(f"case {number}: {row['outcome']}: {told}", flush=True)
    counts = {target.name: dict(Counter(row["outcome"] for row in rows if row["target"] == target.name)) for target in TARGETS}
    return {
        "cases": len(rows),
        "real_processes": sum(row["real_process"] for row in rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "by_target": counts,
        "bad": [row for row in rows if row["outcome"] in BAD],
    }


def preload() -> None:
    """Everything that a command imports, once, before the forks."""
    import matplotlib.pyplot  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import timm  # noqa: F401
    import torch

    import profit.export.command  # noqa: F401
    import profit.report.html  # noqa: F401
    import profit.train.dry_run  # noqa: F401
    import profit.train.evaluation  # noqa: F401

    torch.set_num_threads(1)


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit status: 1 where a case ended in a traceback, a hang or a silent difference."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1200, help="how many (default 1200)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    parser.add_argument("--only", type=int, help="this case alone, and tell how it ends")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/fuzz.json", help="the result file")
    options = parser.parse_args(argv)
    preload()
    from profit.environment import git_commit, versions
    from profit.files import write_atomic


    commit = git_commit()
    with tempfile.TemporaryDirectory() as work:
        found = campaign(Path(work), options.cases, options.seed, only=options.only)
    content = {
        "suite": "fuzz", "created": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": commit,
        "versions": versions(), "seed": options.seed, "limit_s": LIMIT_S, **found,
    }  # fmt: skip
    if options.only is None:
        write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    print(f"{found['cases']} cases: " + ", ".join(f"{count} {name}" for name, count in sorted(found["outcomes"].items())))
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
