"""Triton kernels of DuQ for all weights of a net in one launch. Compile with enable_fp_fusion=False.

The weights lie anywhere in memory, so a table tells each program where its work is. The formulas are those of kernels.py,
signed and without offset or activation. An *interval* is one (A, C) pair: a whole weight, or one output channel of it.

    piece table, a row a program:      address of its first weight, place in the flat result, length, interval, s
    interval table, a row an interval: first piece, number of pieces
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import quantize
from .kernels import gradient

PIECE_COLUMNS = tl.constexpr(5)
INTERVAL_COLUMNS = tl.constexpr(2)


@triton.jit
def duq_weights_forward(piece_ptr, A_ptr, C_ptr, y_ptr, BLOCK: tl.constexpr):
    row = piece_ptr + tl.program_id(0) * PIECE_COLUMNS
    w_ptr = tl.load(row).to(tl.pointer_type(y_ptr.dtype.element_ty))
    at = tl.arange(0, BLOCK)
    live = at < tl.load(row + 2)
    k, s = tl.load(row + 3), tl.load(row + 4).to(tl.float32)
    A, C = tl.load(A_ptr + k), tl.load(C_ptr + k)
    w = tl.load(w_ptr + at, mask=live, other=0.0).to(tl.float32)
    y = C * quantize(tl.div_rn(w, A), -1.0, s)
    tl.store(y_ptr + tl.load(row + 1) + at, y.to(y_ptr.dtype.element_ty), mask=live)


@triton.jit
def duq_weights_backward(piece_ptr, A_ptr, C_ptr, g_ptr, gw_ptr, partial_ptr, BLOCK: tl.constexpr):
    """Gradients come flat, in the places of the result; partial[:, program] takes what the piece adds to gA and gC."""
    pid = tl.program_id(0)
    row = piece_ptr + pid * PIECE_COLUMNS
    w_ptr = tl.load(row).to(tl.pointer_type(gw_ptr.dtype.element_ty))
    at = tl.arange(0, BLOCK)
    live = at < tl.load(row + 2)
    place = tl.load(row + 1) + at
    k, s = tl.load(row + 3), tl.load(row + 4).to(tl.float32)
    A, C = tl.load(A_ptr + k), tl.load(C_ptr + k)
    g = tl.load(g_ptr + place, mask=live, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + at, mask=live, other=0.0).to(tl.float32)
    gw, term_A, term_C = gradient(g, w, A, tl.div_rn(C, A), s, -1.0, 0.0, "none")
    tl.store(gw_ptr + place, gw.to(gw_ptr.dtype.element_ty), mask=live)
    tl.store(partial_ptr + pid, -tl.sum(term_A))
    tl.store(partial_ptr + tl.num_programs(0) + pid, tl.div_rn(tl.sum(term_C), s))


@triton.jit
def duq_weights_finish(interval_ptr, partial_ptr, raw_ptr, g_ptr, pieces, BLOCK: tl.constexpr):
    """Sums the pieces of one interval in a fixed order, in float64, and multiplies by softplus' = sigmoid.

    raw and g hold all a, then all c.
    """
    k = tl.program_id(0)
    first, count = tl.load(interval_ptr + k * INTERVAL_COLUMNS), tl.load(interval_ptr + k * INTERVAL_COLUMNS + 1)
    for side in tl.static_range(2):
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(partial_ptr + side * pieces + first + at, mask=at < count, other=0.0).to(tl.float64)
        place = side * tl.num_programs(0) + k
        value = tl.sum(total) / (1.0 + tl.exp(-tl.load(raw_ptr + place).to(tl.float64)))
        tl.store(g_ptr + place, value.to(tl.float32))
