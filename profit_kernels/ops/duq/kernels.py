"""Triton kernels of DuQ. Compile with enable_fp_fusion=False: a fused u*s + magic flips codes at the edges.

    u = (act(x) - d) / A          true division (div_rn)
    y = code * (C / s) + d        code = round(clip(u, lo, 1) * s)
    gx = g * C/A * act'(x) inside the clip;  gA = sum(-g * C/A * u) inside;  gC = sum(g * code) / s

Tensors are walked in memory order, as channels (one where there is one (A, C) pair) of `inner` elements. Each channel is
cut into `blocks`, one a program. The masks are of 32-bit offsets within the block, so that with a size divisible by 16
the compiler still sees 128-bit accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import activate, activate_grad, clip, round_code
from .reference import SMALLEST

_SMALLEST = tl.constexpr(SMALLEST)


@triton.jit
def _work(inner, blocks, SIZE: tl.constexpr):
    """Channel of this program, where its elements start in the tensor, and how many are left of the channel there."""
    k = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * SIZE
    return k, k * inner + start, inner - start


@triton.jit
def _softplus(raw):
    """Through float64, which has no log1p here: exact to float32 all the same. The identity above 20; a NaN stays."""
    e = tl.exp(tl.minimum(raw, 20.0).to(tl.float64))
    value = tl.where(raw < -16.0, e - 0.5 * e * e, tl.log(1.0 + e)).to(tl.float32)
    value = tl.where(value < _SMALLEST, _SMALLEST, value)
    return tl.where(raw <= 20.0, value, raw)


@triton.jit
def duq_intervals(a_ptr, c_ptr, A_ptr, C_ptr, n, BLOCK: tl.constexpr):
    """A and C from raw a and c, n each."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < n
    tl.store(A_ptr + at, _softplus(tl.load(a_ptr + at, mask=live, other=0.0)), mask=live)
    tl.store(C_ptr + at, _softplus(tl.load(c_ptr + at, mask=live, other=0.0)), mask=live)


@triton.jit
def duq_forward(
    x_ptr, A_ptr, C_ptr, y_ptr, inner, blocks, s, lo, offset, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k, start, left = _work(inner, blocks, BLOCK)
    at = tl.arange(0, BLOCK)
    live = at < left
    x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
    u = tl.div_rn(activate(x, ACTIVATION) - offset, tl.load(A_ptr + k))
    y = round_code(u, lo, s) * tl.div_rn(tl.load(C_ptr + k), s) + offset
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
    """A program takes up to TILES blocks and writes its two sums to partial[:, program]."""
    k, start, left = _work(inner, blocks, BLOCK * TILES)
    A, C = tl.load(A_ptr + k), tl.load(C_ptr + k)
    ratio = tl.div_rn(C, A)
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
    tl.store(partial_ptr + tl.program_id(0), -tl.sum(sum_A))
    tl.store(partial_ptr + tl.num_programs(0) + tl.program_id(0), tl.div_rn(tl.sum(sum_C), s))


@triton.jit
def duq_finish(partial_ptr, a_ptr, c_ptr, ga_ptr, gc_ptr, blocks, BLOCK: tl.constexpr):
    """Sums the `blocks` partial sums of channel k in a fixed order, in float64, and multiplies by softplus' = sigmoid."""
    k = tl.program_id(0)
    sums = partial_ptr + k * blocks
    sum_A = tl.zeros([BLOCK], dtype=tl.float64)
    sum_C = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(0, blocks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sum_A += tl.load(sums + at, mask=at < blocks, other=0.0).to(tl.float64)
        sum_C += tl.load(sums + tl.num_programs(0) * blocks + at, mask=at < blocks, other=0.0).to(tl.float64)
    a, c = tl.load(a_ptr + k).to(tl.float64), tl.load(c_ptr + k).to(tl.float64)
    tl.store(ga_ptr + k, (tl.sum(sum_A) / (1.0 + tl.exp(-a))).to(tl.float32))
    tl.store(gc_ptr + k, (tl.sum(sum_C) / (1.0 + tl.exp(-c))).to(tl.float32))


@triton.jit
def duq_codes(
    x_ptr, A_ptr, code_ptr, nan_ptr, inner, blocks, s, lo, offset, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A NaN has no code: 0 is written, and nan[program] counts how many there were."""
    k, start, left = _work(inner, blocks, BLOCK)
    at = tl.arange(0, BLOCK)
    live = at < left
    x = tl.load(x_ptr + start + at, mask=live, other=0.0).to(tl.float32)
    code = round_code(tl.div_rn(activate(x, ACTIVATION) - offset, tl.load(A_ptr + k)), lo, s)
    nan = live & (code != code)
    tl.store(code_ptr + start + at, tl.where(nan, 0.0, code).to(code_ptr.dtype.element_ty), mask=live)
    tl.store(nan_ptr + tl.program_id(0), tl.sum(nan.to(tl.int32)))
