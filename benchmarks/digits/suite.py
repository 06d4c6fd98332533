"""Accuracy on scikit-learn's digits in five folds, every variant with the same budget of epochs.

Per fold, one full-precision network is trained; from it start calibration alone, and quantized training at 4, 3 and 2
bits, each with PROFIT (BN phases, AIWQ sampling, freezing stages) and without (the same epochs as plain training), and as a
yardstick for the budget the full-precision network itself trained on for as many epochs as at 4 bits. Every image is
tested once. Reported: the accuracy after the last epoch (nothing is selected on the test set), means over the
folds, and paired differences with 95 % t intervals.

A study that broke off carries on where it stands: every variant is a run folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from profit.errors import ProfitError

from ..harness.place import RESULTS, digits_recipe

QUIET = ("run.tensorboard=false", "run.eval_every=0", "run.device=cpu")
FULL_PRECISION_ONLY = ("schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]", "teacher.source=null")


def run_variant(folder: Path, fold: int, bits: int | None, kind: str, changes: Sequence[str]) -> dict[str, Any]:
    """Train or calibrate one variant of one fold and return its figures.

    Args:
        folder: of the fold; holds one run folder per variant.
        fold: number of the fold.
        bits: weight and activation bits, None for full precision.
        kind: "full precision", "continued" (full precision, trained on), "calibration", "plain" or "profit".
        changes: further `section.key=value` texts.
    """
    from profit.train import load_recipe, train

    start = time.perf_counter()
    common = [f"data.fold={fold}", f"run.seed={fold}", *QUIET, *changes]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if kind == "full precision":
            recipe = load_recipe(digits_recipe(4), [*common, *FULL_PRECISION_ONLY])
            results = train(recipe, folder / "fp", resume=True, quiet=True)
        else:
            weights = folder / "fp" / "model.safetensors"
            given = [f"model.init={weights}", "schedule.fp_epochs=0", f"schedule.profit={str(kind == 'profit').lower()}"]
            recipe = load_recipe(digits_recipe(bits or 4), [*common, *given])
            if kind == "calibration":
                return {"accuracy": _calibrated(recipe, bits), "wall_s": round(time.perf_counter() - start, 1)}
            if kind == "continued":
                budget = [f"schedule.fp_epochs={recipe.schedule.total_epochs}", f"schedule.fp_lr={recipe.schedule.lr}"]
                recipe = load_recipe(digits_recipe(4), [*common, f"model.init={weights}", *FULL_PRECISION_ONLY, *budget])
            name = kind if bits is None else f"w{bits}a{bits}-{kind}"
            results = train(recipe, folder / name, resume=True, quiet=True)
    return {
        "accuracy": results["final"]["accuracy"],
        "accuracy_ema": results["final"]["accuracy_ema"],
        "epochs": sum(phase["epochs"] for phase in results["phases"]),
        "wall_s": results["run"]["wall_s"],
        "git_commit": results["run"]["git_commit"],
    }


def _calibrated(recipe: Any, bits: int) -> float:
    """Accuracy in percent of the full-precision network with its intervals set from data and nothing trained."""
    import torch

    from profit import calibrate_, set_bits
    from profit.data import create_data
    from profit.train import evaluate
    from profit.train.network import architecture_for, build_network

    torch.set_num_threads(1)
    data = create_data(recipe.data)
    model = build_network(recipe, architecture_for(recipe, data), "cpu")
    set_bits(model, act_bits=bits)
    settings = recipe.calibration
    calibrate_(model, data.calibration, batches=settings.batches, percentile=settings.percentile, mode=settings.mode)
    set_bits(model, weight_bits=bits)
    return evaluate(model, data.test)[1]


def study(folds: int, bits: Sequence[int], work: Path, jobs: int, changes: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """All variants of all folds: variant name -> one entry per fold."""
    variants: list[tuple[str, int | None, str]] = [("full precision, continued", None, "continued")]
    variants += [(f"W{b}A{b} {kind}", b, kind) for b in bits for kind in ("calibration", "plain", "profit")]
    found: dict[str, list[Any]] = {name: [None] * folds for name in ["full precision", *(v[0] for v in variants)]}
    start, done, total = time.perf_counter(), 0, folds * len(found)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rounds = [[("full precision", None, "full precision")], variants]
        for variants_of_round in rounds:  # the variants start from their fold's full-precision network
            waiting = {
                pool.submit(run_variant, work / f"fold{fold}", fold, b, kind, changes): (name, fold)
                for name, b, kind in variants_of_round
                for fold in range(folds)
            }
            for future in as_completed(waiting):
                name, fold = waiting[future]
                found[name][fold] = future.result()
                done += 1
                minutes = (time.perf_counter() - start) / 60
                accuracy = found[name][fold]["accuracy"]
                print(f"[{done}/{total}] {minutes:5.1f} min  fold {fold}  {name}: {accuracy:.2f}%", flush=True)
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and half width of its 95 % t interval (0 for a single value)."""
    if len(values) < 2:
        return {"mean": mean(values), "half_width": 0.0}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return {"mean": mean(values), "half_width": half}


