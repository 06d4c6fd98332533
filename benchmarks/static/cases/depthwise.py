"""The kernels of the depthwise convolution as their launchers compile them, for the filters of the MobileNets and 7 x 7.

They read a halo again and write partial sums, so they do not count as streaming: the accesses to data are as wide as what a
lane holds (4 channels for 3 x 3: 128 bits of float32, 64 of a half; 2 for 5 x 5, 1 for 7 x 7). Their sums are explicit fma.
"""

from __future__ import annotations

from profit_kernels.ops.conv import kernels, launch

from ..compiled import StaticCase, warp_size

DTYPES = ("fp32", "bf16", "fp16")
FILTERS = [(3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2)]  # size, stride
_FUNCTIONS = (kernels.depthwise_forward, kernels.depthwise_grad_input, kernels.depthwise_grad_weight)
_FLOATS = ("s", "lo", "offset", "pad_value")


def cases(target: str) -> list[StaticCase]:
    """All with DuQ behind h-swish, the longest code, in NCHW and by blocks of 64, 32, 16 and 8 channels; and plain ones."""
    warp = warp_size(target)
    found = []
    for dtype in DTYPES:
        for function in _FUNCTIONS:
            for size, stride in FILTERS:
                found.append(_case(function, dtype, size, stride, warp, 64))
                found.append(_case(function, dtype, size, stride, warp, None))
            found += [_case(function, dtype, 3, 1, warp, channels) for channels in (96, 72, 6)]
            found.append(_case(function, dtype, 3, 1, warp, 64, plain=True))
    return found


def _case(
    function, dtype: str, size: int, stride: int, warp: int, channels: int | None, plain: bool = False
) -> StaticCase:
    """channels: of a channels_last input; None for NCHW, where their number changes nothing."""
    cols = launch.output_cols(size * size, stride)
    if function is kernels.depthwise_grad_input:
        cols = launch.input_cols(stride)
    per_lane = launch.weight_nchw_per_lane(size * size, stride, warp) if function is kernels.depthwise_grad_weight else 1
    tile = launch.tile(size * size, channels or 64, channels is not None, cols, warp, per_lane)
    constants = {
        "KH": size, "KW": size, "SH": stride, "SW": stride, "DH": 1, "DW": 1, "MULTIPLIER": 1,
        "CHANNELS_LAST": channels is not None, "HAS_BIAS": False, "QUANTIZE": not plain,
        "ACTIVATION": "none" if plain else "hardswish",
        "COLS": tile.cols, "POS": tile.pos, "BLOCK_C": tile.block_c, "ALIGN": tile.align, "bias_ptr": None,
    }  # fmt: skip
    constants |= {"A_ptr": None, "C_ptr": None} if plain else {}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    layout = "NCHW" if channels is None else f"channels_last, blocks of {tile.block_c}"
    return StaticCase(
        function.__name__, function, {n: _type(n, dtype) for n in function.arg_names if n not in constants}, constants, dtype,
        note=f"{size} x {size}, stride {stride}, {layout}{', plain' if plain else ''}", contracted=True, num_warps=launch.WARPS,
    )  # fmt: skip


def _type(argument: str, dtype: str) -> str:
    if argument in ("A_ptr", "C_ptr", "partial_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if argument in _FLOATS else "i32"
