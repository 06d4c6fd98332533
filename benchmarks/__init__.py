"""What was measured, and how to measure it again: `python -m benchmarks <suite>`.

A suite is a folder here. Its `__init__.py` says in one line what it measures and imports nothing; its `suite.py` has
`main(arguments)`, which returns the exit status. `MEASURES = True` in `__init__.py` marks one that measures time or memory: it
runs in a process whose allocator is tuned (harness/timing.py says why), and `plot` draws its JSON.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path


def suites() -> dict[str, str]:
    """Every suite, by name: what it measures, in one line."""
    names = sorted(path.parent.name for path in Path(__file__).parent.glob("*/suite.py"))
    return {name: import_module(f"{__name__}.{name}").__doc__.strip() for name in names}


def measuring() -> tuple[str, ...]:
    """The suites that measure time or memory."""
    return tuple(name for name in suites() if getattr(import_module(f"{__name__}.{name}"), "MEASURES", False))
