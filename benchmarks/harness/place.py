"""Where the repository and its files are, and on which processor this runs. Imports no torch."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def digits_recipe(bits: int) -> Path:
    """The shipped recipe of a bit width."""
    return ROOT / "recipes" / f"digits_w{bits}a{bits}.yaml"


def processor() -> str:
    """The processor's model name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
