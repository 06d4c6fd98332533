"""Launchers of the Triton kernels of the convolution, which serve depthwise layers: layouts, tiles, grids and second stages.

Bytes, with X and Y the sizes of input and output: forward reads X and writes Y; input gradient reads X and Y and writes X;
weight gradient reads X and Y. Strips overlap by (k - 1) columns and blocks of rows by (k - 1) rows, which the caches serve.
channels_last: neighbouring lanes hold neighbouring channels. NCHW: neighbouring lanes hold neighbouring strips, so that a
warp covers COLS * 32 neighbouring columns in COLS accesses that share their lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...layer import Convolution, Norm, Quantizer, levels
from ..duq.launch import WARPS, interval_gradients, intervals, on_device, threads, warp_size
from . import kernels, layout

_MAX_ROWS = 16  # rows that one position walks: the k - 1 rows it shares with its neighbour are then an eighth of the work
_WANTED_LANES = 1 << 19  # shorter walks until a launch has this many, to fill the device
_WEIGHT_PROGRAMS = 1024  # of the weight gradient, each of which leaves KH * KW partial sums a channel


@dataclass(frozen=True)
class Tile:
    """The choice, for which a kernel is compiled: [pos, block_c] lanes, `cols` columns each, channels a multiple of `align`."""

    cols: int
    pos: int
    block_c: int
    align: int


def tile(taps: int, channels: int, channels_last: bool, cols: int, warp_size: int, nchw_per_lane: int = 1) -> Tile:
    """The tile for a filter of `taps` weights: the more there are, the fewer channels a lane holds, for lack of registers."""
    lanes = threads(warp_size)
    if not channels_last:
        return Tile(cols, lanes * nchw_per_lane, 1, 1)
    per_lane = 4 if taps <= 9 else 2 if taps <= 25 else 1
    align = next(n for n in (8, 4, 2, 1) if channels % n == 0)
    # The widest block of channels of those that leave fewest lanes idle; 16 halves are one sector of memory.
    block_c = 8 if channels <= 8 else min((64, 32, 16), key=lambda block: (-(-channels // block) * block, -block))
    return Tile(cols, lanes * per_lane // block_c, block_c, align)


def output_cols(taps: int, stride: int) -> int:
    """Output columns of a strip: an input column is quantized (cols * stride + k - stride) / (cols * stride) times."""
    return 4 if stride == 1 else 2 if taps <= 25 else 1


def weight_nchw_per_lane(taps: int, stride: int, warp_size: int) -> int:
    """Positions a lane of the weight gradient holds in NCHW. Of some filters ptxas spills a register with one, AMD with two."""
    return 2 if warp_size == 32 and (stride > 1 or taps > 25) else 1


def input_cols(stride: int) -> int:
    """Input columns of a strip of the input gradient, a multiple of the stride."""
    return 4 if 4 % stride == 0 else stride


def _blocks(length: int, others: int) -> tuple[int, int]:
    """(rows a position walks, blocks of rows) for `length` rows, where everything else makes `others` lanes."""
    rows = min(length, _MAX_ROWS)
    while rows > 4 and others * -(-length // rows) < _WANTED_LANES:
        rows = -(-rows // 2)
    return rows, -(-length // rows)


@dataclass(frozen=True)
class _Problem:
    """What the kernels of one call share: dense operands in one memory format, the geometry, the quantizer of the input."""

    x: Tensor
    channels_last: bool
    out_channels: int
    kernel: tuple[int, int]
    conv: Convolution
    out_size: tuple[int, int]
    q: Quantizer
    intervals: tuple[Tensor | None, Tensor | None]  # A, C

    @classmethod
    def of(cls, x: Tensor, q: Quantizer, weight: Tensor, conv: Convolution) -> _Problem:
        chosen = layout.memory_format(x, weight)
        out_size = conv.output_size("depthwise convolution", x, weight)
        found = (None, None) if q.bits is None else intervals(q.a, q.c)
        dense = x.contiguous(memory_format=chosen)
        return cls(dense, chosen == torch.channels_last, weight.shape[0], tuple(weight.shape[2:]), conv, out_size, q, found)

    @property
    def constants(self) -> dict:
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.conv.stride, self.conv.dilation
        return {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw, "CHANNELS_LAST": self.channels_last,
            "MULTIPLIER": self.out_channels // self.x.shape[1], "QUANTIZE": self.q.bits is not None,
            "ACTIVATION": self.q.activation, "enable_fp_fusion": False,
        }  # fmt: skip

    @property
    def settings(self) -> tuple[float, float, float]:
        """s, lo, offset."""
        s = 1.0 if self.q.bits is None else float(levels(self.q.bits, self.q.signed))
        return s, -1.0 if self.q.signed else 0.0, self.q.offset

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def sizes(self) -> tuple[int, ...]:
        """H, W, OH, OW, top, left."""
        left, _, top, _ = self.conv.pads
        return (*self.x.shape[2:], *self.out_size, top, left)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def tile(self, channels: int, cols: int, nchw_per_lane: int = 1) -> Tile:
        return tile(self.taps, channels, self.channels_last, cols, warp_size(), nchw_per_lane)

    def grid(self, chosen: Tile, channels: int, rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, ...]]:
        """(grid, positions, strips, row blocks and rows) of a walk over rows x columns."""
        n = self.x.shape[0] * (1 if self.channels_last else channels)
        strips = -(-columns // chosen.cols)
        per_pass = n * strips * (channels if self.channels_last else 1)
        walked, blocks = _blocks(rows, per_pass)
        positions = n * strips * blocks
        channel_blocks = -(-channels // chosen.block_c) if self.channels_last else 1
        return (-(-positions // chosen.pos), channel_blocks), (positions, strips, blocks, walked)


def _taps_first(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[kh * kw, C_out] in the dtype of x: neighbouring lanes read neighbouring channels."""
    return weight.to(dtype).reshape(weight.shape[0], -1).t().contiguous()


