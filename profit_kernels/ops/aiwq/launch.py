"""Launchers of the Triton kernels of AIWQ: layouts, tiles, and how many programs share the work.

Bytes: `kl` reads both outputs once. `conv_kl` reads y_new once and what the convolution sees once or, out of the caches, more
often; it never writes the old output. On top come the partial sums, 40 bytes a program and channel, at most 2% of y_new.

Lanes run along what is contiguous: channels in channels_last (and [N, C]), positions in NCHW. A tile has 1024 elements, eight
a thread, because seven sums a element are kept in registers; a program takes as many tiles as leave about 2048 programs,
at most 64, so that no more than 64 float32 terms are added in a row.

The quantizer's two or three true divisions cost some 45 instructions an element. Where the kernel visits an input element once
(a 1x1 layer whose output channels fit one tile), it quantizes on the fly. Where it would visit it several times (9 taps, or
many blocks of output channels), the DuQ kernel quantizes first, once, into a temporary like x: two more passes over x, which
the caches partly hide, are cheaper than 9 times the arithmetic.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ...dispatch import triton_interpreted
from ..duq import launch as duq
from ..duq.reference import steps
from . import conv_kernels, kernels

_ELEMENTS = 1024  # of a tile
_PROGRAMS = 2048  # enough to fill any GPU several times over
_MOST_TILES = 64  # per program
_GRID_LIMIT = 65535  # of axes 1 and 2

DIVERGENCE = {"BP": 64, "BC": 8}


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def vector(length: int, itemsize: int) -> int:
    """Elements of one access: rows of `length` elements start at multiples of it. 16 bytes where the length allows it."""
    vec = 16 // itemsize
    while length % vec:
        vec //= 2
    return vec


def channel_block(channels: int) -> int:
    """Channels of a tile in channels_last: 64, 32 or 16, little of it unused."""
    return 64 if channels % 64 == 0 else 32 if channels > 16 else 16


def moments_tile(channels: int, positions: int, channels_last: bool) -> dict[str, int]:
    """BP positions x BC channels."""
    if channels_last:
        block = channel_block(channels)
        return {"BP": _ELEMENTS // block, "BC": block}
    # Small planes: several channels, whose planes are neighbours in memory.
    rows = min(_ELEMENTS, triton.next_power_of_2(positions))
    block = min(_ELEMENTS // rows, triton.next_power_of_2(channels))
    return {"BP": rows, "BC": max(block, triton.next_power_of_2(triton.cdiv(channels, _GRID_LIMIT)))}


def depthwise_tile(channels: int, height: int, width: int, channels_last: bool) -> dict[str, int]:
    """BH x BW output positions x BC channels."""
    if channels_last:
        block = min(channel_block(channels), 32)
        columns = min(8, triton.next_power_of_2(width))
        return {"BH": _ELEMENTS // block // columns, "BW": columns, "BC": block}
    columns = min(128, triton.next_power_of_2(width))
    rows = min(_ELEMENTS // columns, triton.next_power_of_2(height))
    block = min(_ELEMENTS // columns // rows, triton.next_power_of_2(channels))
    return {"BH": rows, "BW": columns, "BC": max(block, triton.next_power_of_2(triton.cdiv(channels, _GRID_LIMIT)))}


def pointwise_tile(dtype: torch.dtype, amd: bool) -> dict[str, int]:
    """BP positions x BC output channels, BK input channels at a time; what fits the registers beside seven sums an element."""
    block_k = 16 if dtype == torch.float32 else 32
    if amd:
        return {"BP": 2 * block_k, "BC": 16, "BK": block_k, "num_warps": 4, "num_stages": 2}
    return {"BP": 64, "BC": 32, "BK": block_k, "num_warps": 8, "num_stages": 2 if dtype == torch.float32 else 3}


def on_the_fly(visits: float, pointwise: bool, amd: bool) -> bool:
    """Whether the kernel quantizes its input itself. AMD: before a product that needs more scalar registers than there are."""
    return visits <= 1 and not (pointwise and amd)


def _share(tiles: int, images: int, blocks: int) -> tuple[int, int]:
    """How many tiles of how many images one program takes."""
    each = max(1, min(_MOST_TILES, tiles * images * blocks // _PROGRAMS))
    tiles_each = min(tiles, each)
    return tiles_each, max(min(images, each // tiles_each), triton.cdiv(images, _GRID_LIMIT))


def _is_channels_last(y: Tensor) -> bool:
    return y.movedim(1, -1).is_contiguous()


def _as(x: Tensor, channels_last: bool) -> Tensor:
    """x in this order of memory, copied only if it is in another."""
    if (_is_channels_last(x) if channels_last else x.is_contiguous()):
        return x
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _finish(partial: Tensor, eps: float) -> Tensor:
    _, programs, channels = partial.shape
    kl = torch.empty(channels, dtype=torch.float32, device=partial.device)
    kernels.divergence[(triton.cdiv(channels, DIVERGENCE["BC"]),)](
        partial, kl, programs, channels, eps, **DIVERGENCE, enable_fp_fusion=False
    )
    return kl


def _partials(y: Tensor, channels: int, grid: tuple[int, int, int]) -> Tensor:
    return torch.empty(10, grid[0] * grid[2], channels, dtype=torch.float32, device=y.device)


def _no_samples(y: Tensor) -> Tensor:
    return torch.full((y.shape[1],), float("nan"), dtype=torch.float32, device=y.device)


def kl(y_new: Tensor, y_old: Tensor, eps: float) -> Tensor:
    """KL per channel, float32; see reference.kl."""
    if y_new.numel() == 0:
        return _no_samples(y_new)
    channels_last = _is_channels_last(y_new)
    y_new, y_old = _as(y_new, channels_last), _as(y_old, channels_last)
    images, channels = (1 if channels_last else y_new.shape[0]), y_new.shape[1]
    positions = y_new.numel() // images // channels
    slow, fast = (positions, channels) if channels_last else (channels, positions)
    tile = moments_tile(channels, positions, channels_last)
    vec = vector(fast, max(y_new.element_size(), y_old.element_size()))
    tiles, blocks = triton.cdiv(positions, tile["BP"]), triton.cdiv(channels, tile["BC"])
    tiles_each, images_each = _share(tiles, images, blocks)
    grid = (triton.cdiv(tiles, tiles_each), blocks, triton.cdiv(images, images_each))
    with _device(y_new):
        partial = _partials(y_new, channels, grid)
        kernels.moments[grid](
            y_new, y_old, partial, images, slow, fast // vec, tiles_each, images_each,
            CHANNELS_LAST=channels_last, VEC=vec, **tile, enable_fp_fusion=False,
        )  # fmt: skip
        return _finish(partial, eps)


def conv_kl(
    x: Tensor, y_new: Tensor, weight_old: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    groups: int, pad_value: float, a_x: Tensor | None, c_x: Tensor | None, act_bits: int | None, signed: bool, offset: float,
    activation: str, eps: float,
) -> Tensor:  # fmt: skip
    """KL of y_new from what the old weight gives; see reference.conv_kl. Depthwise, or 1x1 without groups and padding."""
    _check(x, y_new, weight_old, bias, stride, pads, dilation)
    if y_new.numel() == 0:
        return _no_samples(y_new)
    channels, _, kh, kw = weight_old.shape
    pointwise = groups == 1 and kh == kw == 1 and not any(pads)
    amd = torch.version.hip is not None
    tile = pointwise_tile(y_new.dtype, amd)
    channels_last = _is_channels_last(y_new)
    if pointwise:
        x = x[:, :, :: stride[0], :: stride[1]]
        visits = triton.cdiv(channels, tile["BC"])
    else:
        visits = kh * kw * (channels // groups) / (stride[0] * stride[1])
    x, y_new = _as(x, channels_last), _as(y_new, channels_last)
    if act_bits is not None and not on_the_fly(visits, pointwise, amd):
        x = duq.forward(x, a_x, c_x, act_bits, signed, offset, activation)
        act_bits, activation = None, "none"
    quantizer = {"QUANTIZE": act_bits is not None, "ACTIVATION": activation}
    A = C = x  # never read
    s, lo = 1.0, 0.0
    if act_bits is not None:
        A, C = duq.intervals(a_x, c_x)
        s, lo = float(steps(act_bits, signed)), -1.0 if signed else 0.0
    # [taps or input channels, channels]: lanes read neighbouring channels.
    weight = weight_old.to(y_new.dtype).reshape(channels, -1).t().contiguous()
    bias_or_x = x if bias is None else bias.to(y_new.dtype)
    with _device(x):
        if pointwise:
            partial = _pointwise(
                x, weight, bias_or_x, y_new, A, C, s, lo, offset, channels_last, tile, HAS_BIAS=bias is not None, **quantizer
            )
        else:
            partial = _depthwise(
                x, weight, bias_or_x, y_new, A, C, (kh, kw, *stride, *dilation, pads[2], pads[0]), pad_value, s, lo, offset,
                channels_last, HAS_BIAS=bias is not None, **quantizer,
            )  # fmt: skip
        return _finish(partial, eps)


def _check(
    x: Tensor, y_new: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int]
) -> None:
    """A kernel would read past the end of what is too small."""
    left, right, top, bottom = pads
    out_h = (x.shape[2] + top + bottom - dilation[0] * (weight.shape[2] - 1) - 1) // stride[0] + 1
    out_w = (x.shape[3] + left + right - dilation[1] * (weight.shape[3] - 1) - 1) // stride[1] + 1
    expected = (x.shape[0], weight.shape[0], out_h, out_w)
    if tuple(y_new.shape) != expected:
        raise ValueError(f"aiwq_conv2d: y_new must be this layer's output {expected}, got {tuple(y_new.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"aiwq_conv2d: the bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")


def _depthwise(x, weight, bias, y_new, A, C, geometry, pad_value, s, lo, offset, channels_last, **constants) -> Tensor:
    images, in_channels, height, width = x.shape
    _, channels, out_h, out_w = y_new.shape
    tile = depthwise_tile(channels, out_h, out_w, channels_last)
    rows, blocks = triton.cdiv(out_h, tile["BH"]), triton.cdiv(channels, tile["BC"])
    across = triton.cdiv(out_w, tile["BW"])
    _, images_each = _share(1, images * across, rows * blocks)
    images_each = max(triton.cdiv(images_each, across), triton.cdiv(images, _GRID_LIMIT))
    grid = (rows, blocks, triton.cdiv(images, images_each))
    vec = vector(in_channels, x.element_size()) if channels_last else 1
    partial = _partials(x, channels, grid)
    conv_kernels.depthwise_moments[grid](
        x, weight, bias, y_new, A, C, partial,
        images, height, width, out_h, out_w, channels // vec, images_each, *geometry, pad_value, s, lo, offset,
        CHANNELS_LAST=channels_last, VEC=vec, MULTIPLIER=channels // in_channels, **constants, **tile,
        INTERPRETED=triton_interpreted(), enable_fp_fusion=False,
    )  # fmt: skip
    return partial


def _pointwise(x, weight, bias, y_new, A, C, s, lo, offset, channels_last, tile, **constants) -> Tensor:
    images = 1 if channels_last else x.shape[0]
    in_channels, channels = x.shape[1], y_new.shape[1]
    positions = x.numel() // images // in_channels
    tiles, blocks = triton.cdiv(positions, tile["BP"]), triton.cdiv(channels, tile["BC"])
    tiles_each, images_each = _share(tiles, images, blocks)
    grid = (triton.cdiv(tiles, tiles_each), blocks, triton.cdiv(images, images_each))
    rows = (in_channels, channels) if channels_last else (positions,)
    vec = min(vector(n, x.element_size()) for n in rows)
    sizes = (positions, in_channels // vec, channels // vec) if channels_last else (positions // vec, in_channels, channels)
    partial = _partials(x, channels, grid)
    conv_kernels.pointwise_moments[grid](
        x, weight, bias, y_new, A, C, partial, images, *sizes, tiles_each, images_each, s, lo, offset,
        CHANNELS_LAST=channels_last, VEC=vec, **constants, **tile,
        INTERPRETED=triton_interpreted(), enable_fp_fusion=False,
    )  # fmt: skip
    return partial
