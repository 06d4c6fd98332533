"""What measured numbers depend on: versions, the commit of the source, the processor."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import torch

    import profit_kernels

    found = {"python": platform.python_version()}
    for name, distribution in (
        ("torch", "torch"), ("triton", "triton"), ("timm", "timm"), ("numpy", "numpy"), ("profit_kernels", "profit-kernels")
    ):  # fmt: skip
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"], found["profit_kernels"] = str(torch.__version__), profit_kernels.__version__
    return found


def git_commit() -> str | None:
    """The commit of this source tree, marked where files differ from it; None outside a git work tree."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        if head.returncode:
            return None
        changes = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("-modified" if changes.stdout.strip() else "")


def processor() -> str:
    """The processor's model name, where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
