"""Recipes from and to YAML: strict about keys and types, with messages that name the value by its full name."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from profit.allowed import recipe_problem
from profit.config import DuQConfig
from profit.errors import RecipeError
from profit.files import read_text
from profit.train.limits import plain_problem, problem
from profit.train.recipe import Recipe
from profit.train.shipped import find_recipe

# The schedule sets the bit widths phase by phase; a second place to write them would contradict it.
_HIDDEN = {DuQConfig: ("weight_bits", "act_bits")}
_LARGEST = 10**6  # bytes; a recipe has a few thousand
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe; `overrides` are `section.key=value` texts whose values are YAML too.

    A run folder in place of a file stands for the recipe stored in it, the name of a recipe that comes with the package
    (`digits_w4a4`) for that one; a file or run folder of the same name wins.

    Raises:
        RecipeError: no such recipe, unreadable file, not YAML, a key that stands twice, an unknown key (with the nearest known
            one), a wrong type or value, or a text that could make a library fetch or run something (docs/security.md).
    """
    path = find_recipe(path)
    try:
        text = read_text(path, _LARGEST)
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"cannot read the recipe {path}: it is no text in UTF-8") from None
    values = _yaml(text, str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, this is {_describe(values)}")
    data = values.get("data")
    if isinstance(data, Mapping) and data.get("download") not in (None, False):
        raise RecipeError(f"{path}: data.download is not for a file, which anybody may have written: take it out there, and "
                          "ask for the download with -s data.download=true")  # fmt: skip
    return parse_recipe(apply_overrides(values, overrides))


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested `values` with each `a.b=value` put in place.

    Raises:
        RecipeError: no `=`, an empty name, a value that is not YAML, or a name below something that is no section.
    """
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for text in overrides:
        name, equals, value = text.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"--set takes section.key=value, not {text!r}")
        parsed = _yaml(value, f"--set {name}: {_describe(value)}")
        target = result
        for depth, part in enumerate(parts[:-1]):
            inner = target.get(part)
            if inner is not None and not isinstance(inner, Mapping):
                raise RecipeError(f"--set {name}: {'.'.join(parts[: depth + 1])} is a value, not a section")
            target[part] = dict(inner or {})
            target = target[part]
        target[parts[-1]] = parsed
    return result


def _yaml(text: str, where: str) -> Any:
    """The plain values in `text`; stricter than YAML: no key twice, and no aliases, of which few lines can make gigabytes."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1}: a recipe has no aliases; write it out")
            return super().compose_node(parent, index)

        def compose_scalar_node(self, anchor: Any) -> Any:
            node = super().compose_scalar_node(anchor)
            if any("\ud800" <= character <= "\udfff" or character == "\0" for character in node.value):
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {node.value!r} is no text that a file could hold")
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value} stands there twice")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        tab = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{where} is not valid YAML: {line}{error.problem}{tab}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise RecipeError(f"{where} is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # a date, a number of thousands of digits, or a tag (!!bool x) on what is nothing of the kind
        raise RecipeError(f"{where} holds a value that cannot be read: {error}") from None


def parse_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe that nested plain `values` describe; what is not given keeps its default.

    Raises:
        RecipeError: see `load_recipe`.
    """
    recipe = _section(Recipe, values, "")
    wrong = plain_problem(values, "") or recipe_problem(recipe)
    if wrong:
        raise RecipeError(wrong)
    return recipe


def recipe_dict(recipe: Any) -> dict[str, Any]:
    """Every value of a recipe (or of a section of it), resolved, as nested plain values."""
    result: dict[str, Any] = {}
    for item in _fields(type(recipe)):
        value = getattr(recipe, item.name)
        if is_dataclass(value):
            value = recipe_dict(value)
        elif isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, Mapping):
            value = {key: dict(inner) if isinstance(inner, Mapping) else inner for key, inner in value.items()}
        result[item.name] = value
    return result


def stored_dict(recipe: Recipe) -> dict[str, Any]:
    """`recipe_dict` as a file keeps it: a download is asked for anew each time."""
    values = recipe_dict(recipe)
    values["data"]["download"] = False
    return values


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back, without the wish for a download."""
    import yaml

    return yaml.safe_dump(stored_dict(recipe), sort_keys=False, allow_unicode=True)


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> str | None:
    """Where two resolved recipes differ first, as `section.key: a != b`; None if they do not."""
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found = first_difference(a, b, f"{prefix}{key}.")
            if found:
                return found
        elif a != b:
            return f"{prefix}{key}: {a!r} != {b!r}"
    return None


