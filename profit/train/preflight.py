"""What would stop a run, looked for before its first phase; `train` and its dry run ask the same questions.

Data, number of classes, `model.init` and the teacher have been read by then, and the network has been tried (`trial`): what is
wrong with one of them is told by whoever reads it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from profit.errors import ProfitError, RecipeError, TrainingError
from profit.memory import available_bytes
from profit.quantize import quant_layers
from profit.train.network import Architecture
from profit.train.recipe import Recipe

_GB = 1e9


def check_steps(recipe: Recipe, batches: int) -> None:
    """Every phase must have a step, and a phase that samples AIWQ two sampled ones.

    Args:
        batches: micro-batches of an epoch in this process.

    Raises:
        TrainingError: one has not; it says which, and what to change.
    """
    steps, every = batches // recipe.optim.accumulate, recipe.aiwq.every
    if not steps:
        raise TrainingError("the training data gave no batch; is data.batch_size larger than the data set?")
    for phase in recipe.schedule.phases:
        if phase.kind == "sample" and phase.epochs * steps < every + 1:
            more = f"{every + 1} (aiwq.every={every})" if every > 1 else "2"
            raise TrainingError(f"phase {phase.name} has {phase.epochs * steps} steps, and AIWQ needs at least {more}: raise "
                                "schedule.sample_epochs or lower data.batch_size")  # fmt: skip


def check_stages(recipe: Recipe, model: nn.Module) -> None:
    """Raises RecipeError where there are more freezing stages than convolutions to freeze."""
    ranked = sum(bool(getattr(module, "ranked", False)) for module in model.modules())
    staged = any(phase.stage for phase in recipe.schedule.phases)
    if staged and recipe.schedule.stages > ranked:
        raise RecipeError(f"schedule.stages={recipe.schedule.stages}, but {recipe.model.name} has {ranked} convolutions to "
                          f"freeze: choose at most {ranked}")  # fmt: skip


def check_memory(recipe: Recipe, model: nn.Module, architecture: Architecture, images: int, world: int) -> None:
    """On the CPU, where the system would kill the process without a word.

    Counted are the least that a step of `images` images or a test keeps: one output per layer. More is needed in truth.

    Raises:
        RecipeError: more than there is.
    """
    device = next(model.parameters()).device
    free = available_bytes()
    if device.type != "cpu" or free is None:
        return
    kept, largest = _output_bytes(model, architecture)
    micro = min(recipe.data.batch_size, images) // (recipe.optim.accumulate * world)
    amounts = {
        f"data.batch_size={recipe.data.batch_size}": kept * micro,
        f"data.eval_batch_size={recipe.data.eval_batch_size}": largest * min(recipe.data.eval_batch_size, images),
    }
    for what, needed in amounts.items():
        if needed > free:
            raise RecipeError(
                f"{what} of {architecture.image_size} x {architecture.image_size} pixels needs more than "
                f"{needed / _GB:.1f} GB of memory, {free / _GB:.1f} GB are free: lower it, or data.image_size"
            )


@torch.no_grad()
def _output_bytes(model: nn.Module, architecture: Architecture) -> tuple[int, int]:
    """Bytes of the outputs of all quantized layers, and of the largest, for one image."""
    sizes: list[int] = []

    def count(module: nn.Module, inputs: object, output: Tensor) -> None:
        sizes.append(output.numel() * output.element_size() // 2)

    handles = [layer.register_forward_hook(count) for layer in quant_layers(model).values()]
    training = model.training
    try:
        model.eval()(architecture.example_input(next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sum(sizes), max(sizes)


def check_folder(recipe: Recipe, model: nn.Module, folder: Path) -> None:
    """The output folder can be written, and its disk holds the checkpoints of the recipe.

    Raises:
        ProfitError: it cannot, or does not.
    """
    try:
        os.fsencode(folder)
    except UnicodeEncodeError:
        encoding = sys.getfilesystemencoding()
        raise ProfitError(f"the output folder {folder} has no name in the file system's encoding {encoding}: choose another "
                          "run.name, or set PYTHONUTF8=1") from None  # fmt: skip
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise ProfitError(f"cannot write the output folder {folder}: {error.strerror or error}") from None
    if there == folder and not there.is_dir():
        raise ProfitError(f"the output folder {folder} is a file")
    if not there.is_dir():
        raise ProfitError(f"cannot write the output folder {folder}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ProfitError(f"cannot write the output folder {folder}: Permission denied")
    needed = _bytes_on_disk(recipe, model)
    kept = sum(path.stat().st_size for path in folder.glob("**/*.safetensors") if path.is_file())
    disk = shutil.disk_usage(there)
    if not disk.total:
        raise ProfitError(f"cannot write the output folder {folder}: its file system holds no files")
    free = disk.free + kept  # what is there already will be replaced
    if needed > free:
        raise ProfitError(f"the checkpoints of this run take {needed / _GB:.2f} GB, and the disk of {folder} has "
                          f"{free / _GB:.2f} GB: free some, choose another --out, or lower run.keep_checkpoints")  # fmt: skip


def _bytes_on_disk(recipe: Recipe, model: nn.Module) -> int:
    """Of all weight files, with one that is being written beside the one it replaces."""
    state = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    trained = sum(value.numel() * value.element_size() for value in model.parameters())
    average = state if recipe.ema.enabled else 0
    checkpoint = state + average + (trained if recipe.optim.momentum else 0)
    once = 2 * state + average + (state if recipe.teacher.source == "self" else 0)  # final, best, best_ema, teacher
    return (recipe.run.keep_checkpoints + 1) * checkpoint + once
