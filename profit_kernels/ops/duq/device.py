"""Triton device functions of DuQ, shared by every kernel that quantizes: activation, its gradient, clip, rounding.

Compile each kernel that uses them with enable_fp_fusion=False: a fused u*s + magic flips codes at the edges. All of them
propagate NaN, and compute in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, half to even.
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def clip(v, lo, hi):
    v = tl.maximum(v, lo, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, hi, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        x = clip(x, 0.0, 6.0)
    elif ACTIVATION == "hardswish":
        x = tl.div_rn(tl.maximum(x, -3.0, propagate_nan=tl.PropagateNan.ALL) * clip(x + 3.0, 0.0, 6.0), 6.0)
    return x


@triton.jit
def activate_grad(g, x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        g = tl.where(x > 0.0, g, 0.0)
    elif ACTIVATION == "relu6":
        g = tl.where((x > 0.0) & (x < 6.0), g, 0.0)
    elif ACTIVATION == "hardswish":
        g = tl.where(x >= 3.0, g, tl.where(x > -3.0, g * (x * (1 / 3) + 0.5), 0.0))  # 0 where x is NaN
    return g


@triton.jit
def round_code(u, lo, s):
    """The integer code of u, as float32."""
    code = clip(u, lo, 1.0) * s
    return (code + _MAGIC) - _MAGIC


@triton.jit
def quantize(u, lo, s):
    """q of the formulas: the code divided by s."""
    return tl.div_rn(round_code(u, lo, s), s)


@triton.jit
def integer_code(v, A, low, s):
    """round(clip(v / A, lo, 1) * s), as a float, with low = lo * A.

    Clipping before the division is the same: a rounded division is monotone, and A / A is 1.
    """
    return (tl.div_rn(clip(v, low, A), A) * s + _MAGIC) - _MAGIC
