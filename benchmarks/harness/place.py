"""Where the repository and its files are. Imports no torch."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def digits_recipe(bits: int) -> Path:
    """The shipped recipe of a bit width."""
    return ROOT / "recipes" / f"digits_w{bits}a{bits}.yaml"
