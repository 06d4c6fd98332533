"""Triton kernels of AIWQ: moments of new and old outputs in one pass, and the KL from them.

Over the elements of a channel that a program sees, with pivots K_old and K_new near the means:

    o = old - K_old,  n = new - K_new,  d = (new - old) - (K_new - K_old)
    S_d, S_o, S_n = their sums;  S_dd, S_do, S_oo, S_nn = the sums of d * d, d * o, o * o, n * n

A program adds up a few tiles [positions, channels] in float32, at most some tens of terms in a row, then reduces in float64
and writes one row of partial sums; `divergence` adds the rows in float64 and evaluates

    var_new - var_old = Var(d) + 2 Cov(d, old)      exact 0 for identical tensors, and no cancellation for near ones

The pivots are the means of a program's first tile, so a large mean costs no digits. Fixed order, no atomics: the same bits in
every run. The kernels of conv_kernels.py compute `old` themselves and share all of this.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of the partial sums: count, K_old, K_new, S_d, S_o, S_n, S_dd, S_do, S_oo, S_nn.
ROWS = 10


@triton.jit
def zeros(shape: tl.constexpr):
    zero = tl.zeros(shape, dtype=tl.float32)
    return zero, zero, zero, zero, zero, zero, zero


@triton.jit
def pivot(v, live):
    """Mean over the positions of a tile."""
    count = tl.sum(live.to(tl.float32), 0)
    return tl.div_rn(tl.sum(tl.where(live, v, 0.0), 0), tl.maximum(count, 1.0))


@triton.jit
def terms(new, old, K_new, K_old, live):
    """The terms of the seven sums, 0 where not live."""
    d = tl.where(live, (new - old) - (K_new - K_old)[None, :], 0.0)
    o = tl.where(live, old - K_old[None, :], 0.0)
    n = tl.where(live, new - K_new[None, :], 0.0)
    return d, o, n, d * d, d * o, o * o, n * n


@triton.jit
def plus(a, b):
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6]


@triton.jit
def columns(a):
    """Sums over the positions of a tile, in float64."""
    return _column(a[0]), _column(a[1]), _column(a[2]), _column(a[3]), _column(a[4]), _column(a[5]), _column(a[6])


@triton.jit
def _column(v):
    return tl.sum(v.to(tl.float64), 0).to(tl.float32)


@triton.jit
def write(partial_ptr, c, channels, count, K_old, K_new, totals):
    """The ROWS numbers of this program: grid axes 0 and 2 number the programs of one block of channels."""
    program = tl.program_id(0).to(tl.int64) * tl.num_programs(2) + tl.program_id(2)
    plane = tl.num_programs(0).to(tl.int64) * tl.num_programs(2) * channels
    at = partial_ptr + program * channels + c
    real = c < channels
    tl.store(at, tl.zeros_like(K_old) + count.to(tl.float32), mask=real)
    tl.store(at + plane, K_old, mask=real)
    tl.store(at + 2 * plane, K_new, mask=real)
    for i in tl.static_range(7):
        tl.store(at + (3 + i) * plane, totals[i], mask=real)


@triton.jit
def moments(
    new_ptr, old_ptr, partial_ptr, images, slow, fast, tiles_each, images_each,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Memory is [images, slow, fast * VEC]: [1, positions, channels] with CHANNELS_LAST, else [images, channels, positions].

    Program (i, j, k): `tiles_each` tiles of BP positions from the i-th on, BC channels, `images_each` images.
    """
    fast = fast * VEC  # the compiler sees that rows start at multiples of VEC
    positions = slow if CHANNELS_LAST else fast
    channels = fast if CHANNELS_LAST else slow
    block = tl.program_id(1) * BC
    c = block + tl.arange(0, BC)
    real = c < channels
    start = tl.program_id(0).to(tl.int64) * tiles_each * BP
    end = tl.minimum(start + tiles_each * BP, positions)
    first = tl.program_id(2) * images_each
    count = tl.minimum(images_each, images - first)
    step = tl.arange(0, BP)
    # Where a tile starts is a scalar in int64, places inside it are int32.
    if CHANNELS_LAST:
        stride, tile_start = fast, block.to(tl.int64)
        inside = step[:, None] * fast + tl.arange(0, BC)[None, :]
    else:
        stride, tile_start = 1, block.to(tl.int64) * fast
        inside = step[:, None] + tl.arange(0, BC)[None, :] * fast

    sums = zeros([BP, BC])
    K_new = tl.zeros([BC], dtype=tl.float32)
    K_old = tl.zeros([BC], dtype=tl.float32)
    for i in range(count):
        image = (first + i).to(tl.int64) * slow * fast + tile_start
        for p0 in range(start, end, BP):
            live = (p0 + step < positions)[:, None] & real[None, :]
            at = image + p0 * stride
            new = tl.load(new_ptr + at + inside, mask=live, other=0.0).to(tl.float32)
            old = tl.load(old_ptr + at + inside, mask=live, other=0.0).to(tl.float32)
            if (i == 0) & (p0 == start):
                K_new, K_old = pivot(new, live), pivot(old, live)
            sums = plus(sums, terms(new, old, K_new, K_old, live))
    write(partial_ptr, c, channels, (end - start) * count, K_old, K_new, columns(sums))


