"""Copies of the sources to build from, so that nothing is built into the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Named one by one: a checkout may also hold environments and runs, of many gigabytes.
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "profit", "profit_kernels", "recipes", "tests")
_FILES = ("*.md", "*.toml", "*.py", "*.in", "LICENSE", "Makefile")
_BUILT = ("__pycache__", "_cpu*", "_build_info.json")


def copy_sources(folder: Path) -> Path:
    """Copy the sources, without anything built, to `folder` and return it."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*_BUILT))
    for pattern in _FILES:
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return folder


def build(sources: Path, command: str, **environment: str) -> Path:
    """Run setup.py `command` ("sdist", "bdist_wheel") and return the one file that it wrote."""
    variables = {**os.environ, **environment}
    arguments = [sys.executable, "setup.py", "-q", command, "--dist-dir", "made"]
    done = subprocess.run(arguments, cwd=sources, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (sources / "made").iterdir()
    return made
