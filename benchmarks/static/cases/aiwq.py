"""The kernels of AIWQ as their launcher compiles them for the layers of the nets: each layout, alignment and tile."""

from __future__ import annotations

from typing import Any

import torch

from profit_kernels.ops.aiwq import conv_kernels, kernels
from profit_kernels.ops.aiwq.tiles import DIVERGENCE, depthwise_tile, moments_tile, pointwise_tile, quantizes_itself

from ..compiled import StaticCase

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# channels, side of the output plane, channels_last: the tiles of the launcher. Rows of 14 x 14 are 8 bytes short of 16 in half
# precision and those of 7 x 7 are odd, so that no launch could read them wider.
_MOMENTS = [(64, 56, True), (24, 56, True), (16, 112, True), (32, 112, False), (384, 14, False), (960, 7, False)]
_DEPTHWISE = [(96, 56, True, "none"), (96, 56, True, "hardswish"), (16, 112, True, "none")]
_DEPTHWISE += [
    (32, 112, False, "none"),
    (384, 14, False, "none"),
    (960, 7, False, "none"),
    (960, 7, False, "hardswish"),
]

# channels_last, whether rows are whole 16 bytes (NCHW planes of 7 x 7 are not)
_POINTWISE = [(True, True), (False, True), (False, False)]
# By layout: channels_last is one image of all positions; small NCHW planes are one tile.
_ONES = {True: ("images", "images_each"), False: ("tiles_each",)}


def cases(target: str) -> list[StaticCase]:
    amd = target.startswith("gfx")
    types = {"partial_ptr": "*fp32", "kl_ptr": "*fp32", "programs": "i32", "channels": "i32", "eps": "fp32"}
    found = [
        _with_ones("aiwq_divergence", kernels.divergence, types, DIVERGENCE, "fp32", "-", note, ones)
        for note, ones in (("", ()), ("one program", ("programs",)))
    ]
    for name, dtype in _DTYPES.items():
        found += [_moments(name, dtype, *shape, amd) for shape in _MOMENTS]
        found += [_depthwise(name, dtype, *shape, amd) for shape in _DEPTHWISE]
        for rows in _POINTWISE:
            found += [
                _pointwise(name, dtype, *rows, quantize, amd) for quantize in {False, quantizes_itself(16, dtype, amd)}
            ]
    return found


def _with_ones(
    kernel: str, function: Any, types: dict[str, str], constants: dict[str, Any], dtype: str, bits: str, note: str,
    ones: tuple[str, ...], **more: Any,
) -> StaticCase:  # fmt: skip
    """Triton compiles an integer argument that is 1 as a constant; so do we, for those that are in a usual launch."""
    types = {name: kind for name, kind in types.items() if name not in ones}
    return StaticCase(kernel, function, types, constants | dict.fromkeys(ones, 1), dtype, bits, note, **more)


def _layout(channels_last: bool) -> str:
    return "channels_last" if channels_last else "NCHW"


def _moments(name: str, dtype: torch.dtype, channels: int, side: int, channels_last: bool, amd: bool) -> StaticCase:
    tile = moments_tile(channels, side * side, channels_last, dtype.itemsize, amd)
    warps, vec = tile.pop("num_warps"), tile["VEC"]
    types = {"new_ptr": f"*{name}", "old_ptr": f"*{name}", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("images", "slow", "fast", "tiles_each", "images_each"), "i32")
    return _with_ones(
        "aiwq_moments", kernels.moments, types, {"CHANNELS_LAST": channels_last, **tile}, name, "-",
        f"{_layout(channels_last)}, {tile['BP']}x{tile['BC']}, rows of {vec}n", _ONES[channels_last],
        streaming=vec * dtype.itemsize == 16, scalar_accesses=10,
        # On AMD new - old of float16 is one v_fma_mix_f32 with the widening in it; nothing is rounded differently.
        contracted=name == "fp16", num_warps=warps,
    )  # fmt: skip


def _types(name: str, integers: list[str]) -> dict[str, str]:
    types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "new_ptr"), f"*{name}") | {"partial_ptr": "*fp32"}
    return types | dict.fromkeys(integers, "i32")


def _depthwise(
    name: str, dtype: torch.dtype, channels: int, side: int, channels_last: bool, activation: str, amd: bool
) -> StaticCase:
    tile = depthwise_tile(channels, side, side, channels_last, amd)
    warps = tile.pop("num_warps")
    integers = "images H W OH OW channel_units images_each kh kw sh sw dh dw top left".split()
    types = _types(name, integers) | {"pad_value": "fp32"}
    constants = {"CHANNELS_LAST": channels_last, "VEC": 16 // dtype.itemsize if channels_last else 1, "MULTIPLIER": 1}
    constants |= {"HAS_BIAS": False, "ACTIVATION": activation, "INTERPRETED": False}
    ones = ("images_each", "sh", "sw", "dh", "dw", "top", "left") if channels_last else ("dh", "dw")
    return _with_ones(
        "aiwq_depthwise_moments", conv_kernels.depthwise_moments, types, constants | tile, name, "-",
        f"{_layout(channels_last)}, {tile['BH']}x{tile['BW']}x{tile['BC']}, {activation}",
        ones, contracted=True, num_warps=warps,
    )  # fmt: skip


def _pointwise(name: str, dtype: torch.dtype, channels_last: bool, wide: bool, quantize: bool, amd: bool) -> StaticCase:
    tile = pointwise_tile(dtype, amd)
    vec = 16 // dtype.itemsize if wide else 1
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    types = _types(name, "images positions in_channels channels tiles_each images_each".split())
    types |= {"A_ptr": "*fp32", "C_ptr": "*fp32"} | dict.fromkeys(("s", "lo", "offset"), "fp32")
    constants = {"CHANNELS_LAST": channels_last, "VEC": vec, "HAS_BIAS": False, "INTERPRETED": False}
    constants |= {"QUANTIZE": quantize, "ACTIVATION": "hardswish" if quantize else "none"}
    return _with_ones(
        "aiwq_pointwise_moments", conv_kernels.pointwise_moments, types, constants | tile, name, "2-8" if quantize else "-",
        f"{_layout(channels_last)}, {tile['BP']}x{tile['BC']}x{tile['BK']}, rows of {vec}n{', with DuQ' if quantize else ''}",
        _ONES[channels_last], contracted=True, **options,
    )  # fmt: skip
