"""The kernels of DuQ as their launchers compile them. The bit width is a number at run time: one code serves 2 to 8."""

from __future__ import annotations

from profit_kernels.ops.duq import kernels, launch, weights_kernels, weights_launch
from profit_kernels.ops.duq.reference import ACTIVATIONS

from ..compiled import StaticCase, warp_size

DTYPES = ("fp32", "bf16", "fp16")
_INTERVALS = {"A_ptr": "*fp32", "C_ptr": "*fp32"}


def cases(target: str) -> list[StaticCase]:
    """Activations take the codes per tensor, weights per tensor and per channel."""
    found = []
    for dtype in DTYPES:
        for activation in ACTIVATIONS:
            found += _activations(f"*{dtype}", dtype, activation, warp_size(target))
        found += _weights(f"*{dtype}", dtype, warp_size(target))
    return found


def _activations(data: str, dtype: str, activation: str, warp: int) -> list[StaticCase]:
    kernels_of = _elementwise(data, "*u8", launch.block_size(warp), launch.codes_block_size(warp), launch.TILES, activation)
    # Scalars: A and C; in the backward also two partial sums, with the codes the count of NaNs.
    return [
        StaticCase(
            name, function, signature, constants, dtype, note=activation, num_warps=launch.WARPS, divisible=("inner",),
            streaming=True, scalar_accesses=4 if name == "duq_backward" else 2,
        )
        for name, function, signature, constants in kernels_of
    ]  # fmt: skip


def _elementwise(data: str, codes: str, block: int, codes_block: int, tiles: int, activation: str) -> list[tuple]:
    numbers = {"inner": "i64", "blocks": "i32", "s": "fp32", "lo": "fp32", "offset": "fp32"}
    act = {"ACTIVATION": activation}
    return [
        ("duq_forward", kernels.duq_forward, {"x_ptr": data, "y_ptr": data} | _INTERVALS | numbers, act | {"BLOCK": block}),
        (
            "duq_backward", kernels.duq_backward,
            {"g_ptr": data, "x_ptr": data, "gx_ptr": data, "partial_ptr": "*fp32"} | _INTERVALS | numbers,
            act | {"BLOCK": block, "TILES": tiles},
        ),
        (
            "duq_codes", kernels.duq_codes,
            {"x_ptr": data, "A_ptr": "*fp32", "code_ptr": codes, "nan_ptr": "*i32"} | numbers, act | {"BLOCK": codes_block},
        ),
    ]  # fmt: skip


def _weights(data: str, dtype: str, warp: int) -> list[StaticCase]:
    """Not streaming kernels: a net's weights are a few megabytes, in rows of odd lengths."""
    # Per channel: filters of 9, 25 and 49 weights (depthwise), and rows of pointwise layers.
    found = [
        StaticCase(
            name, function, signature, constants, dtype, note=f"per channel, {inner} each", num_warps=launch.WARPS
        )
        for inner in (16, 32, 64, 1024)
        for name, function, signature, constants in _elementwise(data, "*i8", inner, inner, 1, "none")
    ]
    common = {"dtype": dtype, "note": "all of a net", "num_warps": launch.WARPS}
    found += [
        StaticCase(
            "duq_weights_forward", weights_kernels.duq_weights_forward, {"piece_ptr": "*i64", "y_ptr": data} | _INTERVALS,
            {"BLOCK": weights_launch.BLOCK}, **common,
        ),
        StaticCase(
            "duq_weights_backward", weights_kernels.duq_weights_backward,
            {"piece_ptr": "*i64", "g_ptr": data, "gw_ptr": data, "partial_ptr": "*fp32"} | _INTERVALS,
            {"BLOCK": weights_launch.BLOCK}, **common,
        ),
    ]  # fmt: skip
    if dtype == "fp32":  # the sums are float32 whatever the data are
        options = {"dtype": "fp64", "num_warps": 1, "contracted": True}
        found += [
            StaticCase(
                "duq_weights_finish", weights_kernels.duq_weights_finish,
                {"interval_ptr": "*i64", "partial_ptr": "*fp32", "raw_ptr": "*fp32", "g_ptr": "*fp32", "pieces": "i32"},
                {"BLOCK": launch.FINISH_BLOCK}, note="all of a net", **options,
            ),
            StaticCase(
                "duq_intervals", kernels.duq_intervals,
                dict.fromkeys(("a_ptr", "c_ptr", "A_ptr", "C_ptr"), "*fp32") | {"n": "i32"},
                {"BLOCK": launch.INTERVALS_BLOCK}, note="per channel", **options,
            ),
            StaticCase(
                "duq_finish", kernels.duq_finish,
                dict.fromkeys(("partial_ptr", "a_ptr", "c_ptr", "ga_ptr", "gc_ptr"), "*fp32") | {"blocks": "i32"},
                {"BLOCK": launch.FINISH_BLOCK}, note="one quantizer", **options,
            ),
        ]  # fmt: skip
    return found
