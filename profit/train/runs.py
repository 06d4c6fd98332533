"""The run folder: who may write into it, and what a resumed run must agree with.

    recipe.yaml         every value of the run, resolved
    results.json        accuracy per phase, layers, AIWQ, sizes; written anew after every phase
    report.html         the same for people
    model.safetensors   the final weights, with all that is needed to build the network again
    teacher.safetensors the full-precision network, where it is its own teacher
    checkpoints/        the newest (epoch-NNNN), the best (best) and the best average of weights (best_ema)
    tensorboard/        curves
    log.txt             one line per epoch
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from profit.errors import CheckpointError, ProfitError, RecipeError
from profit.files import clear_leftovers, write_atomic
from profit.train.checkpoint import checkpoints, load_checkpoint
from profit.train.recipe import Recipe
from profit.train.recipe_io import dump_recipe

RECIPE, RESULTS, MODEL, TEACHER, CHECKPOINTS, CURVES = (
    "recipe.yaml", "results.json", "model.safetensors", "teacher.safetensors", "checkpoints", "tensorboard",
)  # fmt: skip

_WRITTEN = (RECIPE, RESULTS, MODEL, TEACHER, CHECKPOINTS, CURVES, "log.txt")

# How and where it trains is not what is trained: these may change when a run is carried on.
_PLACE = ("device", "tensorboard", "keep_checkpoints", "timeout_s", "find_unused_parameters")


def open_run(folder: Path, recipe: Recipe, resume: bool) -> bool:
    """Make a run folder, or check that an existing one may be carried on. Returns whether the run is finished already.

    Raises:
        ProfitError: the folder cannot be made or written, holds a run and `resume` is not set, or holds other files or a link
            that leads out of it.
    """
    _refuse_links(folder)
    stored = folder / RECIPE
    if stored.is_file() and is_begun(folder):
        finished = (folder / MODEL).is_file()
        if not resume:
            state = "a finished run" if finished else "an unfinished run"
            raise ProfitError(f"{folder} already holds {state}: --resume carries it on, --out DIR starts another")
        for place in (folder, folder / CHECKPOINTS):
            clear_leftovers(place)
        return finished
    try:
        if not stored.is_file() and folder.is_dir() and _holds_other_files(folder):
            raise ProfitError(f"the output folder {folder} is not empty and holds no run: choose another with --out")
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfitError(f"cannot write the output folder {folder}: {error.strerror or error}") from None
    try:
        (folder / TEACHER).unlink(missing_ok=True)  # of an attempt that left nothing else, with another recipe perhaps
    except OSError as error:
        raise ProfitError(f"cannot write the output folder {folder}: {error.strerror or error}") from None
    store_recipe(folder, recipe)
    return False


def store_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the recipe of a run into its folder."""
    write_atomic(folder / RECIPE, dump_recipe(recipe), follow=False)


def _holds_other_files(folder: Path) -> bool:
    """Whether there is anything in it but what a run leaves that died before it had written its recipe."""
    clear_leftovers(folder, RECIPE)
    return any(path.name != CHECKPOINTS or not path.is_dir() or any(path.iterdir()) for path in folder.iterdir())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of `folder`, which is made if it is missing; the lock goes with the process, however it ends.

    Raises:
        ProfitError: another process trains in this folder, or it cannot be made.
    """
    if folder.exists() and not folder.is_dir():
        raise ProfitError(f"the output folder {folder} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ProfitError(f"cannot write the output folder {folder}: {error.strerror or error}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ProfitError(f"{folder} is in use: another process trains in it; choose another with --out") from None
    except OSError as error:
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): start no second run in it", stacklevel=2)
    try:
        yield
    finally:
        os.close(handle)


def _refuse_links(folder: Path) -> None:
    """Raise ProfitError for a link that would have files written, or removed, elsewhere: the folder may be anybody's."""
    if not folder.is_dir():
        return
    try:
        entries = [entry for entry in folder.iterdir() if entry.name in _WRITTEN or entry.name.startswith(".")]
        entries += [entry for name in (CHECKPOINTS, CURVES) if (folder / name).is_dir() for entry in (folder / name).iterdir()]
    except OSError as error:
        raise ProfitError(f"cannot read the run folder {folder}: {error.strerror or error}") from None
    inside = os.path.realpath(folder)
    for entry in entries:
        if entry.is_symlink() and not os.path.realpath(entry).startswith(inside + os.sep):
            raise ProfitError(f"{entry} is a link that leads out of the run folder: put the file itself there, or start "
                              "another run with --out")  # fmt: skip


