"""Testing a finished (or unfinished) run again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from profit.allowed import data_problem
from profit.data import DataBundle, create_data
from profit.data.inventory import numbered
from profit.errors import CheckpointError, DataError, RecipeError
from profit.quantize import quant_layers
from profit.train.loop import evaluate
from profit.train.network import Architecture, load_network
from profit.train.recipe_io import load_recipe
from profit.train.runs import RECIPE, device_for, resolve_weights, threads


def evaluate_run(
    folder: str | Path, *, checkpoint: str | None = None, data: str | None = None, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Test a run's network on the run's test set, or on other data.

    Args:
        folder: a run folder.
        checkpoint: None for the final model; `best`, `best_ema`, `last`, or the path of a weight file.
        data: None for the run's own; a folder of images or a data set name instead.
        overrides: `section.key=value` texts on the sections `data` and `run` of the run's recipe, such as `data.fold=1`.

    Returns:
        `{"weights", "bits", "data", "images", "unreadable", "loss", "accuracy"}`, accuracy in percent of the images that could
        be read.

    Raises:
        CheckpointError: no run, or no such weights. DataError: data that cannot be used or have other classes. RecipeError: an
            override that is none, or of what does not matter to a test.
    """
    folder = Path(folder)
    if not (folder / RECIPE).is_file():
        raise CheckpointError(f"{folder} is not a run folder: it has no {RECIPE}")
    overrides = list(overrides)
    for text in overrides:
        if "=" in text and text.strip().partition(".")[0] not in ("data", "run"):
            raise RecipeError(f"--set {text}: a test of {folder} takes data.* and run.*, the network is the run's own")
    recipe = load_recipe(folder / RECIPE, overrides)
    if data is not None:
        is_folder = Path(data).is_dir()
        if not data or (Path(data).exists() and not is_folder):
            raise DataError(f"--data {data!r} is no folder: give a folder of images or the name of a data set")
        chosen = replace(recipe.data, name="imagefolder" if is_folder else data, path=data if is_folder else None)
        recipe = replace(recipe, data=chosen)
    wrong = data_problem(recipe.data)
    if wrong:
        raise DataError(wrong)
    device = device_for(recipe)
    weights = resolve_weights(folder, checkpoint)
    model, architecture = load_network(weights, device)
    bundle = create_data(recipe.data, seed=recipe.run.seed, device=device)
    if (bundle.classes, bundle.in_chans) != (architecture.classes, architecture.in_chans):
        raise DataError(
            f"{bundle.name} has {bundle.classes} classes and {bundle.in_chans} channels, the network of {folder} "
            f"{architecture.classes} and {architecture.in_chans}"
        )
    _check_names(bundle, architecture, folder)
    with threads(recipe.run.threads):
        loss, accuracy = evaluate(model, bundle.test)
    unreadable = len(bundle.unreadable())
    layer = list(quant_layers(model).values())[1]  # the first one sees the image, which is never quantized
    return {
        "weights": str(weights),
        "bits": f"W{layer.weight_quantizer.bits or 32}A{layer.input_quantizer.bits or 32}",
        "data": bundle.name,
        "images": bundle.test_images - unreadable,
        "unreadable": unreadable,
        "loss": loss,
        "accuracy": accuracy,
    }


def _check_names(bundle: DataBundle, architecture: Architecture, folder: Path) -> None:
    """Raise DataError where an output of the network stands for one class and a label of the data for another."""
    ours, theirs = architecture.class_names, bundle.class_names
    unnamed = numbered(bundle.classes)
    is_folder = bundle.name.startswith("imagefolder")  # its classes are never without names
    if not ours or ours == unnamed or (theirs == unnamed and not is_folder):
        return
    number = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if number is not None:
        raise DataError(
            f"class {number} of {bundle.name} is {theirs[number]!r}, for the network of {folder} it is {ours[number]!r}: the "
            "accuracy would mean nothing; give the classes the same names"
        )
