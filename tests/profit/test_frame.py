"""The outermost frame: whatever happens, one line on stderr and a status that says what kind of end it was."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from profit import frame
from profit.cli import main
from profit.errors import DataError, one_line
from profit_kernels import BackendError

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def process(*arguments, **changes) -> subprocess.CompletedProcess:
    """A real `python -m profit`; `changes` to its environment."""
    command = [sys.executable, "-m", "profit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **changes}, timeout=120, cwd=REPOSITORY)


def _numpy_memory() -> None:
    np.empty(2**60, np.uint8)


def _torch_memory() -> None:
    torch.empty(2**58)


ENDS = {
    "ours": (DataError("no\n  data"), 2, "error: no data"),
    "backend": (BackendError("cannot serve"), 2, "error: cannot serve"),
    "python memory": (MemoryError(), 2, "error: out of memory (MemoryError): lower data.batch_size"),
    "cuda memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 2, "error: out of memory (CUDA out"),
    "thread": (RuntimeError("can't start new thread"), 2, "error: out of memory"),
    "worker": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "lower data.workers"),
    "recursion": (RecursionError("maximum recursion depth exceeded"), 2, "nested deeper than Python follows"),
    "disk": (OSError(errno.ENOSPC, "No space left on device", "/a"), 2, "error: no space left on the disk: /a: free some"),
    "system": (OSError(errno.ENAMETOOLONG, "File name too long", "b"), 2, "error: the system refuses: b: File name too long"),
    "encoding": (UnicodeEncodeError("ascii", "\u00fc", 0, 1, "not in range"), 2, "cannot be written in the encoding ascii"),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "unforeseen": (ZeroDivisionError("by\nzero"), 70, "internal error: ZeroDivisionError: by; PROFIT_TRACEBACK=1 shows where"),
    "without a text": (AssertionError(), 70, "internal error: AssertionError: ; PROFIT_TRACEBACK=1"),
    "half a letter": (ValueError("\ud800\x1b[31m"), 70, r"internal error: ValueError: \ud800\x1b[31m; PROFIT_TRACEBACK=1"),
}


@pytest.mark.parametrize("name", ENDS)
def test_every_error_is_one_line(name, capsys) -> None:
    error, status, text = ENDS[name]

    def fails() -> int:
        raise error

    assert frame.guarded(fails) == status
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and text in err
    assert name == "interrupted" or err.startswith(("error: ", "internal error: "))


@pytest.mark.parametrize("fails", [_numpy_memory, _torch_memory])
def test_memory_that_is_not_there(fails, capsys) -> None:
    assert frame.guarded(fails) == 2
    assert capsys.readouterr().err.startswith("error: out of memory (")


def test_nobody_reads(capsys) -> None:
    def fails() -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert frame.guarded(fails) == 141 and capsys.readouterr().err == ""


def test_a_traceback_on_request(capsys, monkeypatch) -> None:
    monkeypatch.setenv("PROFIT_TRACEBACK", "1")
    assert frame.guarded(lambda: 1 // 0) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("internal error: ZeroDivisionError")


def test_one_line_shows_what_a_terminal_would_not() -> None:
    assert one_line("a\n b\x07 \u00fc") == "a b\\x07 \u00fc" and one_line(" \u00fc  x") == "\u00fc x"


@pytest.mark.parametrize(("arguments", "text"), [
    (["bogus"], "No such command 'bogus'; profit --help tells"), (["train"], "Missing argument 'recipe'; profit train --help"),
    (["train", "--bogus", "x"], "No such option"), (["export", "x", "--format", "zip", "--out", "y"], "'zip' is not one of"),
])  # fmt: skip
def test_usage_errors_are_one_line(arguments, text, capsys) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error: ") and text.lower() in err.lower()


def test_a_wrong_choice_of_kernels() -> None:
    for name, value in (("PROFIT_BACKEND", "bogus"), ("PROFIT_CPU_ISA", "mmx")):
        told = process("doctor", **{name: value})
        assert told.returncode == 0 and f"{name}={value!r}" in told.stdout and not told.stderr
        refused = process("train", "recipes/smoke.yaml", "--dry-run", **{name: value})
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and f"error: {name}={value!r}" in refused.stderr


def test_streams_that_are_closed_full_or_ascii(tmp_path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "profit", "train", "-h"]
    closed = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60)
    os.close(write)
    assert closed.returncode and not closed.stderr  # 1 or 141: rich, which writes the help, ends by itself
    with open("/dev/full", "w") as full:
        no_space = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60)
    assert no_space.returncode == 2 and no_space.stderr.startswith("error: no space left") and no_space.stderr.count("\n") == 1
    ascii_only = process("train", "recipes/n\u00f6.yaml", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 2 and ascii_only.stderr.startswith("error: there is no recipe recipes/n\\xf6.yaml")
    assert ascii_only.stderr.count("\n") == 1


def test_an_argument_that_is_no_text() -> None:
    result = process("report", os.fsdecode(b"\xff"))
    assert result.returncode == 2 and result.stderr.startswith(r"error: the argument '\udcff' is no text")


def test_too_little_address_space() -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))

    command = [sys.executable, "-m", "profit", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, preexec_fn=limit)
    assert result.returncode == 2 and result.stderr.startswith("error: out of memory: this process may use 1.0 GB (ulimit -v)")


@pytest.mark.parametrize("delay", [0.0, 0.4, 1.0])
def test_control_c_during_the_first_imports(delay) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "profit", "train", "recipes/digits_w4a4.yaml", "--dry-run"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=REPOSITORY,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert running.stdout.readline().startswith("profit ")  # told before torch is loaded
    time.sleep(delay)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, errors) == (130, "interrupted\n")
