"""The bundled trainer: recipes, the training loop, run folders and checkpoints.

Names are imported when they are used, so that reading a recipe needs neither timm nor a data set.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Recipe": "recipe",
    "load_recipe": "recipe_io",
    "parse_recipe": "recipe_io",
    "recipe_dict": "recipe_io",
    "dump_recipe": "recipe_io",
    "shipped_recipes": "shipped",
    "train": "trainer",
    "load_network": "network",
    "evaluate": "loop",
    "evaluate_run": "evaluation",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
