"""The recipes that come with the package, by name: `digits_w4a4` from any folder."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

from profit.errors import RecipeError

_PACKAGE = Path(__file__).resolve().parents[1]
# setup.py installs the checkout's recipes/ as profit/recipes.
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every recipe that comes with the package, sorted; empty if it was installed without them."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def is_shadowed(recipe: str | Path) -> bool:
    """Whether `recipe` names a file or run folder here and a shipped recipe as well; the one that is here is taken."""
    return str(recipe) in shipped_recipes() and _is_here(Path(recipe))


def find_recipe(recipe: str | Path) -> Path:
    """The file that `recipe` stands for: a YAML file, a run folder's recipe.yaml, or a shipped recipe's name.

    A file or run folder of that name wins over a shipped recipe.

    Raises:
        RecipeError: neither a path that exists nor the name of a shipped recipe; with the nearest name.
    """
    path = Path(recipe)
    if _is_here(path):
        return path / "recipe.yaml" if os.path.isdir(path) else path
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    if os.path.exists(path):
        return path  # a folder without a recipe, a pipe: reading it tells
    # `recipes/digits_w4a4.yaml` outside of a checkout means the shipped one as well.
    near = [path.stem] if path.stem in shipped else get_close_matches(path.stem, shipped, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RecipeError(f"there is no recipe {recipe}{hint or ';'} `profit recipes` lists those that come with the package")


def _is_here(path: Path) -> bool:
    # unlike Path.is_file these take any text, too long for a name or with a zero byte
    return os.path.isfile(path) or os.path.isfile(path / "recipe.yaml")


def title(path: Path) -> str:
    """The first comment line of a recipe."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