def _forward(problem: _Problem, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, out = problem.x, problem.out_channels
    y = torch.empty((x.shape[0], out, *problem.out_size), dtype=x.dtype, device=x.device, memory_format=problem.format)
    if y.numel() == 0:
        return y
    chosen = problem.tile(out, output_cols(problem.taps, problem.conv.stride[1]))
    grid, walk = problem.grid(chosen, out, *problem.out_size)
    with on_device(x):
        kernels.depthwise_forward[grid](
            x, _taps_first(weight, x.dtype), bias, *problem.intervals, y,
            *walk, out // chosen.align, *problem.sizes, *problem.settings, problem.conv.pad_value, HAS_BIAS=bias is not None,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **problem.constants,
        )  # fmt: skip
    return y


def _grad_input(problem: _Problem, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gx, the partial sums [2, programs] of dL/dA and dL/dC, or None)."""
    x, channels = problem.x, problem.x.shape[1]
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return gx, None if problem.q.bits is None else torch.zeros(2, 1, device=x.device)
    (sh, sw), (left, _, top, _), (height, width) = problem.conv.stride, problem.conv.pads, x.shape[2:]
    chosen = problem.tile(channels, input_cols(sw))
    # Rows are counted in output rows, each of which finishes sh input rows; the first may begin in the border.
    rows = (top + height - 1) // sh - top // sh + 1
    columns = width + left % sw
    grid, walk = problem.grid(chosen, channels, rows, columns)
    partial = torch.empty(2, *grid, dtype=torch.float32, device=x.device) if problem.q.bits is not None else None
    with on_device(x):
        kernels.depthwise_grad_input[grid](
            grad, x, _taps_first(weight, x.dtype), *problem.intervals, gx, partial,
            *walk, channels // chosen.align, *problem.sizes, *problem.settings,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **problem.constants,
        )  # fmt: skip
    return gx, None if partial is None else partial.view(2, -1)


def _grad_weight(problem: _Problem, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(gw like weight, gbias [C_out]), both in float32 sums carried on in float64."""
    x, out, taps, sw = problem.x, problem.out_channels, problem.taps, problem.conv.stride[1]
    if grad.numel() == 0:
        return torch.zeros_like(weight), torch.zeros(out, dtype=x.dtype, device=x.device)
    chosen = problem.tile(out, output_cols(taps, sw), weight_nchw_per_lane(taps, sw, warp_size()))
    (_, channel_blocks), (positions, strips, blocks, rows) = problem.grid(chosen, out, *problem.out_size)
    if not problem.channels_last:
        positions, channel_blocks = x.shape[0] * strips * blocks, out
    blocks_of_positions = -(-positions // chosen.pos)
    tiles = max(1, blocks_of_positions * channel_blocks // _WEIGHT_PROGRAMS)
    grid = (-(-blocks_of_positions // tiles), channel_blocks)
    partial = torch.empty(grid[0], taps + 1, out, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernels.depthwise_grad_weight[grid](
            grad, x, *problem.intervals, partial,
            positions, strips, blocks, rows, tiles, out // chosen.align, *problem.sizes, *problem.settings,
            problem.conv.pad_value,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **problem.constants,
        )  # fmt: skip
    sums = partial.sum(dim=0, dtype=torch.float64)
    gw = torch.empty_like(weight).copy_(sums[:taps].t().reshape(weight.shape))
    return gw, sums[taps].to(x.dtype)


def conv2d(
    x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution
) -> Tensor:
    """See reference.conv2d; a depthwise layer without a norm."""
    return _forward(_Problem.of(x, q, weight, conv), weight, None if bias is None else bias.to(x.dtype))


def conv2d_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, q: Quantizer, weight: Tensor, bias: Tensor | None, conv: Convolution,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, gamma, beta, a, c, weight, bias; see reference.conv2d_backward. x is quantized anew."""
    problem = _Problem.of(x, q, weight, conv)
    grad = grad.contiguous(memory_format=problem.format)
    gx, sums = _grad_input(problem, grad, weight)
    ga, gc = (None, None) if sums is None else interval_gradients(sums, q.a, q.c)
    if need[1]:
        gw, gb = _grad_weight(problem, grad, weight)
    else:  # whose kernel sums that of the bias along the way
        gw, gb = None, None if bias is None else grad.sum(dim=(0, 2, 3))
    return gx, None, None, ga, gc, gw, None if bias is None else gb.to(bias.dtype)
