"""What a run was begun with: recipe, teacher and data. Every checkpoint records it, and a resumed run compares it.

Digests: of the teacher the file's content; of the data the names and sizes of the files (`profit.data.inventory`), taken once
when a process starts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from profit.data import DataBundle
from profit.errors import CheckpointError, ProfitError, RecipeError
from profit.files import sha256, sha256_of_file
from profit.schedule import Phase
from profit.train.network import weight_files
from profit.train.recipe import Recipe
from profit.train.recipe_io import first_difference, load_recipe, parse_recipe, stored_dict
from profit.train.runs import RECIPE, TEACHER, newest_state, open_run, store_recipe, without_place
from profit.train.snapshot import check_snapshot
from profit.train.teacher import has_own_teacher

_ACCEPTED = {"recipe": "the given recipe", "teacher": "this teacher", "data": "these data"}


def check_kinds(kinds: Collection[str], resume: bool) -> None:
    """Raise RecipeError unless `kinds` may be given as changes to accept."""
    unknown = [kind for kind in kinds if kind not in _ACCEPTED]
    if unknown:
        raise RecipeError(f"--accept-changed {unknown[0]!r}: recipe, teacher or data may have changed")
    if kinds and not resume:
        raise RecipeError("--accept-changed belongs to --resume: a new run has nothing that could have changed")


def origin(recipe: Recipe, data: DataBundle, folder: Path) -> dict[str, Any]:
    """Recipe, teacher and data as they are now, as plain JSON values.

    Raises:
        ProfitError: the teacher's file cannot be read.
    """
    values = without_place(stored_dict(recipe))
    return {
        "recipe": {"sha256": sha256(json.dumps(values, sort_keys=True).encode()), "values": values},
        "teacher": {"source": recipe.teacher.source, "sha256": teacher_digest(recipe.teacher.source, folder)},
        "data": {"class_names": list(data.class_names), **data.inventory()},
    }


def teacher_digest(source: str | None, folder: Path) -> str | None:
    """Of the file that holds the teacher; None where there is none (yet), or where timm or torchvision has it."""
    if source is None:
        return None
    files = [folder / TEACHER] if source == "self" else weight_files(Path(source))
    try:
        digests = [sha256_of_file(file) for file in files if file.is_file()]
    except OSError as error:
        raise ProfitError(f"cannot read the teacher {source}: {error.strerror or error}") from None
    return sha256("".join(digests).encode()) if len(digests) > 1 else next(iter(digests), None)


def begin_run(
    folder: Path, recipe: Recipe, data: DataBundle, resume: bool, accepted: Collection[str]
) -> tuple[bool, str | None, list[str], dict[str, Any]]:
    """Open a run folder and compare what the run was begun with.

    Returns:
        Whether the run is finished; the checkpoint to carry on from, None for a new run; lines to tell; and the origin that
        the next checkpoints record.

    Raises:
        ProfitError: see `open_run` and `check_origin`.
    """
    finished = open_run(folder, recipe, resume)
    try:
        name, lines, state = newest_state(folder)
    except CheckpointError:
        if not finished:
            raise
        name, lines, state = None, [], {}
    if state:
        check_snapshot(state, folder)
    before, now = state.get("origin"), origin(recipe, data, folder)
    own = recipe.teacher.source == "self"
    if before and before["teacher"]["source"] == "self":
        made = before["teacher"]["sha256"] is not None
    else:
        made = any(map(has_own_teacher, _phases_begun(recipe, state)))
    lost = own and made and now["teacher"]["sha256"] is None
    if own and not made:
        now["teacher"]["sha256"] = None  # a file there is of an attempt that left no checkpoint: it is made again
    if name or finished:
        lines += check_origin(folder, before, now, accepted, lost=lost, finished=finished)
        if "recipe" in accepted:
            store_recipe(folder, recipe)
        if not before:
            lines.append("warning: the checkpoint is of an earlier version, without a record of teacher and data to compare")
    return finished, name, lines, now


def _phases_begun(recipe: Recipe, state: Mapping[str, Any]) -> Sequence[Phase]:
    """The phases that a run had come to when `state` was stored."""
    position = state.get("position", {"schedule": {"position": 0}, "epoch": 0})
    return recipe.schedule.phases[: position["schedule"]["position"] + (position["epoch"] > 0)]


def check_origin(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], accepted: Collection[str], *, lost: bool,
    finished: bool,
) -> list[str]:  # fmt: skip
    """Compare what a run was begun with and what is there now; returns a line for each change that is accepted.

    Args:
        before: None for the checkpoint of an earlier version, of which only the recipe can be compared.
        lost: the teacher that the run has made of itself is gone.
        finished: there is nothing left to train.

    Raises:
        RecipeError: another recipe. CheckpointError: another teacher or other data; or a lost teacher that is still needed,
            which nothing can replace.
    """
    if lost and not finished:
        raise CheckpointError(f"{folder}: {TEACHER} is missing, and it cannot be made again, because the network has been "
                              "trained on since: put the file back, or start anew with --out DIR")  # fmt: skip
    found = {"recipe": recipe_change(folder, before and before["recipe"]["values"], now["recipe"]["values"], accepted)}
    if before:
        found["teacher"] = f"{TEACHER} is missing" if lost else _teacher_change(before["teacher"], now["teacher"])
        found["data"] = data_change(before["data"], now["data"])
    changes = {kind: line for kind, line in found.items() if line}
    refused = {kind: line for kind, line in changes.items() if kind not in accepted}
    if refused:
        options = ", ".join(f"--accept-changed {kind} goes on with {_ACCEPTED[kind]}" for kind in refused)
        raise (RecipeError if "recipe" in refused else CheckpointError)(
            f"{folder}: {'; '.join(refused.values())} ({options})"
        )
    return [f"accepted: {line}" for line in changes.values()]


def _teacher_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    if before["source"] != now["source"] or before["sha256"] == now["sha256"]:
        return None  # another source is another recipe
    return f"{TEACHER if now['source'] == 'self' else 'the teacher ' + now['source']} was changed"


def recipe_change(
    folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], accepted: Collection[str]
) -> str | None:
    """The first value in which the given recipe, or the one in the run folder, is not that of the run's beginning."""
    try:
        stored = without_place(stored_dict(load_recipe(folder / RECIPE)))
    except RecipeError as error:
        if "recipe" in accepted:
            return f"{RECIPE} is written anew: {error}"
        raise
    begun = _complete(before) if before else stored
    changed = first_difference(begun, now)
    if changed:
        return f"started with another recipe (stored != given): {changed}"
    edited = first_difference(begun, stored)
    return f"{RECIPE} was edited (then != now): {edited}" if edited else None


