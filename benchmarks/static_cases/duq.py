"""The kernels of DuQ as their launchers compile them."""

from __future__ import annotations

from profit_kernels.ops.duq import kernels, launch
from profit_kernels.ops.duq.reference import ACTIVATIONS

from ..compiled import StaticCase

DTYPES = ("fp32", "bf16", "fp16")
_FLOATS = {"s": "fp32", "lo": "fp32", "offset": "fp32"}


def cases(target: str) -> list[StaticCase]:
    """The bit width is a number at run time: one code serves 2 to 8."""
    threads = launch.threads(64 if target.startswith("gfx") else 32)
    block = launch.block_size(threads)
    found = []
    for dtype in DTYPES:
        data = f"*{dtype}"
        for activation in ACTIVATIONS:
            act = {"ACTIVATION": activation}
            common = {"dtype": dtype, "note": activation, "num_warps": launch.WARPS}
            found += [
                StaticCase(
                    "duq_forward", kernels.duq_forward,
                    {"x_ptr": data, "A_ptr": "*fp32", "C_ptr": "*fp32", "y_ptr": data, "n": "i64"} | _FLOATS,
                    act | {"BLOCK": block}, streaming=True, scalar_accesses=2, **common,
                ),
                StaticCase(
                    "duq_backward", kernels.duq_backward,
                    {"g_ptr": data, "x_ptr": data, "A_ptr": "*fp32", "C_ptr": "*fp32", "gx_ptr": data,
                     "partial_ptr": "*fp32", "inner": "i64", "blocks": "i32"} | _FLOATS,
                    act | {"BLOCK": block, "TILES": launch.TILES}, divisible=("inner",), streaming=True, scalar_accesses=4,
                    **common,
                ),
                StaticCase(
                    "duq_codes", kernels.duq_codes,
                    {"x_ptr": data, "A_ptr": "*fp32", "code_ptr": "*u8", "nan_ptr": "*i32", "n": "i64"} | _FLOATS,
                    act | {"BLOCK": launch.CODES_PER_THREAD * threads}, streaming=True, scalar_accesses=2, **common,
                ),
            ]  # fmt: skip
    return found
