"""The command line: every mistake is one line and exit status 2; Ctrl-C is 130."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

import profit.train.trainer as trainer
from profit.__main__ import main as module_main
from profit.cli import main

from .train.tiny_run import VALUES

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return str(path)


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    """Drawing the report takes longer than training; one test looks at it."""
    if "report" not in request.node.name:
        monkeypatch.setattr("profit.report.write_report", lambda folder: folder)


SHORT = ["-s", "schedule.fp_epochs=1", "-s", "schedule.act_bits=[]", "-s", "schedule.weight_bits=[]",
         "-s", "schedule.profit_bits=[]", "-s", "teacher.source=null"]  # fmt: skip


def test_dry_run_prints_the_phases_and_writes_nothing(recipe, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert main(["train", recipe, "--out", str(folder), "--dry-run", *SHORT]) == 0
    assert re.search(r"^fp +train +W32A32 +1 ", capsys.readouterr().out, re.MULTILINE)
    assert not folder.exists()


def test_train_evaluate_report(recipe, tmp_path, capsys) -> None:
    folder = str(tmp_path / "run")
    assert main(["train", recipe, "--out", folder, "-q", *SHORT]) == 0
    output = capsys.readouterr().out
    accuracy = json.loads((tmp_path / "run" / "results.json").read_text())["final"]["accuracy"]
    assert f"final accuracy {accuracy:.2f}%" in output and "report.html" in output
    assert main(["evaluate", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == accuracy
    assert main(["evaluate", folder, "--checkpoint", "best", "-s", "data.fold=1"]) == 0
    assert "best.safetensors (W32A32): accuracy" in capsys.readouterr().out
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", folder]) == 0
    assert (tmp_path / "run" / "report.html").is_file()
    capsys.readouterr()
    assert "results.json does not exist" in _error(capsys, ["report", str(tmp_path)])
    assert main(["train", recipe, "--out", folder, "-q", "--resume", *SHORT]) == 0
    assert "is finished already" in capsys.readouterr().out
    # a run folder stands for its recipe
    assert main(["train", folder, "-q", "--resume"]) == 0


def test_the_allocator_is_tuned_on_request_alone(recipe, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("profit.train.allocator.tune_allocator", lambda environment: "allocator: tuned")
    assert main(["train", recipe, "--out", str(tmp_path / "a"), "-q", *SHORT]) == 0
    assert "allocator:" not in capsys.readouterr().out
    assert main(["train", recipe, "--out", str(tmp_path / "b"), "-q", "--tune-allocator", *SHORT]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "allocator: tuned"  # behind the line with which a run begins


def test_doctor(capsys) -> None:
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def _error(capsys, arguments: list[str]) -> str:
    """The message of a command that fails: one line on standard error, nothing on standard output but progress."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.out
    return lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["schedule.trian_epochs=3"], "unknown recipe key schedule.trian_epochs; did you mean schedule.train_epochs?"),
        (["schedule.weight_bits=[9]"], "weight_bits must be within 2..8, got (9,)"),
        (["schedule.act_bits=[1]"], "act_bits must be within 2..8, got (1,)"),
        (["data.name=imagefolder", "data.path=/no/such/folder"], "data.path /no/such/folder is not a folder"),
        (["model.classes=3"], "model.classes is 3 but the data set digits has 10 classes"),
        (["model.init=/no/such/file.safetensors"], "there is no weight file /no/such/file.safetensors"),
        (["model.name=resnet81"], "did you mean"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, capsys, changes: list[str], message: str) -> None:
    settings = [part for change in changes for part in ("-s", change)]
    assert message in _error(capsys, ["train", recipe, "--out", str(tmp_path / "run"), "-q", *settings])
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves no folder"


