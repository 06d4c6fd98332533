"""`python -m benchmarks <suite> [arguments]` runs `main(arguments)` of benchmarks/<suite>/suite.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module

from profit.errors import ProfitError

from . import measuring, suites

_STARTED = "PROFIT_BENCHMARK_STARTED"


def main(argv: Sequence[str]) -> int:
    """Run one suite, or list them; 2 for one that is not known or an error told in one line, 130 for Ctrl-C."""
    known = suites()
    if argv and argv[0] in known:
        try:
            return _run(argv)
        except ProfitError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    lines = [f"  {name:<10} {text}" for name, text in known.items()]
    asked = not argv or argv[0] in ("-h", "--help")
    first = "usage: python -m benchmarks SUITE [arguments]" if asked else f"error: there is no suite {argv[0]!r}"
    print("\n".join([first, "suites:", *lines]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _run(argv: Sequence[str]) -> int:
    if argv[0] in measuring() and _STARTED not in os.environ:
        return _in_tuned_process(argv)
    return import_module(f"benchmarks.{argv[0]}.suite").main(list(argv[1:]))


def _in_tuned_process(argv: Sequence[str]) -> int:
    """glibc reads its settings when a process starts, so that a tuned allocator needs one of its own."""
    from .harness.timing import tuned_environment

    environment = {**tuned_environment(), _STARTED: "1"}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *argv], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal sent it to both; the other one says so
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
