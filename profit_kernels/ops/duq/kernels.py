"""Triton kernels of DuQ. Compile with enable_fp_fusion=False: a fused u*s + magic flips codes at the edges.

    u = (act(x) - d) / A          true division (div_rn)
    y = C * (round(clip(u, lo, 1) * s) / s) + d
    gx = g * C/A * act'(x) inside the clip;  gA = sum(-g * C/A * u) inside;  gC = sum(g * q)

Tensors are walked in memory order; `inner` elements in a row share one (A, C) pair, `channels` pairs in all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import activate, activate_grad, clip, quantize


@triton.jit
def duq_forward(
    x_ptr, A_ptr, C_ptr, y_ptr, n, inner, s, lo, offset,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    channel = at // inner if PER_CHANNEL else 0
    A = tl.load(A_ptr + channel, mask=live, other=1.0) if PER_CHANNEL else tl.load(A_ptr)
    C = tl.load(C_ptr + channel, mask=live, other=1.0) if PER_CHANNEL else tl.load(C_ptr)
    h = activate(tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32), ACTIVATION)
    y = C * quantize(tl.div_rn(h - offset, A), lo, s) + offset
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def duq_backward(
    g_ptr, x_ptr, A_ptr, C_ptr, gx_ptr, partial_ptr, inner, blocks, s, lo, offset,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (j, k) takes up to TILES * BLOCK elements of channel k and writes its two sums to partial[:, k, j]."""
    j, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, C = tl.load(A_ptr + k), tl.load(C_ptr + k)
    ratio = tl.div_rn(C, A)
    sum_A = tl.zeros([BLOCK], dtype=tl.float32)
    sum_C = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        row = (j.to(tl.int64) * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        live = row < inner
        at = k * inner + row
        g = tl.load(g_ptr + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
        u = tl.div_rn(activate(x, ACTIVATION) - offset, A)
        inside = (u > lo) & (u < 1.0)
        gh = tl.where(inside, g * ratio, 0.0)
        gx = activate_grad(gh, x, ACTIVATION)
        tl.store(gx_ptr + at, gx.to(gx_ptr.dtype.element_ty), mask=live)
        sum_A -= gh * clip(u, lo, 1.0)  # clipped: 0 * inf outside would be NaN; a NaN stays one
        sum_C += g * quantize(u, lo, s)
    channels = tl.num_programs(1)
    tl.store(partial_ptr + k * blocks + j, tl.sum(sum_A))
    tl.store(partial_ptr + (channels + k) * blocks + j, tl.sum(sum_C))
