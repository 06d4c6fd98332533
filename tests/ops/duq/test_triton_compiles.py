"""The Triton kernels of DuQ compile for GPUs that are not here, and keep the numerical contract in the compiled code.

Compiling needs Triton without its interpreter, which is chosen at import: hence a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[3]

SCRIPT = r"""
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from profit_kernels.ops.duq import kernels

def compiled(name, data, pointers, scalars, constants, target):
    signature = {p: "*" + ("fp32" if p in ("A_ptr", "C_ptr", "partial_ptr") else data) for p in pointers} | scalars
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=getattr(kernels, name), signature=signature, constexprs=constants)
    return triton.compile(source, target=target, options={"enable_fp_fusion": False})

floats = {"s": "fp32", "lo": "fp32", "offset": "fp32"}
rows = []
for target in (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)):
    for data in ("fp32", "bf16", "fp16"):
        forward = compiled(
            "duq_forward", data, ["x_ptr", "A_ptr", "C_ptr", "y_ptr"], {"n": "i64", "inner": "i64"} | floats,
            {"PER_CHANNEL": False, "ACTIVATION": "hardswish", "BLOCK": 1024}, target)
        backward = compiled(
            "duq_backward", data, ["g_ptr", "x_ptr", "A_ptr", "C_ptr", "gx_ptr", "partial_ptr"],
            {"inner": "i64", "blocks": "i32"} | floats, {"ACTIVATION": "hardswish", "BLOCK": 1024, "TILES": 8}, target)
        for name, kernel in (("forward", forward), ("backward", backward)):
            ptx, amd = kernel.asm.get("ptx", ""), kernel.asm.get("amdgcn", "")
            spills = re.findall(r"(?:vgpr|sgpr)_spill_count:\s*(\d+)", amd)
            rows.append({
                "kernel": name, "target": str(target.arch), "dtype": data, "nvidia": bool(ptx), "spills": sum(map(int, spills)),
                "div_rn": ptx.count("div.rn.f32"), "div_full": ptx.count("div.full") + ptx.count("div.approx"),
                "fma": len(re.findall(r"fma\.rn\.f32", ptx)), "local": ptx.count("ld.local"),
            })
json.dump(rows, sys.stdout)
"""


def test_compiles_with_true_divisions_and_no_contraction(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout)
    assert len(rows) == 18
    for row in rows:
        assert row["spills"] == row["local"] == 0, row
        if row["nvidia"]:
            assert row["div_rn"] > 0 and row["div_full"] == 0 and row["fma"] == 0, row
