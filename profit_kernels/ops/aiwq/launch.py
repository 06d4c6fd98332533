"""Launchers of the Triton kernels of AIWQ: layouts, grids, and what is computed before the kernel.

`kl` reads both outputs once. `conv_kl` reads y_new once, and what the convolution sees once from memory and else from the
caches; the old output is never written. On top come the partial sums, 40 bytes a program and channel.

Quantizing takes some 60 instructions an element (h-swish and three true divisions). A kernel that sees an input element once
does it on the fly; where it would see it several times (9 taps, or many blocks of output channels) the DuQ kernel quantizes
first, once, into a temporary like x. That is two passes over x more, much less than nine times the arithmetic.

Not used, though exact: (1) the update of the weight, conv(x, weight_new - weight_old), with a closed form for channels with no
changed code: x and y_new have to be read all the same, and a tile of 32 channels nearly always holds a changed one (if 94%
are unchanged, one tile in seven holds none), so that nothing is skipped. (2) Moments of a 1x1 layer from the second moments
of its input: C_in^2 products a position instead of C_in * C_out, in more digits than tensor cores have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...dispatch import triton_interpreted
from ...layer import Convolution, Norm, Quantizer, levels
from ..duq import launch as duq
from ..norm.reference import normalize
from . import conv_kernels, kernels
from .tiles import (
    DIVERGENCE,
    GRID_LIMIT,
    cdiv,
    depthwise_tile,
    moments_tile,
    pointwise_tile,
    quantizes_itself,
    share,
    vector,
)


def kl(y_new: Tensor, y_old: Tensor, eps: float) -> Tensor:
    """KL per channel, float32; see reference.kl."""
    if y_new.numel() == 0:
        return _no_samples(y_new)
    channels_last = _is_channels_last(y_new)
    y_new, y_old = _as(y_new, channels_last), _as(y_old, channels_last)
    images, channels = (1 if channels_last else y_new.shape[0]), y_new.shape[1]
    positions = y_new.numel() // images // channels
    itemsize = max(y_new.element_size(), y_old.element_size())
    tile = moments_tile(channels, positions, channels_last, itemsize, _amd())
    tiles, blocks = cdiv(positions, tile["BP"]), cdiv(channels, tile["BC"])
    tiles_each, images_each = share(tiles, images, blocks)
    grid = (cdiv(tiles, tiles_each), blocks, cdiv(images, images_each))
    slow, fast = (positions, channels) if channels_last else (channels, positions)
    with duq.on_device(y_new):
        partial = _partials(y_new, grid)
        kernels.moments[grid](
            y_new, y_old, partial, images, slow, fast // tile["VEC"], tiles_each, images_each,
            CHANNELS_LAST=channels_last, **tile, enable_fp_fusion=False,
        )  # fmt: skip
        return _finish(partial, eps)


def conv_kl(
    x: Tensor, y_new: Tensor, norm: Norm | None, q: Quantizer, weight_old: Tensor, bias: Tensor | None, conv: Convolution,
    eps: float,
) -> Tensor:  # fmt: skip
    """KL of y_new from what the old weight gives; see reference.conv_kl. Depthwise, or 1x1 without groups and padding."""
    _check(x, y_new, weight_old, bias, conv)
    if y_new.numel() == 0:
        return _no_samples(y_new)
    if norm is not None:
        x = normalize(x, norm)
    channels, _, *kernel = weight_old.shape
    pointwise = conv.groups == 1 and kernel == [1, 1] and not any(conv.pads)
    channels_last = _is_channels_last(y_new)
    if pointwise:
        x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
    x, y_new = _as(x, channels_last), _as(y_new, channels_last)
    bits, activation = q.bits, q.activation
    if bits is not None and not (pointwise and quantizes_itself(channels, y_new.dtype, _amd())):
        x = duq.forward(x, q.a, q.c, bits, q.signed, q.offset, activation)
        bits, activation = None, "none"
    # [taps or input channels, channels]: lanes read neighbouring channels.
    weight = weight_old.to(y_new.dtype).reshape(channels, -1).t().contiguous()
    # A pointer that is never followed stands for what is absent.
    tensors = (x, weight, x if bias is None else bias.to(y_new.dtype), y_new)
    constants = {"CHANNELS_LAST": channels_last, "HAS_BIAS": bias is not None, "ACTIVATION": activation}
    with duq.on_device(x):
        if pointwise:
            quantizer = (x, x, 1.0, 0.0, 0.0)
            if bits is not None:
                quantizer = (*duq.intervals(q.a, q.c), float(levels(bits, q.signed)), -1.0 if q.signed else 0.0, q.offset)
            partial = _pointwise(*tensors, *quantizer, QUANTIZE=bits is not None, **constants)
        else:
            left, _, top, _ = conv.pads
            partial = _depthwise(*tensors, (*kernel, *conv.stride, *conv.dilation, top, left), conv.pad_value, **constants)
        return _finish(partial, eps)


def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, y_new: Tensor, geometry: Sequence[int], pad_value: float,
    *, CHANNELS_LAST: bool, **constants: bool | str,
) -> Tensor:  # fmt: skip
    images, in_channels, height, width = x.shape
    _, channels, out_h, out_w = y_new.shape
    tile = depthwise_tile(channels, out_h, out_w, CHANNELS_LAST, _amd())
    rows, across, blocks = cdiv(out_h, tile["BH"]), cdiv(out_w, tile["BW"]), cdiv(channels, tile["BC"])
    _, tiles_each = share(1, images * across, rows * blocks)
    images_each = max(cdiv(tiles_each, across), cdiv(images, GRID_LIMIT))
    grid = (rows, blocks, cdiv(images, images_each))
    vec = vector(in_channels, x.element_size()) if CHANNELS_LAST else 1
    partial = _partials(y_new, grid)
    conv_kernels.depthwise_moments[grid](
        x, weight, bias, y_new, partial,
        images, height, width, out_h, out_w, channels // vec, images_each, *geometry, pad_value,
        CHANNELS_LAST=CHANNELS_LAST, VEC=vec, MULTIPLIER=channels // in_channels, **constants, **tile,
        INTERPRETED=triton_interpreted(), enable_fp_fusion=False,
    )  # fmt: skip
    return partial


def _pointwise(
    x: Tensor, weight: Tensor, bias: Tensor, y_new: Tensor, A: Tensor, C: Tensor, s: float, lo: float, offset: float,
    *, CHANNELS_LAST: bool, **constants: bool | str,
) -> Tensor:  # fmt: skip
    images, in_channels, channels = (1 if CHANNELS_LAST else x.shape[0]), x.shape[1], y_new.shape[1]
    positions = x.numel() // images // in_channels
    tile = pointwise_tile(y_new.dtype, _amd())
    tiles, blocks = cdiv(positions, tile["BP"]), cdiv(channels, tile["BC"])
    tiles_each, images_each = share(tiles, images, blocks)
    grid = (cdiv(tiles, tiles_each), blocks, cdiv(images, images_each))
    if CHANNELS_LAST:
        vec = min(vector(n, x.element_size()) for n in (in_channels, channels))
        sizes = (positions, in_channels // vec, channels // vec)
    else:
        vec = vector(positions, x.element_size())
        sizes = (positions // vec, in_channels, channels)
    partial = _partials(y_new, grid)
    conv_kernels.pointwise_moments[grid](
        x, weight, bias, y_new, A, C, partial, images, *sizes, tiles_each, images_each, s, lo, offset,
        CHANNELS_LAST=CHANNELS_LAST, VEC=vec, **constants, **tile, INTERPRETED=triton_interpreted(), enable_fp_fusion=False,
    )  # fmt: skip
    return partial


def _finish(partial: Tensor, eps: float) -> Tensor:
    """Second stage: KL [C] from the partial sums of all programs."""
    _, programs, channels = partial.shape
    kl = torch.empty(channels, dtype=torch.float32, device=partial.device)
    kernels.divergence[(cdiv(channels, DIVERGENCE["BC"]),)](
        partial, kl, programs, channels, eps, **DIVERGENCE, enable_fp_fusion=False
    )
    return kl


def _partials(y: Tensor, grid: tuple[int, int, int]) -> Tensor:
    return torch.empty(kernels.ROWS, grid[0] * grid[2], y.shape[1], dtype=torch.float32, device=y.device)


def _no_samples(y: Tensor) -> Tensor:
    return torch.full((y.shape[1],), float("nan"), dtype=torch.float32, device=y.device)


def _is_channels_last(y: Tensor) -> bool:
    return y.movedim(1, -1).is_contiguous()


def _as(x: Tensor, channels_last: bool) -> Tensor:
    """x in this order of memory, copied only if it is in another."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _amd() -> bool:
    return torch.version.hip is not None


def _check(x: Tensor, y_new: Tensor, weight: Tensor, bias: Tensor | None, conv: Convolution) -> None:
    """A kernel would read past the end of what is too small."""
    expected = (x.shape[0], weight.shape[0], *conv.output_size("aiwq_conv2d", x, weight))
    if tuple(y_new.shape) != expected:
        raise ValueError(f"aiwq_conv2d: y_new must be this layer's output {expected}, got {tuple(y_new.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"aiwq_conv2d: the bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
