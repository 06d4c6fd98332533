"""A finished run to be tampered with, and an alarm for what nothing of a stranger may make the program do."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from profit.cli import main
from profit.train.trainer import train
from tests.profit.train.tiny_run import tiny_recipe

# Audit events that the interpreter itself raises, whichever library is the cause.
EVENTS = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.connect", "socket.getaddrinfo",
    "urllib.Request", "pickle.find_class", "webbrowser.open",
)  # fmt: skip
_heard: list[list[str]] = []
_hook: list[bool] = []


def _listen(event: str, args: tuple) -> None:
    if _heard and event in EVENTS:
        _heard[-1].append(f"{event} {args!r:.200}")


@pytest.fixture
def alarm() -> Iterator[list[str]]:
    """What was started, connected to or unpickled so far; the test fails if there is anything left at its end."""
    if not _hook:
        sys.addaudithook(_listen)  # which cannot be taken away again
        _hook.append(True)
    events: list[str] = []
    _heard.append(events)
    try:
        yield events
    finally:
        _heard.remove(events)
    assert not events


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """A short run at full precision and one packed file of it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    short = ["schedule.fp_epochs=1", "schedule.act_bits=[4]", "schedule.weight_bits=[4]", "schedule.profit_bits=[]"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("profit.report.write_report", lambda folder: folder)
        train(tiny_recipe(*short, "schedule.bn_epochs=1", "schedule.train_epochs=1", "teacher.source=null"), folder, quiet=True)
    assert main(["export", str(folder), "--format", "packed", "--out", str(folder.parent / "net.safetensors")]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def refused(capsys):
    """Run the command line; returns the one line with which it refuses."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert status == 2, captured.out + captured.err
        lines = captured.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ")
        first = captured.out.splitlines()  # `train` says at once what it was asked for
        assert len(first) <= 1 and all(line.startswith("profit ") and ": training " in line for line in first)
        return lines[0].removeprefix("error: ")

    return call
