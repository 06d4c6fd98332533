"""The compiled CPU library: found and loaded on first use, never at import.

PROFIT_CPU_ISA (`baseline`, `avx2` or `avx512`) keeps its kernels at or below that instruction set; by default they use
the best one the processor has. The results are the same bits.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_ISAS = ("baseline", "avx2", "avx512")


def _library() -> Path:
    return _FOLDER / "_cpu.abi3.so"


def wrong_setting() -> str | None:
    """What is wrong with PROFIT_CPU_ISA; None if nothing is."""
    limit = os.environ.get("PROFIT_CPU_ISA", "")
    return None if limit in ("", *_ISAS) else f"PROFIT_CPU_ISA={limit!r} is not one of {', '.join(_ISAS)}"


@functools.cache
def why_missing() -> str | None:
    """Why the compiled CPU kernels cannot be used, in one line; None if they can. Loads the library at the first call."""
    limit = os.environ.get("PROFIT_CPU_ISA", "")
    if wrong_setting() is not None:
        return wrong_setting()
    if not _library().exists():
        reason = build_info()["reason"] or "the library file is gone"
        return f"the C++ kernels were not built: {reason}"
    try:
        torch.ops.load_library(str(_library()))
    except OSError as error:
        # The message goes on with the search path, line after line.
        return f"the C++ kernels do not load under torch {torch.__version__}: {str(error).partition(chr(10))[0]}"
    if limit:
        torch.ops.profit_cpu.limit_isa(_ISAS.index(limit))
    return None


def available() -> bool:
    """Whether the compiled CPU kernels can be used."""
    return why_missing() is None


def load() -> None:
    """Make `torch.ops.profit_cpu` callable. Costs nothing after the first call.

    Raises RuntimeError with the reason of `why_missing` if there is no usable library.
    """
    reason = why_missing()
    if reason is not None:
        raise RuntimeError(f"{reason}; `profit doctor` tells more")


def build_info() -> dict:
    """How the library was built: keys `built`, `reason`, `compiler`, `torch`, `torch_target`, `python`, `machine`, `flags`,
    `sources`. If nothing was recorded, `built` is false and `reason` says so; the other keys are None then."""
    record = _FOLDER / "_build_info.json"
    if record.exists():
        return json.loads(record.read_text())
    keys = ("compiler", "torch", "torch_target", "python", "machine", "flags", "sources")
    return {"built": False, "reason": "the package was never installed (pip install -e .)", **dict.fromkeys(keys)}


def isa() -> str | None:
    """The instruction set the loaded kernels use; None without the library."""
    return _ISAS[torch.ops.profit_cpu.isa()] if available() else None


def features() -> str | None:
    """`isa()`, and whether pointwise convolutions are summed in integers."""
    if not available():
        return None
    return f"{isa()}, {'with' if torch.ops.profit_cpu.has_byte_products() else 'without'} products of bytes (VNNI)"
