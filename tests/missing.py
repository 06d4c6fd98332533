"""What tests were skipped for want of, in one line: "not run here: 12 tests need avx512, 2 need qemu-x86_64 (...)"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

QEMU = "qemu-x86_64 (Debian, Ubuntu: apt install qemu-user)"
# (a skip's reason, what is missing); the first that matches counts
_NEEDS = (
    (r"this processor has no byte products \((.+)\)", r"\1"),
    (r"this processor has no (\S+)", r"\1"),
    (r"needs two GPUs", "two GPUs"),
    (r"needs (\d+ GB) of free GPU memory", r"a GPU with \1 free"),
    (r"no CUDA GPU|no GPU|CUDA is not available", "a GPU"),
    (r"qemu-x86_64", QEMU),
    (r"could not import '([\w.]+)'", r"\1"),
    (r"(\S+) is not installed", r"\1"),
    (r"C\+\+ compiler", "a C++ compiler"),
    (r"C\+\+ kernels", "the C++ kernels"),
)


def missing(reason: str) -> str | None:
    """What a skipped test needs; None where it was left out for another cause."""
    for pattern, name in _NEEDS:
        found = re.search(pattern, reason)
        if found is not None:
            return found.expand(name)
    return None


def line(reasons: Iterable[str]) -> str | None:
    """The line for the reasons of all skipped tests; None if nothing is missing."""
    counts = Counter(name for name in map(missing, reasons) if name is not None)
    if not counts:
        return None
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    needs = [f"{n} {'needs' if n == 1 else 'need'} {name}" for name, n in ordered]
    noun = "test" if ordered[0][1] == 1 else "tests"
    return "not run here: " + ", ".join(needs).replace(" need", f" {noun} need", 1)
