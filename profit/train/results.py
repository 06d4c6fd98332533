"""results.json: what a run measured, assembled for people and for the report."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from profit.aiwq import AIWQMonitor
from profit.data import DataBundle
from profit.environment import git_commit, versions
from profit.optim import quantizer_parameters
from profit.report.collect import collect_layers, model_sizes, weight_histograms
from profit.schedule import Phase, PhaseSchedule
from profit.train.network import Architecture
from profit.train.recipe import Recipe
from profit.train.recipe_io import stored_dict

SCHEMA = 1


def describe_run(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The section `run` as it is when a run starts."""
    return {
        "name": recipe.run.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished": False,
        "command": _command(),
        "git_commit": git_commit(),
        "seed": recipe.run.seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "wall_s": 0.0,
        "versions": versions(),
    }


def describe_model(model: nn.Module, architecture: Architecture) -> dict[str, Any]:
    """The section `model`. Quantizer parameters are not counted: they are not stored with a deployed network."""
    extra = {id(parameter) for parameter in quantizer_parameters(model)}
    return {
        "name": architecture.name,
        "parameters": sum(p.numel() for p in model.parameters() if id(p) not in extra),
        "classes": architecture.classes,
        "in_chans": architecture.in_chans,
    }


def describe_data(recipe: Recipe, data: DataBundle) -> dict[str, Any]:
    """The section `data`."""
    return {
        "name": data.name,
        "train": data.train_images,
        "test": data.test_images,
        "unreadable": len(data.unreadable()),
        "image_size": data.image_size,
        "class_names": list(data.class_names),
        "fold": f"{recipe.data.fold} of {recipe.data.folds}" if data.name == "digits" else None,
    }


def assemble(
    *,
    recipe: Recipe,
    run: Mapping[str, Any],
    model: nn.Module,
    architecture: Architecture,
    data: DataBundle,
    phases: list[dict[str, Any]],
    aiwq: Mapping[str, Any] | None,
    frozen_stage: Mapping[str, int],
    accuracy_fp: float | None,
) -> dict[str, Any]:
    """The whole content of results.json, schema 1."""
    # the original mode may give NaN, which JSON does not know
    scores = {name: score for name, score in aiwq["scores"].items() if math.isfinite(score)} if aiwq else None
    last = phases[-1] if phases else None
    return {
        "schema": SCHEMA,
        "run": dict(run),
        "model": describe_model(model, architecture),
        "data": describe_data(recipe, data),
        "recipe": stored_dict(recipe),
        "phases": phases,
        "layers": collect_layers(model, scores, dict(frozen_stage)),
        "weights": weight_histograms(model),
        "sizes": _sizes_with_accuracy(model, phases, accuracy_fp),
        "aiwq": {**aiwq, "scores": scores} if aiwq else None,
        "final": {
            "accuracy": last["accuracy"] if last else None,
            "accuracy_ema": last["accuracy_ema"] if last else None,
            "accuracy_fp": accuracy_fp,
        },
    }


def headline(sections: Mapping[str, Any], schedule: PhaseSchedule, done: int) -> str:
    """The first line of a run: what trains on what, for how long; `done` epochs lie behind it."""
    run, model, data = (sections[key] for key in ("run", "model", "data"))
    return (
        f"{'carrying on' if done else 'training'} {model['name']} ({model['parameters']} parameters) on {data['name']}: "
        f"{data['train']} training and {data['test']} test images, {len(schedule)} phases, {schedule.total_epochs} epochs, "
        f"from epoch {done + 1}, {run['device']}, {run['threads']} threads"
    )


def phase_row(
    phase: Phase, frozen: list[str], history: list[dict[str, Any]], wall_s: float, images_per_s: float
) -> dict[str, Any]:
    """The entry of a phase that is over; its accuracies and losses are those after its last epoch."""
    last = history[-1]
    return {
        "name": phase.name,
        "kind": phase.kind,
        "bits": phase.bits,
        "weight_bits": phase.weight_bits,
        "act_bits": phase.act_bits,
        "frozen": len(frozen),
        "frozen_layers": frozen,
        "epochs": phase.epochs,
        "lr": phase.lr,
        **{key: last[key] for key in ("accuracy", "accuracy_ema", "train_loss", "test_loss")},
        "wall_s": round(wall_s, 2),
        "images_per_s": round(images_per_s, 1),
        "history": history,
    }


def aiwq_section(monitor: AIWQMonitor) -> dict[str, Any]:
    """The section `aiwq` at the end of a sampling phase."""
    return {
        "mode": monitor.mode,
        "steps": monitor.steps,
        "decay": monitor.decay,
        "clamped": monitor.clamped,
        "skipped": monitor.skipped,
        "scores": monitor.scores(),
    }


def to_json(results: Mapping[str, Any]) -> str:
    """JSON text; refuses NaN and infinities, which JSON does not know."""
    return json.dumps(results, indent=1, allow_nan=False) + "\n"




def _command() -> str:
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return " ".join([program.replace("__main__.py", "python -m profit"), *sys.argv[1:]])


def _sizes_with_accuracy(
    model: nn.Module, phases: list[dict[str, Any]], accuracy_fp: float | None
) -> list[dict[str, Any]]:
    """Sizes at several bit widths, each with the accuracy of the last phase at that weight width, if there was one."""
    reached = {phase["weight_bits"]: phase["accuracy"] for phase in phases if phase["weight_bits"] is not None}
    reached[32] = accuracy_fp
    return [{**row, "accuracy": reached.get(row["bits"])} for row in model_sizes(model)]
