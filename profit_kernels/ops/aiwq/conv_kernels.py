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
def _rounded(v, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to the nearest value of dtype, still as float32."""
    if INTERPRETED and dtype == tl.bfloat16:  # Triton's interpreter cuts the digits off where a GPU rounds
        bits = v.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(dtype).to(tl.float32)


@triton.jit
def _through(v, first: tl.constexpr, second: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounded to the dtype of x and then to that of the outputs, as a layer under autocast does."""
    return _rounded(_rounded(v, first, INTERPRETED), second, INTERPRETED)


@triton.jit
def depthwise_moments(
    x_ptr, weight_ptr, bias_ptr, new_ptr, partial_ptr,
    images, H, W, OH, OW, channel_units, images_each, kh, kw, sh, sw, dh, dw, top, left, pad_value,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, MULTIPLIER: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """old = conv(pad(act(x)), weight) + bias tap by tap, in registers only. weight: [kh * kw, channels].

    Program (i, j, k): BH output rows from the i-th on over their whole width, BC channels, `images_each` images.
    """
    channels = channel_units * VEC
    in_channels = channels // MULTIPLIER
    block = tl.program_id(1) * BC
    c = block + tl.arange(0, BC)
    real = c < channels
    block_in = block // MULTIPLIER
    c_in = c // MULTIPLIER - block_in
    bias = tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32) if HAS_BIAS else tl.zeros([BC], dtype=tl.float32)
    dtype: tl.constexpr = new_ptr.dtype.element_ty
    pad = _rounded(tl.full([1, 1], pad_value, tl.float32), dtype, INTERPRETED)

    row0 = tl.program_id(0) * BH
    first = tl.program_id(2) * images_each
    count = tl.minimum(images_each, images - first)
    place = tl.arange(0, BH * BW)
    row, column = place // BW, place % BW
    # Distances in elements: where a tile starts is a scalar in int64, places inside it are int32.
    x_column, x_row = (in_channels, W * in_channels) if CHANNELS_LAST else (1, W)
    y_column, y_row = (channels, OW * channels) if CHANNELS_LAST else (1, OW)
    x_channel, y_channel = (1, 1) if CHANNELS_LAST else (H * W, OH * OW)
    h0 = row0 * sh - top
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
            w0 = (column0 + column) * sw - left
            old = tl.zeros([BH * BW, BC], dtype=tl.float32) + bias[None, :]
            # Loops at run time: unrolled, the taps of a 5 x 5 layer do not fit the registers.
            for i in range(kh):
                for j in range(kw):
                    h, w = row * sh + i * dh, w0 + j * dw
                    inside = ((h0 + h >= 0) & (h0 + h < H) & (w >= 0) & (w < W))[:, None]
                    at = (h * x_row + w * x_column)[:, None] + (c_in * x_channel)[None, :]
                    x = tl.load(x_image + at, mask=inside & live, other=0.0)
                    q = _through(activate(x.to(tl.float32), ACTIVATION), x.dtype, dtype, INTERPRETED)
                    tap = tl.load(weight_ptr + (i * kw + j) * channels + c, mask=real, other=0.0).to(tl.float32)
                    old = tl.fma(tl.where(inside, q, pad), tl.broadcast_to(tap[None, :], [BH * BW, BC]), old)
            old = _rounded(old, dtype, INTERPRETED)  # rounded as the layer's own output is
            at = (row * y_row + (column0 + column) * y_column)[:, None] + (tl.arange(0, BC) * y_channel)[None, :]
            new = tl.load(y_image + at, mask=live, other=0.0).to(tl.float32)
            if (n == 0) & (column0 == 0):
                K_new, K_old = pivot(new, live), pivot(old, live)
            sums = plus(sums, terms(new, old, K_new, K_old, live))
    write(partial_ptr, c, channels, tl.minimum(OH - row0, BH) * OW * count, K_old, K_new, columns(sums))


@triton.jit
def pointwise_moments(
    x_ptr, weight_ptr, bias_ptr, new_ptr, A_ptr, C_ptr, partial_ptr,
    images, positions, in_channels, channels, tiles_each, images_each, s, lo, offset,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """old = duq(act(x)) @ weight + bias, kept in the accumulators of the product. weight: [in_channels, channels].

    Programs as in `moments`. With CHANNELS_LAST there is one image of all positions and channels are counted in VEC; otherwise
    positions are.
    """
    if CHANNELS_LAST:  # the compiler sees that rows start at multiples of VEC
        in_channels, channels = in_channels * VEC, channels * VEC
    else:
        positions = positions * VEC
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

    sums = zeros([BP, BC])
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
                x = tl.load(x_start + at, mask=here[:, None] & (k < in_channels)[None, :], other=0.0)
                q = activate(x.to(tl.float32), ACTIVATION)
                if QUANTIZE:
                    q = C * quantize(tl.div_rn(q - offset, A), lo, s) + offset
                q = _through(q, x.dtype, dtype, INTERPRETED)
                at = k[:, None] * channels + c[None, :]
                weight = tl.load(weight_ptr + at, mask=(k < in_channels)[:, None] & real[None, :], other=0.0)
                if INTERPRETED:  # it multiplies bfloat16 as integers
                    old += tl.dot(q, weight.to(tl.float32))
                else:
                    old = tl.dot(q.to(dtype), weight, old, input_precision="ieee")
            old = _rounded(old + bias[None, :], dtype, INTERPRETED)  # rounded as the layer's own output is
            at = step[:, None] * y_position + tl.arange(0, BC)[None, :] * y_channel
            live = here[:, None] & real[None, :]
            new = tl.load(y_start + at, mask=live, other=0.0).to(tl.float32)
            if (n == 0) & (p0 == start):
                K_new, K_old = pivot(new, live), pivot(old, live)
            sums = plus(sums, terms(new, old, K_new, K_old, live))
    write(partial_ptr, c, channels, (end - start) * count, K_old, K_new, columns(sums))
