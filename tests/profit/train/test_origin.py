"""A run that is resumed has the recipe, the teacher and the data it was begun with, or says in one line what changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import profit.train.trainer as trainer
from profit.cli import main
from profit.data import create_data
from profit.data.inventory import inventory
from profit.distributed import from_first
from profit.errors import CheckpointError, RecipeError
from profit.train import load_checkpoint, load_network, load_recipe, save_checkpoint, train
from profit.train.origin import data_change
from profit.train.recipe import DataRecipe
from profit.train.teacher import own_teacher

from .tiny_run import VALUES, interrupt_after

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
# fp 1 | a4: train 2-4
CHANGES = {
    "schedule": {"fp_epochs": 1, "fp_lr": 0.05, "act_bits": [4], "weight_bits": [], "profit_bits": [], "bn_epochs": 0,
                 "final_bn_epochs": 0, "train_epochs": 3, "lr": 0.02},
    "data": {"name": "imagefolder", "image_size": 16, "batch_size": 8, "workers": 0},
}  # fmt: skip


def image_folder(root: Path) -> Path:
    """Two classes, eight training and four test images each."""
    for split, count in (("train", 8), ("val", 4)):
        for label, name in enumerate(("cat", "cow")):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.new("RGB", (16, 16 + 40 * label), (200 * label, 20 * number, 50))
                image.save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is not looked at here, and drawing it takes longer than training."""
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder with data, recipe and a run that was interrupted in the quantized phase; and one of a run before it."""
    place = tmp_path_factory.mktemp("origin")
    work = place / "work"
    data = image_folder(work / "data")
    recipe = work / "tiny.yaml"
    values = VALUES | CHANGES
    recipe.write_text(yaml.safe_dump(values | {"data": values["data"] | {"path": str(data)}}))
    with pytest.MonkeyPatch.context() as patch:
        for name, epochs in (("early", 0), ("run", 2)):
            interrupt_after(patch, epochs)
            assert main(["train", str(recipe), "--out", str(work / name), "-q"]) == 130
            patch.undo()
    shutil.copytree(work, place / "kept")
    return place


@pytest.fixture
def work(kept):
    """The folder as it was kept, at the same path."""
    shutil.rmtree(kept / "work")
    shutil.copytree(kept / "kept", kept / "work")
    return kept / "work"


def resume(work: Path, *options: str, run: str = "run") -> int:
    return main(["train", str(work / "tiny.yaml"), "--out", str(work / run), "--resume", "-q", *options])


def remove_image(work: Path) -> None:
    (work / "data/train/cow/7.png").unlink()


def relabel(work: Path) -> None:
    (work / "data/train/cow/7.png").rename(work / "data/train/cat/17.png")


def rename_class(work: Path) -> None:
    for split in ("train", "val"):
        (work / "data" / split / "cow").rename(work / "data" / split / "dog")


def swap_classes(work: Path) -> None:
    """The images stay where they are; each class takes the name of the other, so that names and sizes differ."""
    folder = work / "data/train"
    (folder / "cat").rename(folder / "x")
    (folder / "cow").rename(folder / "cat")
    (folder / "x").rename(folder / "cow")


def replace_image(work: Path) -> None:
    Image.new("RGB", (99, 99)).save(work / "data/train/cow/7.png")


def replace_test_image(work: Path) -> None:
    Image.new("RGB", (99, 99)).save(work / "data/val/cow/3.png")


def other_teacher(work: Path) -> None:
    path = work / "run/teacher.safetensors"
    model, architecture = load_network(path)
    next(model.parameters()).data.add_(1)
    own_teacher(model, architecture, path, stored=False)


def edit_recipe(work: Path) -> None:
    """The file that stands for the recipe on the command line."""
    (work / "tiny.yaml").write_text((work / "tiny.yaml").read_text().replace("lr: 0.02", "lr: 0.03"))


def edit_stored_recipe(work: Path) -> None:
    """The file in the run folder."""
    path = work / "run/recipe.yaml"
    assert "  lr: 0.02\n" in path.read_text()
    path.write_text(path.read_text().replace("  lr: 0.02\n", "  lr: 0.03\n"))


SAME_NUMBER = "the same number of images, but other names or sizes"
CASES = {
    "teacher changed": (other_teacher, "teacher", "teacher.safetensors was changed"),
    "image removed": (remove_image, "data", "train: 15 images, 16 when the run was begun"),
    "label changed": (relabel, "data", f"train: {SAME_NUMBER}"),
    "class renamed": (rename_class, "data", "class 'cow' is now called 'dog'"),
    "image replaced": (replace_image, "data", f"train: {SAME_NUMBER}"),
    "test image replaced": (replace_test_image, "data", f"test: {SAME_NUMBER}"),
    "another recipe": (edit_recipe, "recipe", "started with another recipe (stored != given): schedule.lr: 0.02 != 0.03"),
    "recipe edited": (edit_stored_recipe, "recipe", "recipe.yaml was edited (then != now): schedule.lr: 0.02 != 0.03"),
}


HINTS = {"recipe": "the given recipe", "teacher": "this teacher", "data": "these data"}


@pytest.mark.parametrize("name", CASES)
def test_what_changed_is_told_in_one_line(name, work, capsys) -> None:
    change, kind, line = CASES[name]
    change(work)
    before = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
    others = [part for other in HINTS if other != kind for part in ("--accept-changed", other)]
    for options in ((), others):
        assert resume(work, *options) == 2
        told = capsys.readouterr().err
        assert told == f"error: {work / 'run'}: {line} (--accept-changed {kind} goes on with {HINTS[kind]})\n"
    assert {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()} == before, "nothing is written"


@pytest.mark.parametrize("name", ["teacher changed", "image removed", "another recipe", "recipe edited"])
def test_what_is_accepted_is_recorded(name, work, capsys) -> None:
    change, kind, line = CASES[name]
    change(work)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert resume(work, "--accept-changed", kind) == 130
    assert f"accepted: {line}\n" in capsys.readouterr().out and f"accepted: {line}\n" in (work / "run/log.txt").read_text()
    assert resume(work) == 0, "what was accepted is what the run now goes by"
    assert "accepted" not in capsys.readouterr().out


def test_images_that_change_places_between_classes_of_equal_names(work, capsys) -> None:
    """Names alone do not tell; sizes do, where they differ."""
    sizes = [{path.stat().st_size for path in (work / "data/train" / name).iterdir()} for name in ("cat", "cow")]
    assert sizes[0] != sizes[1]
    swap_classes(work)
    assert resume(work) == 2
    assert f"train: {SAME_NUMBER} (--accept-changed data" in capsys.readouterr().err


def test_several_changes_are_told_together(work, capsys) -> None:
    for change in (edit_recipe, other_teacher, rename_class):
        change(work)
    assert resume(work, "--accept-changed", "teacher") == 2
    assert capsys.readouterr().err == (
        f"error: {work / 'run'}: started with another recipe (stored != given): schedule.lr: 0.02 != 0.03; class 'cow' is now "
        "called 'dog' (--accept-changed recipe goes on with the given recipe, --accept-changed data goes on with these data)\n"
    )


def test_a_run_folder_in_place_of_the_recipe_is_compared_with_what_it_was(work, capsys) -> None:
    edit_stored_recipe(work)
    assert main(["train", str(work / "run"), "--resume", "-q"]) == 2
    assert "started with another recipe (stored != given): schedule.lr: 0.02 != 0.03 (--acc" in capsys.readouterr().err
    assert main(["train", str(work / "run"), "--resume", "-q", "--accept-changed", "recipe"]) == 0
    assert json.loads((work / "run/results.json").read_text())["recipe"]["schedule"]["lr"] == 0.03


def test_a_recipe_that_was_edited_and_accepted_is_stored_again(work) -> None:
    edit_stored_recipe(work)
    assert resume(work, "--accept-changed", "recipe") == 0
    assert "  lr: 0.02\n" in (work / "run/recipe.yaml").read_text()


@pytest.mark.parametrize("accepted", [(), ("--accept-changed", "teacher")])
def test_a_lost_teacher_is_never_replaced_by_the_half_trained_student(work, capsys, accepted) -> None:
    (work / "run/teacher.safetensors").unlink()
    assert resume(work, *accepted) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {work / 'run'}: teacher.safetensors is missing, and it cannot be made again")
    assert error.count("\n") == 1 and not (work / "run/teacher.safetensors").exists()


def test_a_teacher_that_is_not_made_yet_cannot_be_lost_or_slipped_in(work, kept, tmp_path) -> None:
    """The run that has no checkpoint of the quantized phase makes its teacher, whatever lies there."""
    early = work / "early"
    assert not (early / "teacher.safetensors").exists()
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1)
        assert resume(work, run="early") == 130  # the full-precision phase is over, and kept
    made = (early / "teacher.safetensors").read_bytes()
    shutil.copy(work / "run/teacher.safetensors", tmp_path / "whole")
    assert made == (tmp_path / "whole").read_bytes()
    other_teacher(work)
    shutil.copy(work / "run/teacher.safetensors", early / "teacher.safetensors")
    assert resume(work, run="early") == 0
    assert (early / "teacher.safetensors").read_bytes() == made


def test_a_teacher_of_plain_weights_is_none(work, capsys) -> None:
    from safetensors.torch import load_file, save_file

    path = work / "run/teacher.safetensors"
    save_file(load_file(path), path)
    assert resume(work, "--accept-changed", "teacher") == 2
    assert "teacher.safetensors is not what a run wrote" in capsys.readouterr().err


def test_a_teacher_from_a_file_is_compared_by_its_content(work, capsys) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shutil.copy(work / "run/teacher.safetensors", work / "of.safetensors")
        options = ("-s", f"teacher.source={work / 'of.safetensors'}")
        interrupt_after(patch, 1)
        assert main(["train", str(work / "tiny.yaml"), "--out", str(work / "new"), "-q", *options]) == 130
    other_teacher(work)
    shutil.copy(work / "run/teacher.safetensors", work / "of.safetensors")
    capsys.readouterr()
    assert resume(work, *options, run="new") == 2
    assert f": the teacher {work / 'of.safetensors'} was changed (--accept-changed teacher" in capsys.readouterr().err


def test_where_a_run_trains_is_no_change(work) -> None:
    assert resume(work, "-s", "run.keep_checkpoints=3", "-s", "run.timeout_s=99") == 0


def test_a_finished_run_is_compared_too(work, capsys) -> None:
    assert resume(work) == 0
    for name in ("image removed", "recipe edited"):
        change, _, line = CASES[name]
        change(work)
        capsys.readouterr()
        assert resume(work) == 2
        assert line in capsys.readouterr().err
    assert resume(work, "--accept-changed", "data", "--accept-changed", "recipe") == 0
    assert "is finished already" in capsys.readouterr().out


def test_checkpoints_of_earlier_versions_are_resumed_with_a_warning(work, capsys) -> None:
    base = sorted((work / "run/checkpoints").glob("epoch-*.json"))[-1].with_suffix("")
    state = load_checkpoint(base)
    del state["origin"], state["class_names"]
    save_checkpoint(base, state)
    remove_image(work)
    edit_recipe(work)
    assert resume(work) == 2
    assert "another recipe (stored != given): schedule.lr: 0.02 != 0.03" in capsys.readouterr().err
    shutil.copy(work.parent / "kept/tiny.yaml", work / "tiny.yaml")
    teacher = (work / "run/teacher.safetensors").read_bytes()
    (work / "run/teacher.safetensors").unlink()
    assert resume(work) == 2
    assert "teacher.safetensors is missing, and it cannot be made again" in capsys.readouterr().err
    (work / "run/teacher.safetensors").write_bytes(teacher)
    assert resume(work) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert told == ["warning: the checkpoint is of an earlier version, without a record of teacher and data to compare"]


def test_words_that_are_none(work, capsys) -> None:
    assert resume(work, "--accept-changed", "weather") == 2
    assert capsys.readouterr().err == "error: --accept-changed 'weather': recipe, teacher or data may have changed\n"
    assert main(["train", str(work / "tiny.yaml"), "--out", str(work / "new"), "--accept-changed", "data"]) == 2
    assert "--accept-changed belongs to --resume" in capsys.readouterr().err and not (work / "new").exists()


def test_leftovers_of_a_killed_process_go_at_the_next_start(work) -> None:
    names = (".results.json.0123456789abcdef.tmp", "checkpoints/.best.json.0123456789abcdef.tmp")
    left = [work / "run" / name for name in (*names, ".model.safetensors.tmp")]  # the last as earlier versions called it
    for path in left:
        path.write_text("half")
    edit_recipe(work)
    assert resume(work) == 2  # also where nothing else is done
    assert not any(path.exists() for path in left)


def test_a_process_that_died_before_it_had_written_its_recipe_does_not_bar_the_folder(work, monkeypatch) -> None:
    folder = work / "new"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".recipe.yaml.0123456789abcdef.tmp").write_text("half")
    interrupt_after(monkeypatch, 0)
    assert main(["train", str(work / "tiny.yaml"), "--out", str(folder), "-q"]) == 130
    assert (folder / "recipe.yaml").is_file() and not list(folder.glob(".*"))


def test_links_that_were_planted_in_the_run_folder_are_not_followed(work, tmp_path, capsys) -> None:
    victims = {name: tmp_path / name for name in ("results.json", "checkpoints/best.json", "log.txt")}
    (tmp_path / "checkpoints").mkdir()
    for name, victim in victims.items():
        victim.write_text("mine")
        (work / "run" / name).unlink(missing_ok=True)
        (work / "run" / name).symlink_to(victim)
        assert resume(work) == 2
        assert f"{work / 'run' / name} is a link that leads out of the run folder" in capsys.readouterr().err
        (work / "run" / name).unlink()
    with pytest.MonkeyPatch.context() as patch:  # planted while the run goes on
        save = trainer.save_checkpoint
        patch.setattr(trainer, "save_checkpoint", lambda path, state: (plant(), save(path, state)))

        def plant() -> None:
            for name in ("results.json", "checkpoints/best.json", "checkpoints/.best.safetensors.new"):
                if not (work / "run" / name).is_symlink():
                    (work / "run" / name).unlink(missing_ok=True)
                    (work / "run" / name).symlink_to(tmp_path / "results.json")

        assert resume(work) == 0
    assert all(victim.read_text() == "mine" for victim in victims.values())
    assert not (work / "run/results.json").is_symlink()


PLACES = [("recipe",), ("recipe", "values"), ("data", "class_names"), ("data", "train"), ("data", "test", "images")]


@pytest.mark.parametrize(("keys", "value"), [
    *((keys, value) for keys in PLACES for value in (5, [1], None)), *((keys, 5) for keys in ((), ("teacher", "sha256"))),
])  # fmt: skip
def test_a_record_made_to_deceive_is_one_line(work, capsys, keys, value) -> None:
    base = sorted((work / "run/checkpoints").glob("epoch-*.json"))[-1].with_suffix("")
    state = load_checkpoint(base)
    place, names = state, ("origin", *keys)
    for key in names[:-1]:
        place = place[key]
    place[names[-1]] = value
    save_checkpoint(base, state)
    assert resume(work) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ("damaged: origin is of another type" in error or "test: 8 images, " in error), error


def test_class_names_are_kept(work, capsys) -> None:
    assert resume(work) == 0
    assert json.loads((work / "run/results.json").read_text())["data"]["class_names"] == ["cat", "cow"]
    for path in ("", "checkpoints/best", "teacher.safetensors"):
        assert load_network(work / "run" / path)[1].class_names == ("cat", "cow")
    assert create_data(DataRecipe(limit=64)).class_names == tuple("0123456789")
    init = ("-s", f"model.init={work / 'run'}", "-s", "schedule.fp_epochs=0")
    rename_class(work)  # as a new task: names do not count for model.init
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 0)
        assert main(["train", str(work / "tiny.yaml"), "--out", str(work / "new"), "-q", *init]) == 130


def test_other_classes_are_not_evaluated(work, capsys) -> None:
    assert main(["evaluate", str(work / "run"), "--checkpoint", "last"]) == 0
    rename_class(work)
    capsys.readouterr()
    for data in ((), ("--data", str(work / "data"))):
        assert main(["evaluate", str(work / "run"), "--checkpoint", "last", *data]) == 2
        error = capsys.readouterr().err
        assert f"class 1 of imagefolder:data is 'dog', for the network of {work / 'run'} it is 'cow'" in error


def test_the_difference_of_two_data_sets() -> None:
    def data(*names, train=(5, "a"), test=(3, "b")):
        splits = {key: dict(zip(("images", "sha256"), value, strict=True)) for key, value in (("train", train), ("test", test))}
        return {"class_names": list(names), **splits}

    first = data("a", "b", "c")
    for second, line in (
        (data("a", "b", "c"), None),
        (data("a", "x", "c"), "class 'b' is now called 'x'"),
        (data("a", "b"), "class 'c' is missing"),
        (data("a", "b", "c", "d", "e"), "class 'd' is new and 1 more"),
        (data("x", "y", "c"), "class 'a' is missing and 1 more, class 'x' is new and 1 more"),
        (data("b", "a", "c"), "class 'a' is now number 1, not 0"),
        (data("a", "b", "c", "c"), "4 classes, 3 when the run was begun"),
        (data("a", "b", "c", test=(4, "b")), "test: 4 images, 3 when the run was begun"),
        (data("a", "b", "c", test=(3, "x")), f"test: {SAME_NUMBER}"),
        (data("a", "b", "c", test=(3, None)), f"test: {SAME_NUMBER}"),
    ):
        assert data_change(first, second) == line


def test_the_inventory_of_torchvisions_and_streamed_sets(tmp_path) -> None:
    class InOneFile:
        raw_folder = str(tmp_path / "MNIST/raw")

    class Stream:
        class reader:
            class split_info:
                filenames = ("a.tar", "b.tar")

    class Unknown:
        reader = object()

    (tmp_path / "MNIST/raw").mkdir(parents=True)
    for name in ("MNIST/raw/images", "a.tar", "b.tar", "unrelated"):
        (tmp_path / name).write_text("1234")
    found = {kind: inventory(kind(), str(tmp_path), 7) for kind in (InOneFile, Stream, Unknown)}
    assert all(entry["images"] == 7 for entry in found.values()) and found[Unknown]["sha256"] is None
    (tmp_path / "unrelated").write_text("12345")
    assert found == {kind: inventory(kind(), str(tmp_path), 7) for kind in found}
    for name in ("MNIST/raw/images", "b.tar"):
        (tmp_path / name).write_text("12345")
    changed = {kind for kind in found if found[kind] != inventory(kind(), str(tmp_path), 7)}
    assert changed == {InOneFile, Stream}


def test_no_image_is_opened_to_record_them(work, monkeypatch) -> None:
    data = create_data(DataRecipe(name="imagefolder", path=str(work / "data"), image_size=16, workers=0))
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: pytest.fail(f"opened {args}"))
    assert data.inventory()["train"]["images"] == 16


def test_an_error_of_process_0_in_one_process() -> None:
    def fails() -> None:
        raise RecipeError("text")

    with pytest.raises(RecipeError, match="text"):
        from_first(fails)
    assert from_first(lambda: [1, "a"]) == [1, "a"]


def test_the_function_accepts_the_same_words(work) -> None:
    recipe = load_recipe(work / "tiny.yaml")
    remove_image(work)
    with pytest.raises(CheckpointError, match="train: 15 images, 16 when the run was begun"):
        train(recipe, work / "run", resume=True, quiet=True)
    assert train(recipe, work / "run", resume=True, quiet=True, accept_changed=["data"])["run"]["finished"]
    assert torch.is_tensor(next(iter(load_checkpoint(work / "run/checkpoints/best")["model"].values())))
