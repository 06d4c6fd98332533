"""Triton kernels of DuQ. Compile with enable_fp_fusion=False: a fused u*s + magic flips codes at the edges.

    u = (act(x) - d) / A          true division (div_rn)
    y = code * (C / s) + d        code = round(clip(u, lo, 1) * s)
    gx = g * C/A * act'(x) inside the clip;  gA = sum(-g * C/A * u) inside;  gC = sum(g * code) / s

Tensors are walked in memory order. `inner` elements in a row share one (A, C) pair. The masks are of 32-bit offsets within
the block, so that with a size divisible by 16 the compiler still sees 128-bit accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import activate, activate_grad, clip, round_code


@triton.jit
def duq_forward(
    x_ptr, A_ptr, C_ptr, y_ptr, n, inner, s, lo, offset,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PER_CHANNEL: a depthwise filter has 9 elements, so a block may span many (A, C) pairs."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    live = at < n - start
    if PER_CHANNEL:
        channel = (start + at) // inner
        A, C = tl.load(A_ptr + channel, mask=live, other=1.0), tl.load(C_ptr + channel, mask=live, other=1.0)
    else:
        A, C = tl.load(A_ptr), tl.load(C_ptr)
    x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
    u = tl.div_rn(activate(x, ACTIVATION) - offset, A)
    y = round_code(u, lo, s) * tl.div_rn(C, s) + offset
    tl.store(y_ptr + start + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def gradient(g, x, A, ratio, s, lo, offset, ACTIVATION: tl.constexpr):
    """gx, and what each element adds to -dL/dA and to s * dL/dC. ratio is C / A."""
    u = tl.div_rn(activate(x, ACTIVATION) - offset, A)
    gh = tl.where((u > lo) & (u < 1.0), g * ratio, 0.0)
    # Clipped: 0 * inf outside would be NaN. A NaN stays one.
    return activate_grad(gh, x, ACTIVATION), gh * clip(u, lo, 1.0), g * round_code(u, lo, s)


@triton.jit
def duq_backward(
    g_ptr, x_ptr, A_ptr, C_ptr, gx_ptr, partial_ptr, inner, blocks, s, lo, offset,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program (j, k) takes up to TILES * BLOCK elements of channel k and writes its two sums to partial[:, k, j]."""
    j, k = tl.program_id(0), tl.program_id(1).to(tl.int64)
    A, C = tl.load(A_ptr + k), tl.load(C_ptr + k)
    ratio = tl.div_rn(C, A)
    start = j.to(tl.int64) * (TILES * BLOCK)
    left = inner - start
    start += k * inner
    sum_A = tl.zeros([BLOCK], dtype=tl.float32)
    sum_C = tl.zeros([BLOCK], dtype=tl.float32)
    for tile in range(TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        live = at < left
        g = tl.load(g_ptr + start + at, mask=live, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
        gx, term_A, term_C = gradient(g, x, A, ratio, s, lo, offset, ACTIVATION)
        tl.store(gx_ptr + start + at, gx.to(gx_ptr.dtype.element_ty), mask=live)
        sum_A += term_A
        sum_C += term_C
    channels = tl.num_programs(1)
    tl.store(partial_ptr + k * blocks + j, -tl.sum(sum_A))
    tl.store(partial_ptr + (channels + k) * blocks + j, tl.div_rn(tl.sum(sum_C), s))


@triton.jit
def duq_codes(
    x_ptr, A_ptr, code_ptr, nan_ptr, n, inner, s, lo, offset,
    PER_CHANNEL: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A NaN has no code: 0 is written, and nan[program] counts how many there were."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    live = at < n - start
    A = tl.load(A_ptr + (start + at) // inner, mask=live, other=1.0) if PER_CHANNEL else tl.load(A_ptr)
    x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
    code = round_code(tl.div_rn(activate(x, ACTIVATION) - offset, A), lo, s)
    nan = live & (code != code)
    code = tl.where(nan, 0.0, code)
    tl.store(code_ptr + start + at, code.to(code_ptr.dtype.element_ty), mask=live)
    tl.store(nan_ptr + tl.program_id(0), tl.sum(nan.to(tl.int32)))
