"""2 and 4 processes against 1 on the CPU: the same recipe, the same images per step, compared epoch by epoch.

BatchNorm is synchronised (`run.sync_bn`), so every number of processes computes the same function; what differs is the
order of sums. In float32 the last bit now and then moves a value across the edge of a 4-bit code, and training amplifies
that as it does any change: two equally valid runs drift apart. So the whole recipe is compared in float64, where such an
event is too rare to be seen, and in float32 beside a control: two single processes that differ in the memory format of the
images alone, hence in the order of sums.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..harness.place import RESULTS, ROOT

CHANGES = (
    "data.limit=256", "data.batch_size=32", "data.eval_batch_size=32", "data.shift=1", "calibration.batches=4",
    "schedule.fp_epochs=4", "schedule.fp_lr=0.02", "schedule.lr=0.03", "schedule.act_bits=[4]", "schedule.weight_bits=[5,4]",
    "schedule.interval_lr_mult=0.01", "optim.clip_grad=1.0", "run.sync_bn=true", "run.timeout_s=300",
    "run.tensorboard=false", "schedule.sample_epochs=2",
)  # fmt: skip
# Not 8 bits for the weights: their interval starts at max|w| there, so the largest weight lies on the clipping edge, and
# whether it counts as inside is a matter of the last bit in any precision. At 5 bits and below it starts at 0.9 max|w|.
KINDS = ("float64", "float32")
CONTROL = "float32, 1 process, channels_last"


class AsDouble:
    """A loader whose images are float64."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.set_epoch = loader.set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return ((images.double(), labels) for images, labels in self.loader)


def work(folder: Path, kind: str, changes: Sequence[str]) -> None:
    """One process of a run."""
    from profit.train import load_recipe
    from profit.train.processes import process_group
    from profit.train.runs import threads
    from profit.train.trainer import Trainer

    recipe = load_recipe(ROOT / "recipes" / "smoke.yaml", changes)
    with threads(1), process_group(recipe.run.timeout_s):
        trainer = Trainer(recipe, folder, resume=False, quiet=True)
        if kind == "float64":
            trainer.model.double()
            data = trainer.data
            loaders = {name: AsDouble(getattr(data, name)) for name in ("train", "test", "calibration")}
            trainer.data = replace(data, **loaders)
        trainer.run()


def start(processes: int, folder: Path, kind: str, changes: Sequence[str]) -> dict[str, Any]:
    """Run `processes` of them and return what results.json holds."""
    arguments = ["benchmarks", "processes", "--worker", str(folder), "--kind", kind]
    arguments += [part for change in changes for part in ("-s", change)]
    launcher = ["-m"] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m"]
    if not (folder / "model.safetensors").is_file():
        subprocess.run(
            [sys.executable, *launcher, *arguments], cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return json.loads((folder / "results.json").read_text())


def ranking(results: dict[str, Any]) -> list[str]:
    """Layer names, most unstable first, as the freezer orders them."""
    scores = results["aiwq"]["scores"]
    return sorted(scores, key=lambda name: (-scores[name], name))


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Figures of one run against those of the single process; relative differences."""
    epochs = [
        (f"{phase['name']} {row['epoch']}", row, theirs)
        for phase, twin in zip(one["phases"], other["phases"], strict=True)
        for row, theirs in zip(phase["history"], twin["history"], strict=True)
    ]
    losses = {name: abs(a["train_loss"] - b["train_loss"]) / a["train_loss"] for name, a, b in epochs}
    scores, theirs = one["aiwq"]["scores"], other["aiwq"]["scores"]
    return {
        "same_ranking": ranking(one) == ranking(other),
        "same_frozen_sets": all(
            a["frozen_layers"] == b["frozen_layers"] for a, b in zip(one["phases"], other["phases"], strict=True)
        ),
        "stages": {p["name"]: p["frozen"] for p in one["phases"] if "stage" in p["name"]},
        "train_loss_first_epoch": next(iter(losses.values())),
        "train_loss_full_precision": max(value for name, value in losses.items() if name.startswith("fp ")),
        "train_loss_worst": max(losses.values()),
        "train_loss": losses,
        "test_accuracy_worst_points": max(abs(a["accuracy"] - b["accuracy"]) for _, a, b in epochs),
        "score_worst": max(abs(scores[name] - theirs[name]) for name in scores) / max(scores.values()),
    }


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit status: 1 where, in float64, a ranking or a frozen set differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks processes", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/processes"), help="where the run folders go")
    parser.add_argument("--out", type=Path, default=RESULTS / "processes.json", help="the result file")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="default 2 4")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("-s", "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change the recipe")
    options = parser.parse_args(argv)
    if options.worker:
        work(options.worker, options.kind, options.set)
        return 0
    from profit.environment import git_commit, processor, versions
    from profit.files import write_atomic

    found: dict[str, Any] = {}
    commit = git_commit()
    changes, work_dir = [*CHANGES, *options.set], options.work.resolve()
    one = {kind: start(1, work_dir / f"{kind}-1", kind, changes) for kind in KINDS}
    others = {f"{kind}, {n} processes": (kind, n, changes) for kind in KINDS for n in options.processes}
    others[CONTROL] = ("float32", 1, [*changes, "run.channels_last=true"])
    for name, (kind, count, settings) in others.items():
        row = compare(one[kind], start(count, work_dir / name.replace(", ", "-").replace(" ", "-"), kind, settings))
        found[name] = row
        print(
            f"{name} against 1: ranking {'same' if row['same_ranking'] else 'differs'}, frozen sets "
            f"{'same' if row['same_frozen_sets'] else 'differ'} {row['stages']}; training loss, relative: first epoch "
            f"{row['train_loss_first_epoch']:.1e}, full precision {row['train_loss_full_precision']:.1e}, worst epoch "
            f"{row['train_loss_worst']:.1e}; AIWQ scores, of the largest, {row['score_worst']:.1e}",
            flush=True,
        )
    content = {
        "suite": "processes", "created": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": commit,
        "versions": versions(), "processor": processor(), "changes": [*CHANGES, *options.set], "comparisons": found,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    exact = [row for name, row in found.items() if name.startswith("float64")]
    return 0 if all(row["same_ranking"] and row["same_frozen_sets"] for row in exact) else 1