def is_begun(folder: Path) -> bool:
    """Whether there is something to carry on; a run that broke off before its first checkpoint has nothing to lose."""
    return (folder / MODEL).is_file() or bool(checkpoints(folder / CHECKPOINTS))


def is_of_a_run(path: Path) -> bool:
    """Whether a run folder keeps such a file itself, so that nothing else may be written there."""
    path = Path(os.path.realpath(path))
    if path.parent.name == CHECKPOINTS:
        return (path.parent.parent / RECIPE).is_file()
    return path.name in (RECIPE, RESULTS, MODEL, TEACHER) and (path.parent / RECIPE).is_file()


def newest_checkpoint(folder: Path) -> tuple[str | None, list[str]]:
    """See `newest_state`, without the state."""
    return newest_state(folder)[:2]


def newest_state(folder: Path) -> tuple[str | None, list[str], dict[str, Any]]:
    """The name of the newest undamaged checkpoint of a run (None if it has none yet), a warning for each damaged one, and what
    it holds.

    Raises:
        CheckpointError: there are checkpoints and all are damaged.
    """
    warnings: list[str] = []
    found = checkpoints(folder / CHECKPOINTS)
    for base in reversed(found):
        try:
            return base.name, warnings, load_checkpoint(base)
        except CheckpointError as error:
            warnings.append(f"warning: {error}; going back to the checkpoint before it")
    if found:
        raise CheckpointError(f"every checkpoint of {folder} is damaged: {warnings[-1].removeprefix('warning: ')}")
    return None, warnings, {}


def resolve_weights(folder: Path, which: str | None) -> Path:
    """The weight file of a run: None for the final model, `best`, `best_ema`, `last`, an epoch, or a path.

    Raises:
        CheckpointError: the run has no such file.
    """
    if which is None:
        if not (folder / MODEL).is_file():
            raise CheckpointError(f"{folder} has no {MODEL}: the run is not finished; --checkpoint last takes its newest state")
        return folder / MODEL
    if not which:
        raise CheckpointError("--checkpoint is empty: give a weight file, or best, best_ema or last")
    if which == "last":
        found = checkpoints(folder / CHECKPOINTS)
        if not found:
            raise CheckpointError(f"{folder} has no checkpoint yet")
        return found[-1].with_suffix(".safetensors")
    named = folder / CHECKPOINTS / f"{which}.json"
    if named.is_file():
        return named.with_suffix(".safetensors")
    if Path(which).is_file():
        return Path(which)
    if Path(which).is_dir():
        raise CheckpointError(f"{which} is a folder: give a weight file, or best, best_ema or last of {folder}")
    known = ", ".join(sorted(path.stem for path in (folder / CHECKPOINTS).glob("*.json"))) or "none"
    raise CheckpointError(f"there is no checkpoint {which}; this run has: {known}")


def device_for(recipe: Recipe) -> torch.device:
    """The device a recipe asks for; `auto` is the GPU where there is one. Under torchrun each process has a GPU of its own.

    Raises:
        RecipeError: no such device here.
    """
    name = recipe.run.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RecipeError(f"run.device: {name!r} is no device to train on; use cpu, cuda, cuda:1 or auto")
    if device.type == "cuda" and device.index is None and dist.is_available() and dist.is_torchelastic_launched():
        device = torch.device("cuda", dist.get_node_local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(f"run.device: {name} is not here ({torch.cuda.device_count()} CUDA devices)")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use `count` torch threads (None: as many as now) and put the number back afterwards."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_place(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values without how and where it trains."""
    kept = {key: value for key, value in values["run"].items() if key not in _PLACE}
    return {**values, "run": kept}
