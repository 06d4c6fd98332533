"""`make install` shows that it works, keeps pip's errors and its exit status, and leaves noise out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributions import copy_sources

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

# Stands in for the environment's python: pip as it behaves, and everything else by the python that runs these tests.
_PYTHON = """#!/bin/sh
case "$*" in
"-m pip --version") exit 0 ;;
"-m pip install"*)
  echo "$*" >> "{calls}"
  echo "Collecting torch"
  echo "WARNING: Location 'file:///nowhere/torch/' is ignored: it is neither a file nor a directory." >&2
  echo "{complaint}" >&2
  exit {status} ;;
"-c from profit_kernels"*) echo "C++ kernels: ready" ;;
*) exec "{python}" "$@" ;;
esac
"""


def install(tmp_path: Path, status: int, complaint: str) -> tuple[subprocess.CompletedProcess, list[str], Path]:
    sources, environment = copy_sources(tmp_path / "sources"), tmp_path / "environment"
    python, calls = environment / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir(parents=True)
    python.write_text(_PYTHON.format(calls=calls, status=status, complaint=complaint, python=sys.executable))
    python.chmod(0o755)
    variables = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "install", f"VENV={environment}"]
    done = subprocess.run(command, cwd=sources, env=variables, capture_output=True, text=True, check=False)
    return done, calls.read_text().splitlines(), environment


def test_progress_and_warnings_are_shown_and_noise_is_not(tmp_path):
    done, calls, environment = install(tmp_path, 0, "WARNING: retrying")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 2 and not any(" -q" in call for call in calls)
    assert done.stdout.count("Collecting torch") == 2 and "C++ kernels: ready" in done.stdout
    assert done.stderr.count("WARNING: retrying") == 2 and "Location" not in done.stderr + done.stdout
    assert list(environment.glob(".profit-installed*"))


def test_what_pip_refuses_stops_make_with_its_message(tmp_path):
    done, calls, environment = install(tmp_path, 7, "ERROR: No space left on device")
    assert done.returncode != 0 and "ERROR: No space left on device" in done.stderr and "Location" not in done.stderr
    assert len(calls) == 1 and "ready" not in done.stdout
    assert not list(environment.glob(".profit-installed*")), "the next make installs again"
