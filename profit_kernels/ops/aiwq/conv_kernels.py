"""Triton kernels of AIWQ that compute the old output themselves: it lives in registers only and is never written.

`old` is rounded to the dtype of the layer's own output, as the reference does, so that for identical weights new and old
differ by the order of summation alone. Compile with enable_fp_fusion=False, see ops/duq/device.py; the multiply-adds of the
convolution are fused on purpose.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..duq.device import activate, quantize
from .kernels import columns, pivot, plus, terms, write, zeros


@triton.jit
def _input(x, A, C, s, lo, offset, dtype: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    """What the convolution sees of x: act(x), quantized, through the dtype of x to that of the outputs, as float32."""
    h = activate(x.to(tl.float32), ACTIVATION)
    if QUANTIZE:
        h = C * quantize(tl.div_rn(h - offset, A), lo, s) + offset
    return h.to(x.dtype).to(dtype)


@triton.jit
def depthwise_moments(
    x_ptr, weight_ptr, bias_ptr, new_ptr, A_ptr, C_ptr, partial_ptr,
    images, H, W, OH, OW, channel_units, images_each, top, left, pad_value, s, lo, offset,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, MULTIPLIER: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, HAS_BIAS: tl.constexpr,
    QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """old = conv(pad(duq(act(x))), weight) + bias tap by tap, in registers only. weight: [KH * KW, channels].

    Program (i, j, k): BH output rows from the i-th on over their whole width, BC channels, `images_each` images.
    """
    channels = channel_units * VEC
    in_channels = channels // MULTIPLIER
    block = tl.program_id(1) * BC
    c = block + tl.arange(0, BC)
    real = c < channels
    block_in = block // MULTIPLIER
    c_in = c // MULTIPLIER - block_in
    A = tl.load(A_ptr) if QUANTIZE else 1.0
    C = tl.load(C_ptr) if QUANTIZE else 1.0
    bias = tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BC], dtype=tl.float32)
    dtype: tl.constexpr = new_ptr.dtype.element_ty
    pad = tl.full([1, 1], pad_value, tl.float32).to(dtype).to(tl.float32)

    row0 = tl.program_id(0) * BH
    first = tl.program_id(2) * images_each
    count = tl.minimum(images_each, images - first)
    place = tl.arange(0, BH * BW)
    row, column = place // BW, place % BW
    # Distances in elements: where a tile starts is a scalar in int64, places inside it are int32.
    x_column, x_row = (in_channels, W * in_channels) if CHANNELS_LAST else (1, W)
    y_column, y_row = (channels, OW * channels) if CHANNELS_LAST else (1, OW)
    x_channel, y_channel = (1, 1) if CHANNELS_LAST else (H * W, OH * OW)
    h0 = row0 * SH - top
    x_start = block_in.to(tl.int64) * x_channel + h0.to(tl.int64) * x_row
    y_start = block.to(tl.int64) * y_channel + row0.to(tl.int64) * y_row

    sums = zeros([BH * BW, BC])
    K_new = tl.zeros([BC], dtype=tl.float32)
    K_old = tl.zeros([BC], dtype=tl.float32)
    for n in range(count):
        image = (first + n).to(tl.int64)
        x_image = x_ptr + (image * H * W * in_channels + x_start)
        y_image = new_ptr + (image * OH * OW * channels + y_start)
        for column0 in range(0, OW, BW):
            live = ((row0 + row < OH) & (column0 + column < OW))[:, None] & real[None, :]
            w0 = (column0 + column) * SW - left
            old = tl.zeros([BH * BW, BC], dtype=tl.float32) + bias[None, :]
            # Loops at run time: unrolled, the taps of a 5 x 5 layer do not fit the registers.
            for i in range(KH):
                for j in range(KW):
                    h, w = row * SH + i * DH, w0 + j * DW
                    inside = ((h0 + h >= 0) & (h0 + h < H) & (w >= 0) & (w < W))[:, None]
                    at = (h * x_row + w * x_column)[:, None] + (c_in * x_channel)[None, :]
                    x = tl.load(x_image + at, mask=inside & live, other=0.0)
                    q = _input(x, A, C, s, lo, offset, dtype, QUANTIZE, ACTIVATION).to(tl.float32)
                    tap = tl.load(weight_ptr + (i * KW + j) * channels + c, mask=real, other=0.0).to(tl.float32)
                    old = tl.fma(tl.where(inside, q, pad), tl.broadcast_to(tap[None, :], [BH * BW, BC]), old)
            old = old.to(dtype).to(tl.float32)  # rounded as the layer's own output is
            at = (row * y_row + (column0 + column) * y_column)[:, None] + (tl.arange(0, BC) * y_channel)[None, :]
            new = tl.load(y_image + at, mask=live, other=0.0).to(tl.float32)
            if (n == 0) & (column0 == 0):
                K_new, K_old = pivot(new, live), pivot(old, live)
            sums = plus(sums, terms(new, old, K_new, K_old, live))
    write(partial_ptr, c, channels, tl.minimum(OH - row0, BH) * OW * count, K_old, K_new, columns(sums))


@triton.jit
def pointwise_moments(
    x_ptr, weight_ptr, bias_ptr, new_ptr, A_ptr, C_ptr, partial_ptr,
    images, positions, in_units, channel_units, tiles_each, images_each, s, lo, offset,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """old = duq(act(x)) @ weight + bias, kept in the accumulators of the product. weight: [in_channels, channels].

    Programs as in `moments`; with CHANNELS_LAST there is one image of all positions.
    """
    in_channels, channels = in_units * VEC, channel_units * VEC
    block = tl.program_id(1) * BC
    c = block + tl.arange(0, BC)
    real = c < channels
    A = tl.load(A_ptr) if QUANTIZE else 1.0
    C = tl.load(C_ptr) if QUANTIZE else 1.0
    bias = tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BC], dtype=tl.float32)
    dtype: tl.constexpr = new_ptr.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * tiles_each * BP
    first = tl.program_id(2) * images_each
    count = tl.minimum(images_each, images - first)
    end = tl.minimum(start + tiles_each * BP, positions)
    step = tl.arange(0, BP)
    x_position, y_position = (in_channels, channels) if CHANNELS_LAST else (1, 1)
    x_channel, y_channel = (1, 1) if CHANNELS_LAST else (positions, positions)

    sums = zeros([BC])
    K_new = tl.zeros([BC], dtype=tl.float32)
    K_old = tl.zeros([BC], dtype=tl.float32)
    for n in range(count):
        image = (first + n).to(tl.int64)
        for p0 in range(start, end, BP):
            here = p0 + step < positions
            x_start = x_ptr + (image * positions * in_channels + p0 * x_position)
            y_start = new_ptr + (image * positions * channels + p0 * y_position + block.to(tl.int64) * y_channel)
            old = tl.zeros([BP, BC], dtype=tl.float32)
            for k0 in range(0, in_channels, BK):
                k = k0 + tl.arange(0, BK)
                at = step[:, None] * x_position + k[None, :] * x_channel
                within = (k < in_channels)[None, :]
                x = tl.load(x_start + at, mask=here[:, None] & within, other=0.0)
                q = _input(x, A, C, s, lo, offset, dtype, QUANTIZE, ACTIVATION)
                at = k[:, None] * channels + c[None, :]
                weight = tl.load(weight_ptr + at, mask=(k < in_channels)[:, None] & real[None, :], other=0.0)
                old = tl.dot(q, weight, old, input_precision="ieee")
            old = (old + bias[None, :]).to(dtype).to(tl.float32)  # rounded as the layer's own output is
            at = step[:, None] * y_position + tl.arange(0, BC)[None, :] * y_channel
            live = here[:, None] & real[None, :]
            new = tl.load(y_start + at, mask=live, other=0.0).to(tl.float32)
            if (n == 0) & (p0 == start):
                K_new, K_old = pivot(new, live), pivot(old, live)
            sums = plus(sums, columns(terms(new, old, K_new, K_old, live)))
    write(partial_ptr, c, channels, (end - start) * count, K_old, K_new, sums)
