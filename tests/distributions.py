"""Copies of the sources to build from, so that nothing is built into the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What a checkout holds besides its sources: environments, outputs of builds and of runs.
_NOT_SOURCES = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__", "_cpu*", "_build_info.json")


def copy_sources(folder: Path) -> Path:
    """Copy the sources to `folder` and return it."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*_NOT_SOURCES), dirs_exist_ok=True)
    return folder


def build(sources: Path, command: str, **environment: str) -> Path:
    """Run setup.py `command` ("sdist", "bdist_wheel") and return the one file that it wrote."""
    variables = {**os.environ, **environment}
    arguments = [sys.executable, "setup.py", "-q", command, "--dist-dir", "made"]
    done = subprocess.run(arguments, cwd=sources, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (sources / "made").iterdir()
    return made
