"""The plan of a recipe: phases, frozen layers, time; and the ImageNet recipes on images made here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from profit.cli import main
from profit.errors import RecipeError
from profit.schedule import PhaseSchedule
from profit.train import load_recipe, train
from profit.train.network import Architecture
from profit.train.teacher import load_teacher

from .tiny_run import tiny_recipe

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
IMAGENET = sorted(path.name for path in RECIPES.glob("imagenet_*.yaml"))
# a thousandth of ImageNet: its images, one epoch for each of the published phases, and a size that a CPU manages
SMALL = (
    "model.pretrained=false", "model.classes=null", "teacher.source=self", "data.image_size=32", "data.workers=0",
    "data.batch_size=32", "calibration.batches=2", "schedule.fp_epochs=1", "schedule.bn_epochs=1", "schedule.train_epochs=1",
    "schedule.sample_epochs=1", "schedule.stage_epochs=1", "schedule.final_bn_epochs=1", "run.eval_every=0", "run.threads=1",
    "run.tensorboard=false", "run.device=cpu",
    # of so few images some channels become constant, whose BatchNorms hand on gradients of 1e8, in the reference as well
    "optim.clip_grad=3.0",
)  # fmt: skip


def _image_folder(root: Path, train: int, val: int, classes: int, rng: torch.Generator) -> Path:
    """Images whose class is their colour."""
    from PIL import Image

    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            label = index % classes
            folder = root / split / f"class{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            colour = torch.tensor([label * 255 // classes, 255 - label * 255 // classes, 128])
            noise = torch.randint(-60, 60, (40, 48, 3), generator=rng)
            Image.fromarray((colour + noise).clamp(0, 255).byte().numpy()).save(folder / f"{index:04}.jpg")
    return root


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """The report is not looked at here, and drawing it takes longer than training."""
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


def test_without_data_the_time_is_computed_or_said_to_be_unknown(capsys) -> None:
    command = ["train", str(RECIPES / "imagenet_mobilenetv2_w4a4.yaml"), "--dry-run", "-s", "data.path=/no/such/folder"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert re.search(r"^total +200$", text, re.MULTILINE)
    assert "time: not estimated, because data.path /no/such/folder is not a folder" in text
    frozen = dict(re.findall(r"^(w4\.stage\d|w4\.final) .* (\d+ of \d+|0)$", text, re.MULTILINE))
    assert frozen == {"w4.stage0": "0", "w4.stage1": "17 of 52", "w4.stage2": "34 of 52", "w4.final": "53 of 53"}
    final = next(line.split() for line in text.splitlines() if line.startswith("w4.final"))
    assert final[5] == "a,c+bn" and final[9] == "5e-05", "as in the published code"
    assert main([*command, "--images", "1000", "--throughput", "20"]) == 0
    text = capsys.readouterr().out
    assert "computed, not measured: 1000 images per epoch at the given 20 images/s" in text
    assert "estimated time: 2 h 47 min" in text  # 200 * 1000 / 20 s
    assert re.search(r"^fp .* 0 +12 min$", text, re.MULTILINE)


def test_the_published_learning_rates_and_phases() -> None:
    recipe = load_recipe(RECIPES / "imagenet_mobilenetv2_w4a4.yaml")
    by_name = {phase.name: phase for phase in recipe.schedule.phases}
    assert recipe.schedule == PhaseSchedule.published()
    assert [phase.epochs for phase in recipe.schedule.phases] == [15, *[5, 15, 5] * 5, 5, 5, 15, 15, 15, 5]
    stage, bn, sample = by_name["w4.stage1"], by_name["w8.bn"], by_name["w4.sample"]
    assert [stage.lr_at(e) for e in (0, 3, 15)] == pytest.approx([0.0005, 0.005, 5e-6])
    assert bn.lr_at(0) == 0.005 and not bn.train_weights and {sample.lr_at(e) for e in range(6)} == {0.005}
    assert (stage.weight_decay, stage.interval_lr_mult, recipe.data.batch_size) == (4e-5, 0.01, 256)
    assert (recipe.ema.decay, recipe.optim.momentum, recipe.optim.nesterov) == (0.9997, 0.9, True)
    assert (recipe.teacher.source, recipe.teacher.weight) == ("resnet101.tv_in1k", 1.0)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_say_what_they_are(name: str) -> None:
    text, recipe = (RECIPES / name).read_text(), load_recipe(RECIPES / name)
    assert recipe.schedule.final_train_intervals, "all of them take the published phases"
    published = name == "imagenet_mobilenetv2_w4a4.yaml"
    assert ("on ImageNet as published" in text) == published and ("ADAPTED" in text) == (not published)
    assert recipe.schedule.total_epochs == (200 if name.endswith("w4a4.yaml") else 250)
    import timm

    assert timm.is_model_pretrained(recipe.model.name) and timm.is_model_pretrained(recipe.teacher.source)


def test_measured_time_and_the_names_once_there_are_scores(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    changes = ("schedule.fp_epochs=1", "schedule.weight_bits=[4]", "optim.accumulate=2")
    results = train(tiny_recipe(*changes), folder, quiet=True)
    files = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert main(["train", str(folder), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "measured here (CPU" in text and re.search(r"estimated time: [0-9.]+ (s|min)", text)
    for phase in results["phases"]:
        if phase["name"] in ("w4.stage1", "w4.stage2"):
            assert f"{phase['name']} freezes {', '.join(phase['frozen_layers'])}\n" in text
    assert sorted(folder.rglob("*")) == files, "nothing is written"


def test_an_imagenet_recipe_runs_on_a_handful_of_images(tmp_path, rng) -> None:
    root = _image_folder(tmp_path / "data", 24, 8, 4, rng)
    fewer = ("data.batch_size=12", "schedule.act_bits=[4]", "schedule.weight_bits=[4]", "schedule.fp_epochs=0",
             "schedule.bn_epochs=0", "ema.enabled=false", "teacher.source=null")  # fmt: skip
    recipe = load_recipe(RECIPES / "imagenet_mobilenetv2_w4a4.yaml", [*SMALL, *fewer, f"data.path={root}"])
    results = train(recipe, tmp_path / "run", quiet=True)
    frozen = {phase["name"]: phase["frozen"] for phase in results["phases"] if "stage" in phase["name"]}
    assert frozen == {"w4.stage0": 0, "w4.stage1": 17, "w4.stage2": 34}
    assert results["run"]["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipes_at_a_thousandth(name: str, tmp_path, rng) -> None:
    root = _image_folder(tmp_path / "data", 1281, 50, 10, rng)
    # 41 steps an epoch, not 5000: the average of the weights must follow in as many epochs, and weights and intervals need
    # higher rates, as in recipes/digits_w4a4.yaml. Full precision has to train what the pretrained weights would be.
    few = ("ema.decay=0.96", "schedule.fp_epochs=4", "schedule.fp_lr=0.05", "schedule.lr=0.05", "schedule.interval_lr_mult=1.0")
    recipe = load_recipe(RECIPES / name, [*SMALL, *few, f"data.path={root}"])
    results = train(recipe, tmp_path / "run", quiet=True)
    assert len(results["phases"]) == len(load_recipe(RECIPES / name).schedule.phases)
    assert all(torch.isfinite(torch.tensor(phase["train_loss"])) for phase in results["phases"])
    assert results["final"]["accuracy"] > 30, "ten colours; chance is 10"


def test_teachers_of_torchvision_and_timm() -> None:
    thousand, ten = (Architecture("digits_mobilenetv3", classes, 3, 16, {}) for classes in (1000, 10))
    for source in ("torchvision/squeezenet1_1", "lcnet_035"):
        teacher = load_teacher(source, thousand, torch.device("cpu"), pretrained=False)
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert teacher(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
        with pytest.raises(RecipeError, match=f"teacher.source: {source} has 1000 classes and 3 input .*, the student 10"):
            load_teacher(source, ten, torch.device("cpu"), pretrained=False)
    with pytest.raises(RecipeError, match="teacher.source: .*lcnet_03.*did you mean"):
        load_teacher("lcnet_03x", thousand, torch.device("cpu"))
    with pytest.raises(RecipeError, match="teacher.source: the weights of torchvision/no_such_net cannot be had"):
        load_teacher("torchvision/no_such_net", thousand, torch.device("cpu"))


NO_WEIGHT_BITS = ("schedule.weight_bits=[]", "schedule.profit_bits=[]", "schedule.bn_epochs=0")


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(("run.amp=bf16", *NO_WEIGHT_BITS), id="bf16"),
        pytest.param(("run.channels_last=true", *NO_WEIGHT_BITS), id="channels_last"),
        pytest.param(("optim.accumulate=4", "schedule.weight_bits=[4]"), id="accumulation, with AIWQ over the whole step"),
        pytest.param(("run.compile=true", *NO_WEIGHT_BITS), id="compile", marks=pytest.mark.slow),
    ],
)
def test_ways_to_train_give_a_finite_loss_and_finish(tmp_path, changes: tuple[str, ...]) -> None:
    short = ["schedule.fp_epochs=1", "schedule.train_epochs=1", "schedule.sample_epochs=1", "schedule.stage_epochs=1"]
    results = train(tiny_recipe(*short, *changes), tmp_path / "run", quiet=True)
    assert results["run"]["finished"] and all(0 < phase["train_loss"] < 10 for phase in results["phases"])
