"""`python -m benchmarks <suite> [arguments]` runs `main(arguments)` of benchmarks/<suite>.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

SUITES = {
    "digits": "accuracy on the digits, five folds: W4A4, W3A3, W2A2 with and without PROFIT, calibration alone",
    "static": "every Triton kernel compiled for sm_80, sm_90 and gfx942: registers, spills, access widths",
    "figure6": "which quantizer represents the output of h-swish best (the paper's Figure 6)",
    "zoo": "which timm and torchvision models convert, and what still works on the converted model",
}


def main(argv: Sequence[str]) -> int:
    """Run one suite; without a known one, list them and return 2."""
    if argv and argv[0] in SUITES:
        return import_module(f"benchmarks.{argv[0]}").main(list(argv[1:]))
    lines = [f"  {name:<10} {text}" for name, text in SUITES.items()]
    asked = not argv or argv[0] in ("-h", "--help")
    first = "usage: python -m benchmarks SUITE [arguments]" if asked else f"error: there is no suite {argv[0]!r}"
    print("\n".join([first, "suites:", *lines]), file=sys.stdout if asked else sys.stderr)
    return 0 if asked and argv else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
