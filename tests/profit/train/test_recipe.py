"""Recipes: strict keys and types, overrides, YAML there and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from profit.errors import RecipeError
from profit.train import Recipe, dump_recipe, load_recipe, parse_recipe, recipe_dict
from profit.train.recipe_io import apply_overrides, first_difference

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


def test_a_recipe_survives_yaml() -> None:
    schedule, quant = {"weight_bits": [6, 3], "profit_bits": [3]}, {"overrides": {"a": {"skip": True}}}
    recipe = parse_recipe({"schedule": schedule, "quant": quant})
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe
    assert recipe.schedule.weight_bits == (6, 3)
    assert recipe_dict(recipe)["quant"]["overrides"] == {"a": {"skip": True}}
    assert "weight_bits" not in recipe_dict(recipe)["quant"]


def test_what_is_not_given_keeps_its_default() -> None:
    assert parse_recipe({}) == parse_recipe({"model": None}) == Recipe()


def test_a_recipe_from_before_the_final_phase_had_a_choice_keeps_its_meaning() -> None:
    values = recipe_dict(Recipe())
    del values["schedule"]["final_train_intervals"]
    assert parse_recipe(values) == Recipe() and not Recipe().schedule.final_train_intervals


def test_overrides_change_single_values(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("schedule: {lr: 0.5}\n")
    recipe = load_recipe(path, ["schedule.lr=1e-3", "data.fold=2", "calibration.percentile=max", "model.args.width=2"])
    assert (recipe.schedule.lr, recipe.data.fold, recipe.calibration.percentile) == (1e-3, 2, "max")
    assert recipe.model.args == {"width": 2}


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_shipped_recipes_load(name: str) -> None:
    recipe = load_recipe(RECIPES / name)
    assert recipe.run.name == Path(name).stem
    if recipe.schedule.profit:
        assert recipe.schedule.stages == 3 and recipe.schedule.weight_bits[-1] in recipe.schedule.profit_bits


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("schedule.trian_epochs=3", "unknown recipe key schedule.trian_epochs; did you mean schedule.train_epochs?"),
        ("schedule.fold=1", "unknown recipe key schedule.fold; did you mean data.fold?"),
        ("modle.name=x", "unknown recipe key modle; did you mean model?"),
        ("data.fold=one", r"data.fold must be a whole number, not 'one' \(str\)"),
        ("run.threads=true", "run.threads must be a whole number"),
        ("optim.nesterov=1", "optim.nesterov must be true or false"),
        ("schedule.weight_bits=4", "schedule.weight_bits must be a list"),
        ("schedule.weight_bits=[4.5]", r"schedule.weight_bits\[0\] must be a whole number"),
        ("schedule.weight_bits=[9]", "schedule: weight_bits must be within 2..8, got .9,."),
        ("schedule.act_bits=[1]", "schedule: act_bits must be within 2..8, got .1,."),
        ("quant.padding=none", "quant.padding must be one of negative, zero"),
        ("quant.weight_bits=4", "quant.weight_bits: bit widths are set phase by phase in schedule.weight_bits"),
        ("calibration.percentile=most", "calibration.percentile must be a number or 'max'"),
        ("model.args=3", "model.args must be a mapping"),
        ("data=3", r"data is a section of keys, not 3 \(int\)"),
        ("data.fold.x=3", "data.fold is a value, not a section"),
        ("data.fold", "--set takes section.key=value"),
        ("data.fold=[", "is not valid YAML"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(apply_overrides({"data": {"fold": 1}}, [override]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- 1", "a recipe is a mapping"),
        (None, "there is no recipe"),
        (b"\xff\xfe", "cannot read|YAML"),
    ],
)
def test_unusable_files(tmp_path, content, message: str) -> None:
    path = tmp_path / "r.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_first_difference_names_the_value() -> None:
    ours, theirs = recipe_dict(Recipe()), recipe_dict(parse_recipe({"schedule": {"lr": 0.5}}))
    assert first_difference(ours, ours) is None
    assert first_difference(ours, theirs) == "schedule.lr: 0.005 != 0.5"