def _fields(cls: type) -> list[Field[Any]]:
    return [item for item in fields(cls) if item.init and item.name not in _HIDDEN.get(cls, ())]


def _section(cls: type, values: Any, prefix: str) -> Any:
    where = prefix.rstrip(".")
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise RecipeError(f"{where} is a section of keys, not {_describe(values)}")
    known = {item.name: item for item in _fields(cls)}
    for key in values:
        if key in known:
            continue
        if key in _HIDDEN.get(cls, ()):
            raise RecipeError(f"{prefix}{key}: bit widths are set phase by phase in schedule.{key}")
        raise RecipeError(f"unknown recipe key {prefix}{key}{_suggest(str(key), prefix, known)}")
    hints = get_type_hints(cls)
    given = {name: _value(hints[name], values[name], f"{prefix}{name}") for name in known if name in values}
    for name, value in given.items():
        wrong = problem(f"{prefix}{name}", value)
        if wrong:
            raise RecipeError(wrong)
    for name in _HIDDEN.get(cls, ()):
        given[name] = None
    missing = [name for name, item in known.items()
               if name not in given and item.default is MISSING and item.default_factory is MISSING]  # fmt: skip
    if missing:
        raise RecipeError(f"{prefix}{missing[0]} is not set")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}" if where else str(error)) from None


def _suggest(key: str, prefix: str, known: Mapping[str, Any]) -> str:
    """The nearest key of the same section, else the same key of another section."""
    near = get_close_matches(key, known, n=1)
    if near:
        return f"; did you mean {prefix}{near[0]}?"
    sections = {name: hint for name, hint in get_type_hints(Recipe).items() if is_dataclass(hint)}
    homes = [f"{name}.{key}" for name, hint in sections.items() if key in {item.name for item in _fields(hint)}]
    return f"; did you mean {homes[0]}?" if homes else f"; known here: {', '.join(known)}"


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint`, or a RecipeError that names it."""
    if is_dataclass(hint):
        return _section(hint, value, f"{name}.")
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _union(args, value, name)
    if origin is Literal:
        if value not in args:
            near = f"must be one of {', '.join(map(str, args))}"
            raise RecipeError(f"{name} {near}, not {_describe(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{name} must be a list, as [8, 5, 4], not {_describe(value)}")
        return tuple(_value(args[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping)):
        if not isinstance(value, Mapping):
            raise RecipeError(f"{name} must be a mapping, not {_describe(value)}")
        return dict(value)
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a text
        number = _number(value)
        if number is None:
            raise RecipeError(f"{name} must be a number, not {_describe(value)}")
        return number
    if hint is Any or (isinstance(value, hint) and not (hint is int and isinstance(value, bool))):
        return value
    raise RecipeError(f"{name} must be {_TYPE_NAMES.get(hint, hint)}, not {_describe(value)}")


def _union(args: tuple[Any, ...], value: Any, name: str) -> Any:
    if value is None and type(None) in args:
        return None
    choices = [arg for arg in args if arg is not type(None)]
    for choice in choices:
        try:
            return _value(choice, value, name)
        except RecipeError:
            if len(choices) == 1:
                raise
    words = " or ".join(_TYPE_NAMES.get(choice) or ", ".join(map(repr, get_args(choice))) for choice in choices)
    raise RecipeError(f"{name} must be {words}, not {_describe(value)}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
