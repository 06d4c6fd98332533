"""Tiles of the Triton kernels of AIWQ: pure functions of shape, dtype and kind of GPU. The static suite compiles them all.

Lanes run along what is contiguous: channels in channels_last (and [N, C]), positions in NCHW. A tile has 1024 elements, eight a
thread, because seven sums an element are kept in registers; AMD's warps are twice as wide, so there it has half as many.
"""

from __future__ import annotations

import torch

_ELEMENTS = 1024
_PROGRAMS = 2048  # enough to fill any GPU several times over
_MOST_TILES = 64  # per program
GRID_LIMIT = 65535  # of axes 1 and 2

DIVERGENCE = {"BP": 64, "BC": 8}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The next one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def vector(length: int, itemsize: int) -> int:
    """Elements of one access: rows of `length` elements start at multiples of it. 16 bytes where the length allows it."""
    vec = 16 // itemsize
    while length % vec:
        vec //= 2
    return vec


def moments_tile(channels: int, positions: int, channels_last: bool, itemsize: int, amd: bool) -> dict[str, int]:
    """BP positions x BC channels, read VEC elements at a time."""
    vec = vector(channels if channels_last else positions, itemsize)
    if channels_last:
        block = _channel_block(channels)
        rows = _ELEMENTS // block
    else:
        rows = min(_ELEMENTS, power_of_2(positions))
        block = _neighbours(channels, rows)
    return {"VEC": vec, "BP": rows, "BC": block, "num_warps": 2 if amd and vec == 8 else 4}


def depthwise_tile(channels: int, height: int, width: int, channels_last: bool, amd: bool) -> dict[str, int]:
    """BH x BW output positions x BC channels."""
    if channels_last:
        block = min(_channel_block(channels), 32)
        columns = min(8, power_of_2(width))
        rows = _ELEMENTS // block // columns
    else:
        columns = min(128, power_of_2(width))
        rows = min(_ELEMENTS // columns, power_of_2(height))
        block = _neighbours(channels, rows * columns)
    # Elements that are not neighbours in memory each need a place and a mask, in registers: four of them a thread, not eight.
    scattered = not channels_last and (amd or block > 1)
    return {"BH": rows, "BW": columns, "BC": block, "num_warps": 8 if scattered else 4}


def pointwise_tile(dtype: torch.dtype, amd: bool) -> dict[str, int]:
    """BP positions x BC output channels, BK input channels at a time."""
    block_k = 16 if dtype == torch.float32 else 32
    if amd:
        return {"BP": 2 * block_k, "BC": 16, "BK": block_k, "num_warps": 4, "num_stages": 2}
    return {"BP": 64, "BC": 32, "BK": block_k, "num_warps": 8, "num_stages": 2 if dtype == torch.float32 else 3}


def quantizes_itself(channels: int, dtype: torch.dtype, amd: bool) -> bool:
    """Whether the pointwise kernel quantizes its input: where one tile holds all output channels, so that it sees it once.

    On AMD never: with a quantizer in front the product needs more scalar registers than there are.
    """
    return not amd and channels <= pointwise_tile(dtype, amd)["BC"]


def share(tiles: int, images: int, blocks: int) -> tuple[int, int]:
    """How many tiles of how many images one program takes: all that leaves enough programs, up to a limit."""
    each = max(1, min(_MOST_TILES, tiles * images * blocks // _PROGRAMS))
    tiles_each = min(tiles, each)
    return tiles_each, max(min(images, each // tiles_each), cdiv(images, GRID_LIMIT))


def _channel_block(channels: int) -> int:
    """Channels of a tile in channels_last: 64, 32 or 16, little of it unused."""
    return 64 if channels % 64 == 0 else 32 if channels > 16 else 16


def _neighbours(channels: int, positions: int) -> int:
    """Channels of a tile in NCHW: several where the planes are small, for they are neighbours in memory."""
    block = min(max(1, _ELEMENTS // positions), power_of_2(channels))
    return max(block, power_of_2(cdiv(channels, GRID_LIMIT)))
