"""The verification as aligned text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .verify import Verification


def table(result: Verification) -> str:
    """One row per layer, then totals, outputs and classes, then what failed."""
    lines = [f"{result.file} on {result.images} images"]
    numbers, differing = result.weights
    if numbers:
        lines.append(f"weights, folded scales and biases: {numbers:,} numbers, {differing} differ from the model's")
    if result.comparisons:
        lines += ["", *_codes(result), ""]
    for name, difference in result.outputs.items():
        same, total = result.top1[name]
        lines.append(f"{name}: outputs differ by at most {difference:.2g}, top-1 agrees on {same} of {total}")
    if result.correct:
        lines.append("correct: " + ", ".join(f"{name} {count}" for name, count in result.correct.items()))
    if result.executed:
        lines.append(f"onnxruntime runs: {result.executed}")
    lines += result.notes
    failures = result.failures()
    lines += [f"FAILED {failure}" for failure in failures] or ["passed"]
    return "\n".join(lines)


def _codes(result: Verification) -> list[str]:
    names = list(result.comparisons[0].layers)
    head = [["layer", "", "codes", "in band"], ["", "", "", ""]]
    for comparison in result.comparisons:
        first, second = comparison.what.split(" / ")
        head[0] += [first, ""]
        head[1] += [f"/ {second}", "farthest"]
    rows = []
    for name in names:
        row = result.comparisons[0].layers[name]
        cells = [name, row.bits, f"{row.codes:,}", str(row.inside)]
        for comparison in result.comparisons:
            one = comparison.layers[name]
            cells += [_count(one.differing, one.differing_outside), f"{one.farthest:.1e}" if one.differing else ""]
        rows.append(cells)
    total = ["all", "", f"{result.comparisons[0].total('codes'):,}", str(result.comparisons[0].total("inside"))]
    for comparison in result.comparisons:
        total += [
            _count(comparison.total("differing"), comparison.total("differing_outside")),
            f"{comparison.farthest:.1e}" if comparison.total("differing") else "",
        ]
    cells = [*head, *rows, total]
    widths = [max(len(line[i]) for line in cells) for i in range(len(total))]
    text = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in cells]  # fmt: skip
    explained = (
        "codes that differ (of them outside the band of 4 ulp around a rounding edge); farthest: largest distance of a "
        "differing one from an edge, in steps"
    )
    return [*text, explained]


def _count(differing: int, outside: int) -> str:
    return f"{differing} ({outside})" if differing else "0"