def summarise(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means, and paired differences to full precision and between PROFIT and plain training."""
    accuracy = {name: [entry["accuracy"] for entry in entries] for name, entries in found.items()}
    pairs = [(name, base) for base in accuracy if base.startswith("full") for name in accuracy if not name.startswith("full")]
    pairs += [(name, name.replace("profit", "plain")) for name in accuracy if name.endswith("profit")]
    differences = {
        f"{a} - {b}": interval([x - y for x, y in zip(accuracy[a], accuracy[b], strict=True)]) for a, b in pairs
    }
    return {"accuracy": {name: interval(values) for name, values in accuracy.items()}, "differences": differences}


def markdown(found: dict[str, list[dict[str, Any]]], summary: dict[str, Any]) -> str:
    """The tables of the summary."""
    folds = len(next(iter(found.values())))
    lines = ["| variant | " + " | ".join(f"fold {i}" for i in range(folds)) + " | mean | epochs |"]
    lines.append("|---|" + "---:|" * (folds + 2))
    for name, entries in found.items():
        row = [f"{entry['accuracy']:.2f}" for entry in entries]
        epochs = entries[0].get("epochs", 0)
        lines.append(f"| {name} | {' | '.join(row)} | **{summary['accuracy'][name]['mean']:.2f}** | {epochs} |")
    lines += ["", "| paired difference, points | mean | 95 % interval |", "|---|---:|---:|"]
    for name, value in summary["differences"].items():
        low, high = value["mean"] - value["half_width"], value["mean"] + value["half_width"]
        lines.append(f"| {name} | {value['mean']:+.2f} | {low:+.2f} .. {high:+.2f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Run the study; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks digits", description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5, help="how many of the five folds (default 5)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=[4, 3, 2], help="default 4 3 2")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--work", type=Path, default=Path("runs/digits_folds"), help="where the run folders go")
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_folds.json", help="the result file")
    parser.add_argument("-s", "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change every recipe")
    options = parser.parse_args(argv)
    from profit.environment import git_commit, processor, versions
    from profit.files import write_atomic
    from profit.train import load_recipe, recipe_dict

    start, commit = time.perf_counter(), git_commit()
    try:
        recipes = {f"W{b}A{b}": recipe_dict(load_recipe(digits_recipe(b), options.set)) for b in options.bits}
        found = study(options.folds, options.bits, options.work, options.jobs, options.set)
    except ProfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    summary = summarise(found)
    content = {
        "suite": "digits",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": commit,
        "versions": versions(),
        "processor": processor(),
        "jobs": options.jobs,
        "wall_s": round(time.perf_counter() - start, 1),
        "training_s": round(sum(entry["wall_s"] for entries in found.values() for entry in entries), 1),
        "folds": found,
        "summary": summary,
        "recipes": recipes,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    print("\n" + markdown(found, summary))
    return 0