@triton.jit
def divergence(partial_ptr, kl_ptr, programs, channels, eps, BP: tl.constexpr, BC: tl.constexpr):
    """KL of BC channels from the partial sums of all programs, in float64."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    plane = tl.cast(programs, tl.int64) * channels
    first_old = tl.load(partial_ptr + plane + c, mask=c < channels, other=0.0)
    first_new = tl.load(partial_ptr + 2 * plane + c, mask=c < channels, other=0.0)
    zero = tl.zeros([BP, BC], dtype=tl.float64)
    count, t_d, t_o, t_n, t_dd, t_do, t_oo, t_nn = zero, zero, zero, zero, zero, zero, zero, zero
    for p0 in range(0, programs, BP):
        p = p0 + tl.arange(0, BP)
        live = (p < programs)[:, None] & (c < channels)[None, :]
        at = partial_ptr + p.to(tl.int64)[:, None] * channels + c[None, :]
        n = tl.load(at, mask=live, other=0.0).to(tl.float64)
        # From a program's pivots to those of the first one.
        K_old = tl.load(at + plane, mask=live, other=0.0)
        K_new = tl.load(at + 2 * plane, mask=live, other=0.0)
        o_shift = K_old.to(tl.float64) - first_old.to(tl.float64)[None, :]
        n_shift = K_new.to(tl.float64) - first_new.to(tl.float64)[None, :]
        d_shift = (K_new - K_old).to(tl.float64) - (first_new - first_old).to(tl.float64)[None, :]
        s_d = tl.load(at + 3 * plane, mask=live, other=0.0).to(tl.float64)
        s_o = tl.load(at + 4 * plane, mask=live, other=0.0).to(tl.float64)
        s_n = tl.load(at + 5 * plane, mask=live, other=0.0).to(tl.float64)
        s_dd = tl.load(at + 6 * plane, mask=live, other=0.0).to(tl.float64)
        s_do = tl.load(at + 7 * plane, mask=live, other=0.0).to(tl.float64)
        s_oo = tl.load(at + 8 * plane, mask=live, other=0.0).to(tl.float64)
        s_nn = tl.load(at + 9 * plane, mask=live, other=0.0).to(tl.float64)
        # A row that is not live has n = 0 and sums of 0; a NaN in the first pivots is meant to spread.
        count += n
        t_d += s_d + n * d_shift
        t_o += s_o + n * o_shift
        t_n += s_n + n * n_shift
        t_dd += s_dd + d_shift * (2 * s_d + n * d_shift)
        t_do += s_do + o_shift * s_d + d_shift * (s_o + n * o_shift)
        t_oo += s_oo + o_shift * (2 * s_o + n * o_shift)
        t_nn += s_nn + n_shift * (2 * s_n + n * n_shift)
    N, sum_d, sum_o = tl.sum(count, 0), tl.sum(t_d, 0), tl.sum(t_o, 0)
    var_old = _variance(tl.sum(t_oo, 0), sum_o, N)
    var_new = _variance(tl.sum(t_nn, 0), tl.sum(t_n, 0), N)
    # var_new - var_old
    grown = (tl.sum(t_dd, 0) - sum_d * sum_d / N + 2 * (tl.sum(t_do, 0) - sum_d * sum_o / N)) / (N - 1)
    scale = var_old + eps
    r = (var_new + eps) / scale
    # Far from 1 the two variances themselves have more digits than what was summed of their difference.
    far = (r < 0.5) | (r > 2.0)
    r_minus_1 = tl.where(far, (var_new - var_old) / scale, grown / scale)
    log_r = tl.where(far, tl.log(r), _log1p(r_minus_1))
    mean_change = (first_new - first_old).to(tl.float64) + sum_d / N
    kl = 0.5 * (r_minus_1 - log_r) + 0.5 * mean_change * mean_change / scale
    tl.store(kl_ptr + c, kl.to(tl.float32), mask=c < channels)


@triton.jit
def _variance(squares, total, N):
    m2 = squares - total * total / N
    return tl.where(m2 < 0.0, 0.0, m2) / (N - 1)


@triton.jit
def _log1p(v):
    """ln(1 + v), right also for tiny v: what 1 + v rounds away is divided out again."""
    w = 1.0 + v
    return tl.where(w == 1.0, v, tl.log(w) * (v / tl.where(w == 1.0, 1.0, w - 1.0)))
