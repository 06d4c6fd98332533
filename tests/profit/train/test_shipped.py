"""Recipes by name: which one a name means, from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from profit.cli import main
from profit.errors import RecipeError
from profit.train import load_recipe, shipped_recipes

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_name_means_the_shipped_recipe_and_a_path_the_file() -> None:
    assert sorted(shipped_recipes()) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for name in ("smoke", "digits_w4a4"):
        assert load_recipe(name) == load_recipe(Path(name)) == load_recipe(RECIPES / f"{name}.yaml")
    assert load_recipe("smoke", ["run.seed=3"]).run.seed == 3


def test_what_is_in_this_folder_wins_and_is_said_to(tmp_path, capsys) -> None:
    plan = ["train", "smoke", "--dry-run", "-s", "data.name=imagefolder", "-s", "data.path=none"]
    Path("smoke").mkdir()  # a folder that is no run folder is no recipe
    assert load_recipe("smoke").run.name == "smoke"
    assert main(plan) == 0 and "in this folder" not in capsys.readouterr().err
    Path("smoke", "recipe.yaml").write_text("run: {name: here}\n")
    assert load_recipe("smoke").run.name == "here"
    assert main(plan) == 0
    told = capsys.readouterr().err
    assert told == "smoke: the one in this folder, not the recipe of that name that comes with the package\n"
    Path("digits_w4a4").write_text("run: {name: file}\n")
    assert load_recipe("digits_w4a4").run.name == "file"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits_w4", "there is no recipe digits_w4; did you mean digits_w"),
        ("smoke.yaml", "there is no recipe smoke.yaml; did you mean smoke?"),
        ("recipes/smoke.yaml", "there is no recipe recipes/smoke.yaml; did you mean smoke?"),
        ("nothing/of/the/kind", "there is no recipe nothing/of/the/kind;"),
        ("", "cannot read the recipe ."),
        ("a" * 5000, "there is no recipe aaa"),
        ("a\0b", "there is no recipe a"),
    ],
)
def test_an_unknown_name_is_refused_in_one_line_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name)
    told = str(caught.value)
    assert told.startswith(message) and "\n" not in told
    assert "`profit recipes` lists those that come with the package" in told or name == ""


def test_the_command_lists_them(capsys) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 5 for line in lines), "with a title"
