"""A whole run: what it leaves behind, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from profit.errors import CheckpointError, DataError, ProfitError, RecipeError, TrainingError
from profit.quantize import quant_layers
from profit.train import evaluate_run, load_checkpoint, load_network, load_recipe, train
from profit.train.trainer import Trainer

from .tiny_run import tiny_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (folder, results)."""
    folder = tmp_path_factory.mktemp("trainer") / "run"
    return folder, train(tiny_recipe("run.tensorboard=true"), folder, quiet=True)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the report takes longer than training; the fixture `run` has one."""
    monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


def test_phases_follow_the_published_order(run) -> None:
    phases = run[1]["phases"]
    table = [(phase["name"], phase["bits"], phase["epochs"]) for phase in phases]
    assert table == [
        ("fp", "W32A32", 3),
        ("a4.bn", "W32A4", 1), ("a4.train", "W32A4", 2), ("a4.bn2", "W32A4", 1),
        ("w5.bn", "W5A4", 1), ("w5.train", "W5A4", 2), ("w5.bn2", "W5A4", 1),
        ("w4.bn", "W4A4", 1), ("w4.sample", "W4A4", 2),
        ("w4.stage0", "W4A4", 2), ("w4.stage1", "W4A4", 2), ("w4.stage2", "W4A4", 2), ("w4.final", "W4A4", 1),
    ]  # fmt: skip
    assert [len(phase["history"]) for phase in phases] == [phase["epochs"] for phase in phases]


def test_the_most_unstable_third_is_frozen_stage_by_stage(run) -> None:
    results = run[1]
    scores = results["aiwq"]["scores"]
    order = sorted(scores, key=lambda name: (-scores[name], name))
    frozen = {phase["name"]: phase["frozen_layers"] for phase in results["phases"]}
    assert frozen["w4.stage0"] == [] and frozen["w4.sample"] == []
    assert frozen["w4.stage1"] == order[: len(order) // 3]
    assert frozen["w4.stage2"] == order[: 2 * len(order) // 3]
    assert len(frozen["w4.final"]) == len(results["layers"]), "the last phase freezes every weight"
    stages = {layer["name"]: layer["frozen_stage"] for layer in results["layers"] if layer["frozen_stage"]}
    assert stages == {**dict.fromkeys(frozen["w4.stage2"], 2), **dict.fromkeys(frozen["w4.stage1"], 1)}
    assert results["aiwq"]["steps"] == 4 and all(score >= 0 for score in scores.values())


def test_run_folder_is_complete(run) -> None:
    folder, results = run
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["run"]["finished"] and results["final"]["accuracy"] == results["phases"][-1]["accuracy"]
    assert results["final"]["accuracy_fp"] == results["phases"][0]["accuracy"]
    assert "<html" in (folder / "report.html").read_text()
    assert load_recipe(folder) == tiny_recipe("run.tensorboard=true")
    names = sorted(path.name for path in (folder / "checkpoints").glob("*.json"))
    assert names == ["best.json", "best_ema.json", "epoch-00020.json", "epoch-00021.json"]
    assert list((folder / "tensorboard").iterdir())
    log = (folder / "log.txt").read_text()
    assert sum(f" epoch {n}/" in line for line in log.splitlines() for n in (1, 2, 3)) == 21


def test_the_best_belongs_to_the_final_bit_widths(run) -> None:
    folder, results = run
    for name, key in (("best", "accuracy"), ("best_ema", "accuracy_ema")):
        note = load_checkpoint(folder / "checkpoints" / name)["note"]
        final = [row[key] for phase in results["phases"] if phase["bits"] == "W4A4" for row in phase["history"]]
        assert note["bits"] == "W4A4" and note["accuracy"] == max(final)
        assert evaluate_run(folder, checkpoint=name)["accuracy"] == note["accuracy"]


def test_the_saved_network_is_quantized_and_gives_the_reported_accuracy(run) -> None:
    folder, results = run
    result = evaluate_run(folder)
    assert result["accuracy"] == results["final"]["accuracy"] and result["bits"] == "W4A4"
    assert result["loss"] == results["phases"][-1]["test_loss"]
    model, architecture = load_network(folder)
    assert architecture.name == "digits_mobilenetv3" and not model.training
    assert {layer.weight_quantizer.bits for layer in quant_layers(model).values()} == {4}
    weight = model.get_submodule("blocks.1.conv_dw").quantized_weight()
    assert weight.unique().numel() <= 15
    last = evaluate_run(folder, checkpoint="last")
    assert last["accuracy"] == result["accuracy"]


@pytest.fixture
def states(monkeypatch) -> dict[str, dict]:
    """The network at the end of every phase that is trained."""
    states: dict[str, dict] = {}
    leave = Trainer._leave_phase

    def record(self, phase, label):
        states[phase.name] = {key: value.clone() for key, value in self.model.state_dict().items()}
        leave(self, phase, label)

    monkeypatch.setattr(Trainer, "_leave_phase", record)
    return states


def changed(before: dict, after: dict) -> set[str]:
    """The kinds of values that a phase changed."""
    parts = {"a": "interval", "c": "interval", "running_mean": "statistics", "running_var": "statistics"}
    parts |= {"num_batches_tracked": "statistics", "calibrated": "flag", "initialized": "flag"}
    found = set()
    for key, value in after.items():
        if not torch.equal(value, before[key]):
            owner, _, leaf = key.rpartition(".")
            is_norm = f"{owner}.running_mean" in after
            found.add(parts.get(leaf, "norm_bias" if is_norm or leaf == "bias" else "weight"))
    return found


def test_final_batchnorm_phase_leaves_weights_and_intervals_alone(tmp_path, states) -> None:
    train(tiny_recipe(), tmp_path / "run", quiet=True)
    assert changed(states["w4.stage2"], states["w4.final"]) == {"norm_bias", "statistics"}
    assert changed(states["w4.stage0"], states["w4.stage1"]) == {"norm_bias", "statistics", "interval", "weight"}
    assert changed(states["w5.train"], states["w5.bn2"]) == {"norm_bias", "statistics", "interval"}
    frozen = states["w4.stage1"], states["w4.stage2"]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    stage2 = next(phase for phase in results["phases"] if phase["name"] == "w4.stage2")
    for name in stage2["frozen_layers"]:
        assert torch.equal(frozen[0][f"{name}.weight"], frozen[1][f"{name}.weight"])
    assert not torch.equal(frozen[0]["classifier.weight"], frozen[1]["classifier.weight"])


def test_the_final_phase_trains_the_intervals_too_where_asked(tmp_path, states) -> None:
    short = ("schedule.fp_epochs=1", "schedule.weight_bits=[4]", "schedule.train_epochs=1", "schedule.stage_epochs=1")
    recipe = tiny_recipe(*short, "schedule.final_train_intervals=true", "schedule.interval_lr_mult=1.0")
    train(recipe, tmp_path / "run", quiet=True)
    before, after = states["w4.stage2"], states["w4.final"]
    assert changed(before, after) == {"norm_bias", "statistics", "interval"}
    for name in ("conv_stem.weight_quantizer.a", "conv_stem.weight_quantizer.c", "classifier.weight_quantizer.c"):
        assert not torch.equal(before[name], after[name]), name


def test_average_of_weights_can_be_the_result(tmp_path) -> None:
    short = ["schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]", "schedule.fp_epochs=4",
             "teacher.source=null", "ema.decay=0.5"]  # fmt: skip
    plain = train(tiny_recipe(*short), tmp_path / "model", quiet=True)
    ema = train(tiny_recipe(*short, "run.weights=ema"), tmp_path / "ema", quiet=True)
    assert plain["phases"][0]["history"] == ema["phases"][0]["history"]
    assert evaluate_run(tmp_path / "model")["accuracy"] == plain["final"]["accuracy"]
    assert evaluate_run(tmp_path / "ema")["accuracy"] == plain["final"]["accuracy_ema"]
    weights = [load_file(tmp_path / name / "model.safetensors")["classifier.weight"] for name in ("model", "ema")]
    assert not torch.equal(*weights)


def test_a_run_starts_from_the_weights_of_another(run, tmp_path) -> None:
    fp = ["schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]", "teacher.source=null"]
    first = train(tiny_recipe(*fp), tmp_path / "fp", quiet=True)
    source = tmp_path / "fp" / "model.safetensors"
    second = train(
        tiny_recipe("schedule.fp_epochs=0", f"model.init={source}", f"teacher.source={tmp_path / 'fp'}"),
        tmp_path / "q", quiet=True,
    )  # fmt: skip
    assert second["final"]["accuracy_fp"] == first["final"]["accuracy"]
    teacher = train(
        tiny_recipe("schedule.fp_epochs=0", f"model.init={source}"), tmp_path / "self", quiet=True
    )
    assert [p["train_loss"] for p in teacher["phases"]] == [p["train_loss"] for p in second["phases"]]
    with pytest.raises(CheckpointError, match="model.init: .* holds args"):
        train(tiny_recipe(f"model.init={source}", "model.args.head=8"), tmp_path / "x", quiet=True)


def test_folder_rules(run, tmp_path) -> None:
    folder, results = run
    recipe = tiny_recipe("run.tensorboard=true")
    with pytest.raises(ProfitError, match="already holds a finished run: --resume carries it on"):
        train(recipe, folder, quiet=True)
    assert train(recipe, folder, resume=True, quiet=True) == results
    with pytest.raises(RecipeError, match="another recipe .stored != given.: schedule.lr: 0.02 != 0.03"):
        train(tiny_recipe("schedule.lr=0.03"), folder, resume=True, quiet=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ProfitError, match="is not empty and holds no run"):
        train(recipe, tmp_path, quiet=True)
    with pytest.raises(ProfitError, match="the output folder .* is a file"):
        train(recipe, tmp_path / "notes.txt", quiet=True)
    with pytest.raises(ProfitError, match="cannot write the output folder"):
        train(recipe, tmp_path / "notes.txt" / "run", quiet=True)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path) -> None:
    folder = tmp_path / "run"
    recipe = tiny_recipe("schedule.lr=1e30", "schedule.fp_epochs=2")
    with pytest.raises(TrainingError, match=r"(loss|weights) became .* in phase a4.bn, epoch 1, step 2"):
        train(recipe, folder, quiet=True)
    assert sorted(path.stem for path in (folder / "checkpoints").glob("epoch*.json")) == ["epoch-00001", "epoch-00002"]
    result = evaluate_run(folder, checkpoint="last")
    assert result["loss"] == json.loads((folder / "results.json").read_text())["phases"][0]["test_loss"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("model.classes=12", DataError, "model.classes is 12 but the data set digits has 10 classes"),
        ("model.init=nowhere.safetensors", CheckpointError, "there is no weight file nowhere.safetensors"),
        ("model.init=weights.pt", CheckpointError, "is not a .safetensors file"),
        ("run.device=tpu9x", RecipeError, "run.device: 'tpu9x' is no device"),
        ("run.device=cuda:99", RecipeError, "run.device: cuda:99 is not here"),
        ("teacher.source=/nowhere", RecipeError, "teacher.source: there is no file or folder /nowhere"),
        ("schedule.sample_epochs=0", TrainingError, "needs AIWQ scores: set schedule.sample_epochs"),
        ("calibration.batches=0", RecipeError, "calibration.batches must be at least 1, got 0"),
    ],
)
def test_impossible_runs_are_refused_in_one_line(tmp_path, change: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        train(tiny_recipe("schedule.fp_epochs=1", "schedule.weight_bits=[4]", change), tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)


def test_weights_of_another_network_are_named(run, tmp_path) -> None:
    from safetensors.torch import save_file

    save_file({"conv_stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not fit this model: it lacks conv_stem.weight|it lacks"):
        train(tiny_recipe(f"model.init={tmp_path / 'other.safetensors'}"), tmp_path / "run", quiet=True)
    with pytest.raises(CheckpointError, match="there is no checkpoint epoch-7; this run has: best, best_ema, epoch-00020"):
        evaluate_run(run[0], checkpoint="epoch-7")
    with pytest.raises(CheckpointError, match="is not a run folder"):
        evaluate_run(tmp_path)


def test_progress_bar_ends_with_one_line_per_phase(tmp_path, capsys) -> None:
    short = ["schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]", "teacher.source=null"]
    train(tiny_recipe(*short), tmp_path / "run", quiet=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1/1] fp W32A32: 3 epochs")]
    assert len(lines) == 1 and "accuracy" in lines[0]
