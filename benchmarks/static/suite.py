"""The static suite: every Triton kernel compiled for GPUs that need not be here, and the bar its code has to clear.

No register spills; 128-bit accesses on the streaming kernels; correctly rounded divisions only; no fused multiply-add where
a code is rounded. Registers are recorded, so that a jump is seen in review: benchmarks/results/static.json is committed, and
differences to it are printed. Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from profit.files import write_atomic

from ..harness.place import RESULTS
from .compiled import TARGETS, faults, row

OPS = ("duq", "depthwise", "aiwq")
RESULT = RESULTS / "static.json"
KEY = ("kernel", "note", "target", "dtype", "bits", "num_warps")


def measure(op: str, target: str) -> list[dict[str, Any]]:
    """A row for every case of `op` on `target`; `faults` lists what it fails."""
    cases = import_module(f"benchmarks.static.cases.{op}").cases(target)
    found = [(case, row(case, target)) for case in cases]
    return [{"op": op} | values | {"faults": faults(case, values)} for case, values in found]


def changes(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[str]:
    """Where registers differ from an earlier run, a line each."""
    earlier = {tuple(r[k] for k in KEY): r["registers"] for r in before}
    lines = []
    for r in rows:
        key = tuple(r[k] for k in KEY)
        was = earlier.get(key)
        if was is not None and was != r["registers"]:
            lines.append(f"{r['kernel']} ({r['note']}), {r['target']}, {r['dtype']}: registers {was} -> {r['registers']}")
    return lines


def table(rows: list[dict[str, Any]]) -> str:
    """One line per kernel, target and dtype: the worst of its notes."""
    lines = [f"{'kernel':<34} {'target':<7} {'dtype':<5} {'cases':>5} {'registers':>9} {'spills':>6} {'narrow':>6} {'wide':>5}"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["kernel"], r["target"], r["dtype"]), []).append(r)
    for (kernel, target, dtype), members in sorted(groups.items()):
        narrow = [r["narrow_accesses"] for r in members if r["narrow_accesses"] is not None]
        lines.append(
            f"{kernel:<34} {target:<7} {dtype:<5} {len(members):>5} {max(r['registers'] for r in members):>9} "
            f"{max(r['spills'] for r in members):>6} {max(narrow) if narrow else '-':>6} "
            f"{max(r['wide_accesses'] for r in members):>5}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Command line of the suite: compiles, prints the table, writes the JSON; 1 if a kernel misses the bar."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULT, help="where to write the rows (default: the committed table)")
    parser.add_argument("--op", choices=OPS, action="append", help="only this operator (may be repeated)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this target (may be repeated)")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile side by side")
    options = parser.parse_args(argv)
    try:
        triton_version = version("triton")
    except ModuleNotFoundError:
        print("error: Triton is not installed (it comes with torch on Linux; or pip install triton)", file=sys.stderr)
        return 2
    from triton import knobs

    if knobs.runtime.interpret:
        print("error: TRITON_INTERPRET is set, and Triton cannot compile then; unset it", file=sys.stderr)
        return 2
    work = [(op, target) for op in options.op or OPS for target in options.target or TARGETS]
    with ProcessPoolExecutor(max_workers=max(1, options.jobs)) as pool:
        rows = [r for part in pool.map(measure, *zip(*work, strict=True)) for r in part]
    print(table(rows))
    same_versions = []
    if RESULT.exists():
        committed = json.loads(RESULT.read_text(encoding="utf-8"))
        if committed["triton"] == triton_version:
            same_versions = committed["rows"]
        else:
            print(f"committed table: Triton {committed['triton']}, here {triton_version}; registers not compared")
    for line in changes(rows, same_versions):
        print(line)
    result = {"schema": 1, "suite": "static", "triton": triton_version, "rows": rows}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    text = ",\n".join("  " + json.dumps(r) for r in rows)
    head = json.dumps(result | {"rows": []}).removesuffix("[]}")
    write_atomic(options.json, f"{head}[\n{text}\n]}}\n")
    failed = [r for r in rows if r["faults"]]
    for r in failed:
        print(f"MISSED {r['kernel']} ({r['note']}), {r['target']}, {r['dtype']}: {'; '.join(r['faults'])}")
    print(f"{len(rows)} compiled kernels, {len(failed)} miss the bar; wrote {options.json}")
    return 1 if failed else 0