def _complete(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded recipe with the values that were added to recipes later; itself where this version refuses it."""
    try:
        return without_place(stored_dict(parse_recipe(values)))
    except RecipeError:
        return values


def data_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first difference between two data sets: classes, then the number of images, then their names and sizes."""
    changed = _class_change(before["class_names"], now["class_names"])
    if changed:
        return changed
    for split in ("train", "test"):
        old, new = before.get(split), now.get(split)
        if old is None or new is None:
            continue
        if old["images"] != new["images"]:
            return f"{split}: {new['images']} images, {old['images']} when the run was begun"
        if old["sha256"] != new["sha256"]:
            return f"{split}: the same number of images, but other names or sizes"
    return None


def _class_change(before: Sequence[str], now: Sequence[str]) -> str | None:
    if list(before) == list(now):
        return None
    gone, new = ([name for name in a if name not in set(b)] for a, b in ((before, now), (now, before)))
    if len(gone) == len(new) == 1:
        return f"class {gone[0]!r} is now called {new[0]!r}"
    if not gone and not new:
        if len(before) != len(now):  # torchvision has two classes of one name in ImageNet
            return f"{len(now)} classes, {len(before)} when the run was begun"
        moved = next(name for name, other in zip(before, now, strict=True) if name != other)
        return f"class {moved!r} is now number {now.index(moved)}, not {before.index(moved)}"
    parts = [(gone, "is missing"), (new, "is new")]
    return ", ".join(f"class {names[0]!r} {what}" + (f" and {len(names) - 1} more" if names[1:] else "")
                     for names, what in parts if names)  # fmt: skip
