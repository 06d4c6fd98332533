"""`profit export` and `profit verify` on a run."""

from __future__ import annotations

import json

import pytest
import torch

import profit
from profit.cli import main
from profit.train.network import load_network
from profit.train.trainer import train
from tests.profit.train.tiny_run import tiny_recipe

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run at W4A4 and one in full precision."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["schedule.fp_epochs=1", "schedule.train_epochs=1", "schedule.stage_epochs=1", "schedule.weight_bits=[4]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("profit.report.write_report", lambda folder: folder)
        train(tiny_recipe(*short), folder / "w4a4", quiet=True)
        full = ["schedule.fp_epochs=1", "schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]"]
        train(tiny_recipe(*full, "teacher.source=null"), folder / "fp", quiet=True)
    return folder


def command(capsys, *arguments):
    """(exit status, standard output, standard error)"""
    status = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(("format", "name", "options"), [
    ("packed", "net.safetensors", []),
    ("onnx", "net.onnx", ["--integer", "--opset", "17"]),
    pytest.param("packed", "net.safetensors", ["--no-restorable"], marks=pytest.mark.slow),
    pytest.param("onnx", "net.onnx", [], marks=pytest.mark.slow),
    pytest.param("torch", "net.pt2", ["--checkpoint", "best"], marks=pytest.mark.slow),
])  # fmt: skip
def test_export_and_verify(format, name, options, run, tmp_path, capsys):
    file = tmp_path / name
    status, out, err = command(capsys, "export", run / "w4a4", "--format", format, "--out", file, *options)
    assert status == 0, err
    assert out.startswith(f"{file}: ") and f"{file.stat().st_size:,} bytes" in out
    if "--integer" in options:
        assert "float: conv_stem: its input is not quantized" in out and "QLinearConv" in out
    chosen = options if "--checkpoint" in options else []
    trust = ["--trust"] if format == "torch" else []
    status, out, err = command(capsys, "verify", file, "--against", run / "w4a4", *chosen, *trust)
    assert status == 0 and out.strip().endswith("passed"), out + err
    assert "on 64 images" in out and "top-1 agrees on 64 of 64" in out
    if format == "packed":
        model, architecture = load_network(run / "w4a4" / "model.safetensors")
        x = torch.randn(2, 1, 16, 16)
        if not options:
            assert torch.equal(profit.load_packed_(architecture.build(), file)(x), model(x))
        assert profit.IntegerRuntime(profit.read_packed(file))(x).shape == (2, 10)


def test_verify_finds_another_network(run, tmp_path, capsys):
    file = tmp_path / "net.safetensors"
    model, architecture = load_network(run / "w4a4" / "model.safetensors")
    with torch.no_grad():
        next(iter(profit.quant_layers(model).values())).weight.neg_()
    profit.export_packed(model, file, architecture.example_input())
    status, out, _ = command(capsys, "verify", file, "--against", run / "w4a4", "--images", "16", "--json")
    result = json.loads(out)
    assert status == 1 and result["failures"] and result["images"] == 16


ERRORS = {
    "not quantized yet": (["export", "RUN/fp", "--format", "onnx", "--out", "OUT/a.onnx"],
                          "the model is not quantized yet: every layer's weight is in full precision"),
    "opset": (["export", "RUN/w4a4", "--format", "onnx", "--opset", "12", "--out", "OUT/a.onnx"],
              "ONNX opset 12 is not supported: choose 13 to 25"),
    "no run": (["export", "OUT", "--format", "onnx", "--out", "OUT/a.onnx"], "is not a run folder: it has no recipe.yaml"),
    "ending": (["export", "RUN/w4a4", "--format", "packed", "--out", "OUT/a.onnx"], "format packed ends in .safetensors"),
    "option": (["export", "RUN/w4a4", "--format", "packed", "--integer", "--out", "OUT/a.safetensors"],
               "belong to --format onnx"),
    "restorable": (["export", "RUN/w4a4", "--format", "torch", "--no-restorable", "--out", "OUT/a.pt2"],
                   "belongs to --format packed"),
    "no folder": (["export", "RUN/w4a4", "--format", "packed", "--out", "OUT/none/a.safetensors"], "cannot write"),
    "no file": (["verify", "OUT/a.onnx", "--against", "RUN/w4a4"], "there is no ONNX file"),
    "a weight file": (["verify", "RUN/w4a4/model.safetensors", "--against", "RUN/w4a4"], "is not a packed network"),
    "no images": (["verify", "OUT/a.onnx", "--against", "RUN/w4a4", "--images", "0"], "at least one image is needed"),
    "not by torch.export": (["verify", "RUN/w4a4/recipe.yaml.pt2", "--against", "RUN/w4a4", "--trust"],
                            "is no file that torch.export wrote"),
    "over the run's weights": (["export", "RUN/w4a4", "--format", "packed", "--out", "RUN/w4a4/model.safetensors"],
                               "is a file that the run keeps for itself: choose another name"),
    "over a checkpoint": (["export", "RUN/w4a4", "--format", "packed", "--out", "RUN/fp/checkpoints/best.safetensors"],
                          "is a file that the run keeps for itself"),
    "against nothing": (["verify", "OUT/a.onnx", "--against", "OUT"], "is not a run folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_line(name, run, tmp_path, capsys):
    arguments, message = ERRORS[name]
    (run / "w4a4/recipe.yaml.pt2").write_text((run / "w4a4/recipe.yaml").read_text())
    before = (run / "w4a4/model.safetensors").read_bytes()
    filled = [a.replace("RUN", str(run)).replace("OUT", str(tmp_path)) for a in arguments]
    status, out, err = command(capsys, *filled)
    assert status == 2 and not out
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and message in err
    assert not list(tmp_path.iterdir()) and (run / "w4a4/model.safetensors").read_bytes() == before
