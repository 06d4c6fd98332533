"""Triton kernels of the depthwise convolution with activation and DuQ in front. Compile with enable_fp_fusion=False.

    y[o, p] = bias + sum over taps (i, j) of w[i, j] * v[o * SH + i * DH - top, p * SW + j * DW - left]
    v = C * code(act(x)) / s + d inside the image, pad_value outside        (QUANTIZE; act(x) otherwise)

A tile is [POS, BLOCK_C] lanes. One position is a strip of COLS neighbouring columns by `rows` rows of one image; in NCHW
BLOCK_C is 1 and the positions run over the planes too. A lane walks down its rows with the unfinished sums of the strip in
registers, so that it reads and quantizes each input row of the strip once: the division costs more than the taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..duq.device import activate, activate_bounded, activate_grad, clip, code_value, interval_code, reciprocal

# Not specialized for the values 1 and multiples of 16: one compilation serves every image size and batch.
_RUN_TIME = (
    "positions", "strips", "row_blocks", "rows", "tiles", "groups", "H", "W", "OH", "OW", "top", "left",
    "s", "lo", "offset", "pad_value",
)  # fmt: skip


@triton.jit
def _within(i, n):
    """0 <= i < n in one comparison."""
    return i.to(tl.uint32, bitcast=True) < n.to(tl.uint32, bitcast=True)


@triton.jit
def _columns(row, rows, wanted, columns):
    """How many columns to touch in `row` of an image: all or none. To compare with it, not with two masks, saves registers."""
    return tl.where(wanted & _within(row, rows), columns, 0)


@triton.jit
def _place(at, strips, row_blocks):
    """(plane, block of rows, strip) of position `at`, the strip fastest."""
    rest = at // strips
    return (rest // row_blocks).to(tl.int64), (rest % row_blocks).to(tl.int32), (at % strips).to(tl.int32)


@triton.jit
def _tile(positions, strips, row_blocks, channels, CHANNELS_LAST: tl.constexpr, POS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(image, channel, block of rows, strip, position exists) of this program's lanes."""
    at = tl.program_id(0).to(positions.dtype) * POS + tl.arange(0, POS)[:, None]
    plane, block, strip = _place(at, strips, row_blocks)
    live = at < positions
    if CHANNELS_LAST:
        image = plane
        channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    else:
        image = plane // channels
        channel = (plane % channels).to(tl.int32)
    return image, channel, block, strip, live


@triton.jit
def _corner(image, channel, channels, H, W, CHANNELS_LAST: tl.constexpr):
    """Where pixel (0, 0) of (image, channel) lies in a dense tensor."""
    if CHANNELS_LAST:
        at = image * H * W * channels + channel
    else:
        at = (image * channels + channel) * H * W
    return at


@triton.jit
def _quantizer(A_ptr, C_ptr, lo, s, offset):
    """What `_seen` needs to know of it, worked out once."""
    A = tl.load(A_ptr)
    A_high, A_low = reciprocal(A)
    s_high, s_low = reciprocal(s)
    return A, A_high, A_low, tl.load(C_ptr), s_high, s_low, lo, s, offset


@triton.jit
def _seen(
    x_ptr, at, inside, live, duq, pad_value, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr
):
    """v at one tap, rounded to the dtype of x as the unfused operators round it."""
    x = tl.load(x_ptr + at, mask=inside & live, other=0.0)
    if QUANTIZE:
        A, A_high, A_low, C, s_high, s_low, lo, s, offset = duq
        v = activate_bounded(x.to(tl.float32), ACTIVATION) - offset
        v = code_value(interval_code(v, A, A_high, A_low, lo, s), C, s_high, s_low, offset)
    else:
        v = activate(x.to(tl.float32), ACTIVATION)
    return tl.where(inside, v, pad_value).to(x.dtype).to(tl.float32)


