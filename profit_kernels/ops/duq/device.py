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
        g = tl.where(x >= 3.0, g, tl.where(x > -3.0, g * (tl.div_rn(x, 3.0) + 0.5), 0.0))  # 0 where x is NaN
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
def reciprocal(A):
    """1 / A as a sum of two float32, for `divide`. Where that overflows (A below 3e-39), NaN follows."""
    high = tl.div_rn(1.0, A)
    return high, tl.fma(-A, high, 1.0) * high


@triton.jit
def divide(v, A, high, low):
    """v / A, correctly rounded, for finite v and a divisor known in advance; div_rn has a branch and three times the work.

    A quotient below 2^-126 may come out as 0 (its remainder underflows): the code of both is 0.

    The first line is within 0.51 ulp (Brisebarre, Muller and Raina, IEEE Transactions on Computers 53(8), 2004). From there the
    exact remainder gives the correctly rounded quotient (Markstein, IBM J. Res. Dev. 34(1), 1990).
    """
    q = tl.fma(v, high, v * low)
    return tl.fma(tl.fma(-A, q, v), high, q)


@triton.jit
def sixth(n):
    """n / 6, correctly rounded (as `divide`; the tests try every mantissa), for finite n."""
    q = n * (1 / 6)
    return tl.fma(tl.fma(-6.0, q, n), 1 / 6, q)


@triton.jit
def activate_bounded(x, ACTIVATION: tl.constexpr):
    """act(x) for a quantizer: h-swish stops at 5e37, above any interval, so that its division by 6 is of finite numbers."""
    if ACTIVATION == "hardswish":
        n = tl.maximum(x, -3.0, propagate_nan=tl.PropagateNan.ALL) * clip(x + 3.0, 0.0, 6.0)
        n = tl.minimum(n, 3.0e38, propagate_nan=tl.PropagateNan.ALL)
        h = sixth(n)
    else:
        h = activate(x, ACTIVATION)
    return h


@triton.jit
def interval_code(v, A, high, low, lo, s):
    """round(clip(v / A, lo, 1) * s), as float32; (high, low) = reciprocal(A).

    Clipping before the division is the same: a rounded division is monotone, and A / A is 1.
    """
    return (divide(clip(v, lo * A, A), A, high, low) * s + _MAGIC) - _MAGIC


@triton.jit
def code_value(code, C, s_high, s_low, offset):
    """C * (code / s) + d with (s_high, s_low) = reciprocal(s); the quotient is exactly rounded for every width (tested)."""
    return C * tl.fma(code, s_high, code * s_low) + offset
