"""The kernels of AIWQ as their launcher compiles them for the layers of the nets: each layout, alignment and tile."""

from __future__ import annotations

import torch

from benchmarks.compiled import StaticCase
from profit_kernels.ops.aiwq import conv_kernels, kernels
from profit_kernels.ops.aiwq.launch import DIVERGENCE, depthwise_tile, moments_tile, pointwise_tile, vector

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# channels, side of the output plane, channels_last: the tiles of the launcher. Rows of 14 x 14 are 8 bytes short of 16 in half
# precision and those of 7 x 7 are odd, so that no launch could read them wider.
_MOMENTS = [(64, 56, True), (24, 56, True), (16, 112, True), (32, 112, False), (384, 14, False), (960, 7, False)]
_DEPTHWISE = [(96, 56, True), (16, 112, True), (32, 112, False), (384, 14, False), (960, 7, False)]


def cases(target: str) -> list[StaticCase]:
    del target  # the same on all
    types = {"partial_ptr": "*fp32", "kl_ptr": "*fp32", "programs": "i32", "channels": "i32", "eps": "fp32"}
    found = [StaticCase("aiwq_divergence", kernels.divergence, types, DIVERGENCE, "fp32", "-")]
    for name, dtype in _DTYPES.items():
        found += [_moments(name, dtype, *shape) for shape in _MOMENTS]
        found += [_depthwise(name, dtype, *shape) for shape in _DEPTHWISE]
        found += [_depthwise(name, dtype, 96, 56, True, quantize) for quantize in (False, True)]
        found += [
            _pointwise(name, dtype, channels_last, quantize) for channels_last in (True, False) for quantize in (False, True)
        ]
    return found


def _layout(channels_last: bool) -> str:
    return "channels_last" if channels_last else "NCHW"


def _moments(name: str, dtype: torch.dtype, channels: int, side: int, channels_last: bool) -> StaticCase:
    tile = moments_tile(channels, side * side, channels_last)
    vec = vector(channels if channels_last else side * side, dtype.itemsize)
    types = {"new_ptr": f"*{name}", "old_ptr": f"*{name}", "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("images", "slow", "fast", "tiles_each", "images_each"), "i32")
    return StaticCase(
        "aiwq_moments", kernels.moments, types, {"CHANNELS_LAST": channels_last, "VEC": vec, **tile}, name, "-",
        f"{_layout(channels_last)}, {tile['BP']}x{tile['BC']}, rows of {vec}n",
        streaming=vec * dtype.itemsize == 16, scalar_accesses=10,
    )  # fmt: skip


def _types(name: str, integers: tuple[str, ...]) -> dict[str, str]:
    data = ("x_ptr", "weight_ptr", "bias_ptr", "new_ptr")
    types = dict.fromkeys(data, f"*{name}") | dict.fromkeys(("A_ptr", "C_ptr", "partial_ptr"), "*fp32")
    return types | dict.fromkeys(integers, "i32") | dict.fromkeys(("pad_value", "s", "lo", "offset"), "fp32")


def _depthwise(
    name: str, dtype: torch.dtype, channels: int, side: int, channels_last: bool, quantize: bool | None = None
) -> StaticCase:  # fmt: skip
    """quantize None: the input comes quantized, or has no activation."""
    tile = depthwise_tile(channels, side, side, channels_last)
    integers = ("images", "H", "W", "OH", "OW", "channel_units", "images_each", "kh", "kw", "sh", "sw", "dh", "dw", "top", "left")
    constants = {"CHANNELS_LAST": channels_last, "VEC": 16 // dtype.itemsize if channels_last else 1, "MULTIPLIER": 1}
    activation = "none" if quantize is None else "hardswish"
    constants |= {"HAS_BIAS": False, "QUANTIZE": bool(quantize), "ACTIVATION": activation, "INTERPRETED": False}
    return StaticCase(
        "aiwq_depthwise_moments", conv_kernels.depthwise_moments, _types(name, integers), constants | tile,
        name, "2-8" if quantize else "-",
        f"{_layout(channels_last)}, {tile['BH']}x{tile['BW']}x{tile['BC']}, {activation}{' + DuQ' if quantize else ''}",
        contracted=True,
    )  # fmt: skip


def _pointwise(name: str, dtype: torch.dtype, channels_last: bool, quantize: bool) -> StaticCase:
    tile = pointwise_tile(dtype)
    options = {key: tile.pop(key) for key in ("num_warps", "num_stages")}
    types = _types(name, ("images", "positions", "in_units", "channel_units", "tiles_each", "images_each"))
    del types["pad_value"]
    activation = "hardswish" if quantize else "none"
    constants = {"CHANNELS_LAST": channels_last, "VEC": 16 // dtype.itemsize, "HAS_BIAS": False, "INTERPRETED": False}
    constants |= {"QUANTIZE": quantize, "ACTIVATION": activation}
    return StaticCase(
        "aiwq_pointwise_moments", conv_kernels.pointwise_moments, types, constants | tile, name, "2-8" if quantize else "-",
        f"{_layout(channels_last)}, {tile['BP']}x{tile['BC']}x{tile['BK']}, {activation}{' + DuQ' if quantize else ''}",
        contracted=True, **options,
    )  # fmt: skip
