"""`python -m benchmarks <suite> [arguments]` runs `main(arguments)` of benchmarks/<suite>.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module

from profit.errors import ProfitError

SUITES = {
    "ops": "the operators, forward and backward, on the layer shapes of the networks",
    "step": "a whole training step of a network",
    "memory": "bytes kept for the backward, and the peak of a training step",
    "plot": "CSV and picture of the JSON files that ops, step, memory and aiwq wrote",
    "aiwq": "what sampling AIWQ adds to a step, and its operator by layer",
    "launches": "kernel launches of a training step, counted without a GPU",
    "gpu": "`make gpu`: the GPU tests and the suites above within a time limit",
    "digits": "accuracy on the digits, five folds: W4A4, W3A3, W2A2 with and without PROFIT, calibration alone",
    "static": "every Triton kernel compiled for sm_80, sm_90 and gfx942: registers, spills, access widths",
    "processes": "2 and 4 processes against 1: ranking, frozen sets, losses",
    "kills": "kill -9 at random moments and inside checkpoint writes, resume, compare the weights",
    "fuzz": "damaged recipes, results, weights, checkpoints, exports and images: how the commands end",
    "export": "exported networks: codes against the model, top-1, file sizes, latency under onnxruntime",
    "figure6": "which quantizer represents the output of h-swish best (the paper's Figure 6)",
    "zoo": "which timm and torchvision models convert, and what still works on the converted model",
}
# Suites that measure time or memory: they run in a process whose allocator is tuned (benchmarks/timing.py says why).
TIMED = ("ops", "step", "memory", "aiwq")
_STARTED = "PROFIT_BENCHMARK_STARTED"


def main(argv: Sequence[str]) -> int:
    """Run one suite, or list them; 2 for one that is not known or an error told in one line, 130 for Ctrl-C."""
    if argv and argv[0] in SUITES:
        try:
            return _run(argv)
        except ProfitError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
    lines = [f"  {name:<10} {text}" for name, text in SUITES.items()]
    asked = not argv or argv[0] in ("-h", "--help")
    first = "usage: python -m benchmarks SUITE [arguments]" if asked else f"error: there is no suite {argv[0]!r}"
    print("\n".join([first, "suites:", *lines]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def _run(argv: Sequence[str]) -> int:
    if argv[0] in TIMED and _STARTED not in os.environ:
        return _in_tuned_process(argv)
    return import_module(f"benchmarks.{argv[0]}").main(list(argv[1:]))


def _in_tuned_process(argv: Sequence[str]) -> int:
    """glibc reads its settings when a process starts, so that a tuned allocator needs one of its own."""
    from .timing import tuned_environment

    environment = {**tuned_environment(), _STARTED: "1"}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", *argv], env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # the terminal sent it to both; the other one says so
        return process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