def test_an_unwritable_output_folder(recipe, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    message = _error(capsys, ["train", recipe, "--out", str(tmp_path / "file" / "run"), "-q", *SHORT])
    assert "cannot write the output folder" in message
    if os.geteuid():  # root may write everywhere
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        assert "Permission denied" in _error(capsys, ["train", recipe, "--out", str(closed / "run"), "-q", *SHORT])


def test_an_unreadable_image(recipe, tmp_path, capsys) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(4):
                Image.new("L", (16, 16), 40 * index).save(tmp_path / "data" / split / name / f"{index}.png")
    (tmp_path / "data" / "train" / "b" / "2.png").write_bytes(b"\x89PNG broken")
    settings = [f"data.path={tmp_path / 'data'}", "data.name=imagefolder", "data.in_chans=1", "data.batch_size=2",
                "data.workers=0", "data.limit=null"]  # fmt: skip
    arguments = [part for change in settings for part in ("-s", change)]
    message = _error(capsys, ["train", recipe, "--out", str(tmp_path / "run"), "-q", *SHORT, *arguments])
    assert "cannot read the image" in message and "train/b/2.png" in message


class _NoConvolution(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def test_a_model_without_convolution(recipe, tmp_path, capsys) -> None:
    def only_linear(pretrained: bool = False, num_classes: int = 10, in_chans: int = 1, **kwargs) -> nn.Module:
        return _NoConvolution(num_classes, in_chans)

    only_linear.__module__ = __name__
    timm.models.register_model(only_linear)
    message = _error(capsys, ["train", recipe, "--out", str(tmp_path / "run"), "-q", "-s", "model.name=only_linear",
                              "-s", "model.args={}"])  # fmt: skip
    assert "only_linear has no convolution" in message


def test_a_loss_that_is_not_finite(recipe, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    message = _error(capsys, ["train", recipe, "--out", str(folder), "-q", "-s", "schedule.lr=1e30"])
    assert "in phase a4.bn, epoch 1, step" in message
    assert (folder / "checkpoints" / "epoch-00003.safetensors").is_file()


def test_a_wrong_checkpoint(recipe, tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert main(["train", recipe, "--out", str(folder), "-q", *SHORT]) == 0
    capsys.readouterr()
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of weights")
    arguments = ["evaluate", str(folder), "--checkpoint"]
    assert "is not a readable .safetensors file" in _error(capsys, [*arguments, str(tmp_path / "broken.safetensors")])
    assert "there is no checkpoint worst" in _error(capsys, [*arguments, "worst"])
    assert "is not a run folder" in _error(capsys, ["evaluate", str(tmp_path)])
    assert f"{tmp_path} is a folder: give a weight file" in _error(capsys, [*arguments, str(tmp_path)])
    message = _error(capsys, ["evaluate", str(folder), "-s", "model.name=mobilenetv2_100"])
    assert "takes data.* and run.*, the network is the run's own" in message
    assert "is a run folder: --resume carries the run on" in _error(capsys, ["train", str(folder), "-q"])


def test_options_of_a_dry_run(recipe, tmp_path, capsys) -> None:
    for option in (["--images", "10"], ["--throughput", "3"]):
        message = _error(capsys, ["train", recipe, "--out", str(tmp_path / "run"), *option])
        assert f"{option[0]} is for --dry-run" in message
    assert "--throughput inf" in _error(capsys, ["train", recipe, "--dry-run", "--images", "10", "--throughput", "inf"])
    assert not (tmp_path / "run").exists()


def test_interruption_before_and_after_the_first_epoch(recipe, tmp_path, capsys, monkeypatch) -> None:
    original, calls = trainer.train_epoch, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 3):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_epoch", interrupted)
    command = ["train", recipe, "--out", str(tmp_path / "run"), "-q"]
    assert main(command) == 130
    assert "interrupted: no epoch was finished yet" in capsys.readouterr().err
    assert main(command) == 130
    assert "the same command with --resume carries on from there" in capsys.readouterr().err
    assert main([*command, "--resume", "-s", "run.device=auto"]) == 0


def test_control_c_in_a_real_process(recipe, tmp_path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "profit", "train", recipe, "--out", str(folder), "-q", "-s", "schedule.fp_epochs=500"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment,
        # A shell starts background jobs with it ignored, which children inherit: the tests may run in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(folder.glob("checkpoints/epoch-*.json")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().startswith("interrupted: ") and len(errors.strip().splitlines()) == 1
    assert main(["evaluate", str(folder), "--checkpoint", "last"]) == 0


def test_help_loads_no_torch_and_names_every_command() -> None:
    code = "import sys; from profit.__main__ import main; c = main([sys.argv[1]]); sys.exit(c or int('torch' in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for option, words in (("-h", ("train", "evaluate", "report", "doctor")), ("--version", ("profit",))):
        command = [sys.executable, "-c", code, option]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert result.returncode == 0, result.stderr
        assert all(word in result.stdout for word in words)


def test_control_c_while_a_command_loads(capsys, monkeypatch) -> None:
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("profit.cli.main", interrupted)
    assert module_main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_control_c_in_a_command_that_keeps_nothing(capsys, monkeypatch) -> None:
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("profit.doctor.doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.strip() == "interrupted"
