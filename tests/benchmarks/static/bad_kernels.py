"""A kernel that breaks each rule of the static bar, compiled for the targets; prints what the bar says of it as JSON.

Run as a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import json

import triton
import triton.language as tl

from benchmarks.static.compiled import TARGETS, StaticCase, faults, row


@triton.jit
def approximate_division(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) / tl.load(y_ptr + at))


@triton.jit
def fused_multiply_add(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), 1.0))


@triton.jit
def narrow_access(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK) * 3
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def verdicts() -> dict[str, list[str]]:
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
    found = {}
    for kernel in (approximate_division, fused_multiply_add, narrow_access):
        case = StaticCase(kernel.__name__, kernel, signature, {"BLOCK": 1024}, "fp32", streaming=True)
        for target in TARGETS:
            found[f"{kernel.__name__} {target}"] = faults(case, row(case, target))
    return found


if __name__ == "__main__":
    print(json.dumps(verdicts()))
