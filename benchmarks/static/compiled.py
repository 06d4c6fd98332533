"""Ahead-of-time compilation of Triton kernels for GPUs that are not here, and what can be read from the compiled code.

NVIDIA: registers and spills from cuobjdump (in Triton's wheel), instructions from the PTX. AMD: both from the assembly.
Triton must be imported without its interpreter (TRITON_INTERPRET unset), which is why the suite runs as a process of its own.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")
# Bytes of one global access that count as wide: 128 bits.
WIDE = 16


@dataclass(frozen=True)
class StaticCase:
    """One kernel as its launcher compiles it.

    kernel: name in the table. function: the Triton function (JITFunction).
    signature: run-time argument -> Triton type ("*fp32", "i64", "fp32"), in the order of the function.
    constexprs: compile-time argument -> value. divisible: the run-time arguments that are multiples of 16 in a usual launch
    (pointers are always taken to be aligned).
    dtype: of the data. bits: the bit widths this code serves ("2-8" where the width is a run-time number).
    streaming: reads and writes each element once, so that every access to data must be 128 bits wide; `scalar_accesses` is
    how many accesses to single float32 values its code has by design (loads of a scale, stores of a partial sum).
    contracted: the code has explicit fused multiply-adds (a convolution's accumulation), so their absence is not demanded.
    """

    kernel: str
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    dtype: str
    bits: str = "2-8"
    note: str = ""
    divisible: tuple[str, ...] = ()
    streaming: bool = False
    scalar_accesses: int = 0
    contracted: bool = False
    num_warps: int = 4
    num_stages: int = 3
    extra_options: Mapping[str, Any] = field(default_factory=dict)


def warp_size(target: str) -> int:
    """Threads of a warp (NVIDIA) or of a wavefront (AMD's data-centre GPUs)."""
    return 32 if target.startswith("sm_") else 64


def gpu_target(name: str) -> Any:
    """Triton's description of "sm_80", "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), warp_size(name))
    return GPUTarget("hip", name, warp_size(name))


def compile_case(case: StaticCase, target: str) -> Any:
    """The compiled kernel (its `asm` holds every stage)."""
    import triton
    from triton.compiler import ASTSource

    names = case.function.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    missing = [n for n, kind in signature.items() if kind == "constexpr" and n not in case.constexprs]
    if missing:
        raise ValueError(f"static case {case.kernel}: no type and no value for argument {', '.join(missing)}")
    aligned = [n for n, kind in case.signature.items() if kind.startswith("*") or n in case.divisible]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=case.function, signature=signature, constexprs=dict(case.constexprs), attrs=attrs)
    options = {"enable_fp_fusion": False, "num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=gpu_target(target), options=options | dict(case.extra_options))


def row(case: StaticCase, target: str) -> dict[str, Any]:
    """One line of the static table: what this case compiles to on `target`."""
    compiled = compile_case(case, target)
    found = _nvidia(compiled.asm) if target.startswith("sm_") else _amd(compiled.asm)
    widths = found.pop("access_bytes")
    # The scalars are float32; on AMD most of them are loaded by other instructions.
    scalars = min(case.scalar_accesses, widths.count(4))
    narrow = sum(1 for w in widths if w < WIDE) - scalars if case.streaming else None
    return {
        "kernel": case.kernel, "note": case.note, "target": target, "dtype": case.dtype, "bits": case.bits,
        "num_warps": case.num_warps, **found, "wide_accesses": sum(1 for w in widths if w >= WIDE), "narrow_accesses": narrow,
        "shared_bytes": compiled.metadata.shared,
    }  # fmt: skip


def faults(case: StaticCase, found: Mapping[str, Any]) -> list[str]:
    """What of the static bar this row fails; empty if nothing."""
    bad = []
    if found["spills"]:
        bad.append(f"{found['spills']} register spills")
    if found["narrow_accesses"]:
        bad.append(f"{found['narrow_accesses']} accesses below 128 bits")
    if found["inexact_divisions"]:
        bad.append(f"{found['inexact_divisions']} divisions that do not round correctly")
    if found["fma"] and not case.contracted:
        bad.append(f"{found['fma']} fused multiply-adds")
    return bad


_PTX_ACCESS = re.compile(r"\b(?:ld|st)\.global((?:\.[\w:]+)*)\.([busf])(\d+)\b")


def _nvidia(asm: Mapping[str, Any]) -> dict[str, Any]:
    ptx = asm["ptx"]
    widths = []
    for modifiers, _, bits in _PTX_ACCESS.findall(ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        widths.append(int(bits) // 8 * (int(vector[1]) if vector else 1))
    usage = _resource_usage(asm["cubin"])
    return {
        "registers": usage["REG"],
        # LOCAL is what the code keeps in local memory; STACK counts the frame that spilling needs.
        "spills": usage["LOCAL"] + usage["STACK"],
        "access_bytes": widths,
        "exact_divisions": ptx.count("div.rn.f32"),
        "inexact_divisions": len(re.findall(r"\bdiv\.(?:full|approx)", ptx)),
        "fma": len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx)),
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        answer = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", answer)}


_AMD_ACCESS = re.compile(
    r"\b(?:global|buffer)_(?:load|store)_(d?word|short|ubyte|sbyte|byte|ushort|sshort)(?:_d16)?(?:_hi)?(x\d)?\b"
)
_AMD_BYTES = {"dword": 4, "word": 4, "short": 2, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1, "byte": 1}


def _amd(asm: Mapping[str, Any]) -> dict[str, Any]:
    text, llvm = asm["amdgcn"], asm["llir"]

    def meta(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    widths = [_AMD_BYTES[kind] * int((times or "x1")[1:]) for kind, times in _AMD_ACCESS.findall(text)]
    # In the assembly integer divisions have reciprocals too, so approximate ones are looked for a stage earlier.
    approximate = r"\bfdiv (?:\w+ )*(?:fast|arcp|afn)\b[^,]* float|\bfdiv (?:\w+ )*float .*!fpmath|llvm\.amdgcn\.rcp\.f32"
    exact = len(re.findall(r"\bv_div_fixup_f32", text))
    return {
        "registers": meta("vgpr_count"),
        "spills": meta("vgpr_spill_count") + meta("sgpr_spill_count") + meta("private_segment_fixed_size"),
        "access_bytes": widths,
        "exact_divisions": exact,
        "inexact_divisions": len(re.findall(approximate, llvm)),
        # The expansion of an exact division multiplies and adds fused: 6 times each.
        "fma": max(0, len(re.findall(r"\bv_(?:pk_)?(?:fma|fmac|mad|mac)\w*_f32", text)) - 6 * exact),
    }