@triton.jit
def _seen_row(
    x_ptr, at, column, limit, pixel, live, duq, pad_value,
    KW: tl.constexpr, SW: tl.constexpr, DW: tl.constexpr, COLS: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """v at the columns that a strip of COLS outputs reads in one row, as a tuple; columns from `limit` on are outside."""
    row = ()
    for j in tl.static_range((COLS - 1) * SW + (KW - 1) * DW + 1):
        inside = _within(column + j, limit)
        v = _seen(x_ptr, at, inside, live, duq, pad_value, QUANTIZE, ACTIVATION)
        row = row + (v,)
        at = at + pixel  # not at + j * pixel: on AMD a register for every j, in a scarce kind
    return row


@triton.jit(do_not_specialize=_RUN_TIME)
def depthwise_forward(
    x_ptr, w_ptr, bias_ptr, A_ptr, C_ptr, y_ptr,
    positions, strips, row_blocks, rows, groups, H, W, OH, OW, top, left, s, lo, offset, pad_value,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, QUANTIZE: tl.constexpr,
    ACTIVATION: tl.constexpr, COLS: tl.constexpr, POS: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Iteration i reads SH input rows and finishes output row first + i - (PENDING - 1); the first PENDING - 1 fill up."""
    SPAN: tl.constexpr = (KH - 1) * DH + 1
    PENDING: tl.constexpr = (SPAN + SH - 1) // SH  # output rows that one input row may belong to
    channels = groups * ALIGN  # written so that the compiler sees the alignment
    image, channel, block, strip, live = _tile(positions, strips, row_blocks, channels, CHANNELS_LAST, POS, BLOCK_C)
    in_channels = channels if MULTIPLIER == 1 else channels // MULTIPLIER
    x_pixel = in_channels if CHANNELS_LAST else 1
    y_pixel = channels if CHANNELS_LAST else 1
    column = strip * (COLS * SW) - left
    x_at = _corner(image, channel // MULTIPLIER, in_channels, H, W, CHANNELS_LAST) + column.to(tl.int64) * x_pixel
    y_at = _corner(image, channel, channels, OH, OW, CHANNELS_LAST) + (strip * COLS).to(tl.int64) * y_pixel
    duq = _quantizer(A_ptr, C_ptr, lo, s, offset) if QUANTIZE else ()
    w = ()
    for tap in tl.static_range(KH * KW):
        w = w + (tl.load(w_ptr + tap * channels + channel, mask=channel < channels, other=0.0).to(tl.float32),)
    acc = ()
    for _ in tl.static_range(PENDING * COLS):
        acc = acc + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)

    first = block * rows
    for i in range(rows + PENDING - 1):
        o = first + i - (PENDING - 1)
        for j in tl.static_range(SH):
            if SPAN - SH + j >= 0:
                r = o * SH + (SPAN - SH + j) - top
                row = _seen_row(
                    x_ptr, x_at + r.to(tl.int64) * W * x_pixel, column, _columns(r, H, live & (r >= first * SH - top), W),
                    x_pixel, channel < channels, duq, pad_value, KW, SW, DW, COLS, QUANTIZE, ACTIVATION,
                )  # fmt: skip
                summed = ()
                for e in tl.static_range(PENDING):
                    for p in tl.static_range(COLS):
                        total = acc[e * COLS + p]
                        if SPAN - SH + j - e * SH >= 0 and (SPAN - SH + j - e * SH) % DH == 0:
                            for k in tl.static_range(KW):
                                weight = w[(SPAN - SH + j - e * SH) // DH * KW + k]
                                total = tl.fma(row[p * SW + k * DW], weight, total)
                        summed = summed + (total,)
                acc = summed
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        done = _columns(o, OH, live & (o >= first), OW)
        shifted = ()
        for p in tl.static_range(PENDING * COLS):
            if p < COLS:
                at = y_at + o.to(tl.int64) * OW * y_pixel + p * y_pixel
                y = (acc[p] + bias).to(y_ptr.dtype.element_ty)
                tl.store(y_ptr + at, y, mask=(strip * COLS + p < done) & (channel < channels))
            else:
                shifted = shifted + (acc[p],)
        for _ in tl.static_range(COLS):
            shifted = shifted + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)
        acc = shifted


@triton.jit(do_not_specialize=_RUN_TIME)
def depthwise_grad_input(
    g_ptr, x_ptr, w_ptr, A_ptr, C_ptr, gx_ptr, partial_ptr,
    positions, strips, row_blocks, rows, groups, H, W, OH, OW, top, left, s, lo, offset,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr,
    COLS: tl.constexpr, POS: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """gx of the convolution carried on through DuQ and the activation; each program adds up its share of dL/dA and dL/dC.

    Iteration i reads output row `o` of g and finishes the SH padded input rows o * SH ...; a strip is COLS input columns,
    a multiple of SW. `rows` counts output rows. partial: [2, programs].
    """
    SPAN_H: tl.constexpr = (KH - 1) * DH + 1
    SPAN_W: tl.constexpr = (KW - 1) * DW + 1
    ROWS: tl.constexpr = SPAN_H if SPAN_H > SH else SH  # padded input rows under way
    BEFORE: tl.constexpr = (SPAN_H - 1) // SH  # output rows above `o` that the rows it finishes belong to as well
    LEFT_OF: tl.constexpr = (SPAN_W - 1) // SW
    channels = groups * ALIGN  # written so that the compiler sees the alignment
    image, channel, block, strip, live = _tile(positions, strips, row_blocks, channels, CHANNELS_LAST, POS, BLOCK_C)
    out_channels = channels * MULTIPLIER
    x_pixel = channels if CHANNELS_LAST else 1
    g_pixel = out_channels if CHANNELS_LAST else 1
    g_column = left // SW + strip * (COLS // SW) - LEFT_OF
    column = (left // SW) * SW + strip * COLS - left
    x_at = _corner(image, channel, channels, H, W, CHANNELS_LAST) + column.to(tl.int64) * x_pixel
    g_at = _corner(image, channel * MULTIPLIER, out_channels, OH, OW, CHANNELS_LAST) + g_column.to(tl.int64) * g_pixel
    g_channel = 1 if CHANNELS_LAST else OH.to(tl.int64) * OW  # from one output channel to the next
    A = tl.load(A_ptr) if QUANTIZE else 1.0
    high, low = reciprocal(A)
    ratio = tl.div_rn(tl.load(C_ptr), A) if QUANTIZE else 1.0
    w = ()
    for m in tl.static_range(MULTIPLIER):
        for tap in tl.static_range(KH * KW):
            w_at = tap * out_channels + channel * MULTIPLIER + m
            w = w + (tl.load(w_ptr + w_at, mask=channel < channels, other=0.0).to(tl.float32),)
    acc = ()
    for _ in tl.static_range(ROWS * COLS):
        acc = acc + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)
    sum_A = tl.zeros([POS, BLOCK_C], dtype=tl.float32)
    sum_C = tl.zeros([POS, BLOCK_C], dtype=tl.float32)

    first = top // SH + block * rows
    for i in range(rows + BEFORE):
        o = first + i - BEFORE
        for m in tl.static_range(MULTIPLIER):
            g = ()
            limit = _columns(o, OH, live, OW)
            for q in tl.static_range(LEFT_OF + COLS // SW):
                there = _within(g_column + q, limit) & (channel < channels)
                at = g_at + o.to(tl.int64) * OW * g_pixel + q * g_pixel + m * g_channel
                g = g + (tl.load(g_ptr + at, mask=there, other=0.0).to(tl.float32),)
            summed = ()
            for t in tl.static_range(ROWS):
                for p in tl.static_range(COLS):
                    total = acc[t * COLS + p]
                    if t < SPAN_H and t % DH == 0:
                        for q in tl.static_range(LEFT_OF + COLS // SW):
                            if 0 <= p - (q - LEFT_OF) * SW and p - (q - LEFT_OF) * SW < SPAN_W:
                                if (p - (q - LEFT_OF) * SW) % DW == 0:
                                    weight = w[(m * KH + t // DH) * KW + (p - (q - LEFT_OF) * SW) // DW]
                                    total = tl.fma(g[q], weight, total)
                    summed = summed + (total,)
            acc = summed
        shifted = ()
        for t in tl.static_range(ROWS):
            for p in tl.static_range(COLS):
                if t < SH:
                    r = o * SH + t - top
                    limit = _columns(r, H, live & (o >= first), W)
                    there = _within(column + p, limit) & (channel < channels)
                    at = x_at + r.to(tl.int64) * W * x_pixel + p * x_pixel
                    gv = tl.where(there, acc[t * COLS + p], 0.0)
                    if QUANTIZE or ACTIVATION != "none":
                        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
                        if QUANTIZE:
                            v = activate_bounded(x, ACTIVATION) - offset
                            gh = tl.where((v > lo * A) & (v < A), gv * ratio, 0.0)
                            sum_A += gh * clip(v, lo * A, A)  # clipped: 0 * inf outside would be NaN; a NaN stays one
                            sum_C += gv * interval_code(v, A, high, low, lo, s)
                            gv = gh
                        gv = activate_grad(gv, x, ACTIVATION)
                    tl.store(gx_ptr + at, gv.to(gx_ptr.dtype.element_ty), mask=there)
                else:
                    shifted = shifted + (acc[t * COLS + p],)
        for _ in tl.static_range(SH * COLS):
            shifted = shifted + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)
        acc = shifted
    if QUANTIZE:
        program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        tl.store(partial_ptr + program, tl.div_rn(-tl.sum(sum_A), A))
        tl.store(partial_ptr + programs + program, tl.div_rn(tl.sum(sum_C), s))


@triton.jit(do_not_specialize=_RUN_TIME)
def depthwise_grad_weight(
    g_ptr, x_ptr, A_ptr, C_ptr, partial_ptr,
    positions, strips, row_blocks, rows, tiles, groups, H, W, OH, OW, top, left, s, lo, offset, pad_value,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MULTIPLIER: tl.constexpr, CHANNELS_LAST: tl.constexpr, QUANTIZE: tl.constexpr, ACTIVATION: tl.constexpr,
    COLS: tl.constexpr, POS: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Sums over `tiles` * POS positions for each tap, and of g alone (the bias). partial: [programs, KH * KW + 1, channels].

    The walk of the forward, with the rows of g under way in registers instead of the unfinished sums.
    """
    SPAN: tl.constexpr = (KH - 1) * DH + 1
    PENDING: tl.constexpr = (SPAN + SH - 1) // SH
    channels = groups * ALIGN  # written so that the compiler sees the alignment
    in_channels = channels if MULTIPLIER == 1 else channels // MULTIPLIER
    x_pixel = in_channels if CHANNELS_LAST else 1
    g_pixel = channels if CHANNELS_LAST else 1
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    duq = _quantizer(A_ptr, C_ptr, lo, s, offset) if QUANTIZE else ()
    sums = ()
    for _ in tl.static_range(KH * KW + 1):
        sums = sums + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)

    for tile in range(tiles):
        at = (tl.program_id(0).to(positions.dtype) * tiles + tile) * POS + tl.arange(0, POS)[:, None]
        image, block, strip = _place(at, strips, row_blocks)
        live = at < positions
        column = strip * (COLS * SW) - left
        x_at = _corner(image, channel // MULTIPLIER, in_channels, H, W, CHANNELS_LAST) + column.to(tl.int64) * x_pixel
        g_at = _corner(image, channel, channels, OH, OW, CHANNELS_LAST) + (strip * COLS).to(tl.int64) * g_pixel
        g = ()
        for _ in tl.static_range(PENDING * COLS):
            g = g + (tl.zeros([POS, BLOCK_C], dtype=tl.float32),)
        first = block * rows
        for i in range(rows + PENDING - 1):
            o = first + i - (PENDING - 1)
            newest = o + (PENDING - 1)
            limit = _columns(newest, OH, live & (newest < first + rows), OW)
            window = ()
            total = sums[KH * KW]
            value_at = g_at + newest.to(tl.int64) * OW * g_pixel
            for p in tl.static_range(PENDING * COLS):
                if p < (PENDING - 1) * COLS:
                    window = window + (g[p + COLS],)
                else:
                    q = p - (PENDING - 1) * COLS
                    there = (strip * COLS + q < limit) & (channel < channels)
                    value = tl.load(g_ptr + value_at, mask=there, other=0.0).to(tl.float32)
                    value_at = value_at + g_pixel
                    window = window + (value,)
                    total += value
            g = window
            for j in tl.static_range(SH):
                if SPAN - SH + j >= 0:
                    r = o * SH + (SPAN - SH + j) - top
                    row = _seen_row(
                        x_ptr, x_at + r.to(tl.int64) * W * x_pixel, column,
                        _columns(r, H, live & (r >= first * SH - top), W), x_pixel, channel < channels, duq, pad_value,
                        KW, SW, DW, COLS, QUANTIZE, ACTIVATION,
                    )  # fmt: skip
                    summed = ()
                    for tap in tl.static_range(KH * KW):
                        part = sums[tap]
                        for e in tl.static_range(PENDING):
                            if SPAN - SH + j - e * SH == tap // KW * DH:
                                for p in tl.static_range(COLS):
                                    part = tl.fma(g[e * COLS + p], row[p * SW + tap % KW * DW], part)
                        summed = summed + (part,)
                    sums = summed + (total,)
    here = tl.program_id(0).to(tl.int64) * (KH * KW + 1) * channels
    for tap in tl.static_range(KH * KW + 1):
        value = tl.sum(sums[tap], axis=0)[None, :]
        tl.store(partial_ptr + here + tap * channels + channel, value, mask=channel < channels)
