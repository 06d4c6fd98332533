"""The kernels of AIWQ as their launcher compiles them for the layers of the nets: each layout, alignment and tile."""

from __future__ import annotations

import torch

from benchmarks.compiled import StaticCase
from profit_kernels.ops.aiwq import conv_kernels, kernels
from profit_kernels.ops.aiwq.launch import DIVERGENCE, depthwise_tile, moments_tile, pointwise_tile, vector

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FLOATS = {"s": "fp32", "lo": "fp32", "offset": "fp32"}


def cases(target: str) -> list[StaticCase]:
    del target  # the same on all
    return [
        StaticCase(
            "aiwq_divergence", kernels.divergence,
            {"partial_ptr": "*fp32", "kl_ptr": "*fp32", "programs": "i32", "channels": "i32", "eps": "fp32"}, DIVERGENCE, "fp32", "-",
        ),  # fmt: skip
        *(case for name, dtype in _DTYPES.items() for case in _of_dtype(name, dtype)),
    ]


def _of_dtype(name: str, dtype: torch.dtype) -> list[StaticCase]:
    wide = 16 // dtype.itemsize
    # channels_last with 64, 32 and 16 channels a tile; NCHW planes of 112, 28, 14 and 7 pixels. Rows of 14 x 14 are 8 bytes
    # short of 16 in half precision, those of 7 x 7 are odd: no launch could read them wider.
    shapes = [(64, 3136, True), (96, 3136, True), (24, 3136, True), (16, 12544, True)]
    shapes += [(32, 12544, False), (192, 784, False), (384, 196, False), (960, 49, False)]
    found = [_moments(name, dtype, *shape) for shape in shapes]
    for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1)):
        for channels, size, channels_last in ((96, 56, True), (16, 112, True), (32, 112, False), (384, 14, False), (960, 7, False)):
            found.append(_depthwise(name, wide, channels, size, channels_last, kernel, stride, "none", False))
    found.append(_depthwise(name, wide, 96, 56, True, 3, 1, "hardswish", False))
    found.append(_depthwise(name, wide, 32, 112, False, 3, 2, "hardswish", True))
    found.append(_depthwise(name, wide, 96, 56, True, 1, 1, "hardswish", True))
    for channels_last in (True, False):
        for activation, quantize in (("none", False), ("none", True), ("relu6", True), ("hardswish", True)):
            found.append(_pointwise(name, dtype, channels_last, activation, quantize))
    return found


def _moments(name: str, dtype: torch.dtype, channels: int, positions: int, channels_last: bool) -> StaticCase:
    tile = moments_tile(channels, positions, channels_last)
    vec = vector(channels if channels_last else positions, dtype.itemsize)
    layout = "channels_last" if channels_last else "NCHW"
    return StaticCase(
        "aiwq_moments", kernels.moments,
        {"new_ptr": f"*{name}", "old_ptr": f"*{name}", "partial_ptr": "*fp32", "images": "i32", "slow": "i32", "fast": "i32",
         "tiles_each": "i32", "images_each": "i32"},
        {"CHANNELS_LAST": channels_last, "VEC": vec, **tile},
        name, "-", f"{layout}, {tile['BP']}x{tile['BC']}, rows of {vec}", streaming=vec * dtype.itemsize == 16, scalar_accesses=10,
    )  # fmt: skip


def _depthwise(
    name: str, wide: int, channels: int, size: int, channels_last: bool, kernel: int, stride: int, activation: str, quantize: bool
) -> StaticCase:  # fmt: skip
    tile = depthwise_tile(channels, size, size, channels_last)
    layout = "channels_last" if channels_last else "NCHW"
    note = f"{layout}, {tile['BH']}x{tile['BW']}x{tile['BC']}, k{kernel} s{stride}, {activation}{' + DuQ' if quantize else ''}"
    names = ("images", "H", "W", "OH", "OW", "channel_units", "images_each", "top", "left")
    return StaticCase(
        "aiwq_depthwise_moments", conv_kernels.depthwise_moments,
        {"x_ptr": f"*{name}", "weight_ptr": f"*{name}", "bias_ptr": f"*{name}", "new_ptr": f"*{name}", "A_ptr": "*fp32",
         "C_ptr": "*fp32", "partial_ptr": "*fp32", **dict.fromkeys(names, "i32"), "pad_value": "fp32", **_FLOATS},
        {"CHANNELS_LAST": channels_last, "VEC": wide if channels_last else 1, "MULTIPLIER": 1, "KH": kernel, "KW": kernel,
         "SH": stride, "SW": stride, "DH": 1, "DW": 1, "HAS_BIAS": False, "QUANTIZE": quantize, "ACTIVATION": activation, **tile},
        name, "2-8" if quantize else "-", note, contracted=True,
    )  # fmt: skip


def _pointwise(name: str, dtype: torch.dtype, channels_last: bool, activation: str, quantize: bool) -> StaticCase:
    tile = pointwise_tile(dtype)
    layout = "channels_last" if channels_last else "NCHW"
    note = f"{layout}, {tile['BP']}x{tile['BC']}x{tile['BK']}, {activation}{' + DuQ' if quantize else ''}"
    names = ("images", "positions", "in_units", "channel_units", "tiles_each", "images_each")
    return StaticCase(
        "aiwq_pointwise_moments", conv_kernels.pointwise_moments,
        {"x_ptr": f"*{name}", "weight_ptr": f"*{name}", "bias_ptr": f"*{name}", "new_ptr": f"*{name}", "A_ptr": "*fp32",
         "C_ptr": "*fp32", "partial_ptr": "*fp32", **dict.fromkeys(names, "i32"), **_FLOATS},
        {"CHANNELS_LAST": channels_last, "VEC": 16 // dtype.itemsize, "HAS_BIAS": False, "QUANTIZE": quantize,
         "ACTIVATION": activation, **tile},
        name, "2-8" if quantize else "-", note, contracted=True,
    )  # fmt: skip
