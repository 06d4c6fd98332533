"""Launchers of the Triton kernels of the depthwise convolution: layouts, tiles, grids and second stages.

Bytes, with X and Y the sizes of input and output: forward reads X and writes Y; input gradient reads X and Y and writes X;
weight gradient reads X and Y. Strips overlap by (k - 1) columns and blocks of rows by (k - 1) rows, which the caches serve.
channels_last: neighbouring lanes hold neighbouring channels. NCHW: neighbouring lanes hold neighbouring strips, so that a
warp covers COLS * 32 neighbouring columns in COLS accesses that share their lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..duq import launch as duq
from ..duq.launch import WARPS, interval_gradients, intervals, on_device, threads, warp_size
from ..duq.reference import steps
from . import kernels, layout

_MAX_ROWS = 16  # rows that one position walks: the k - 1 rows it shares with its neighbour are then an eighth of the work
_WANTED_LANES = 1 << 19  # shorter walks until a launch has this many, to fill the device
_WEIGHT_PROGRAMS = 1024  # of the weight gradient, each of which leaves KH * KW partial sums a channel


@dataclass(frozen=True)
class Tile:
    """What a kernel is compiled for: [pos, block_c] lanes, `cols` columns a lane, channels a multiple of `align`."""

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
class _Call:
    """What the kernels of one call share: dense operands in one memory format, the geometry, the quantizer of the input."""

    x: Tensor
    channels_last: bool
    out_channels: int
    kernel: tuple[int, int]
    stride: list[int]
    dilation: list[int]
    top: int
    left: int
    out_size: tuple[int, int]
    interval: Tensor | None
    scale: Tensor | None
    settings: tuple[float, float, float]  # s, lo, offset
    activation: str

    @property
    def constants(self) -> dict:
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        return {
            "KH": kh, "KW": kw, "SH": sh, "SW": sw, "DH": dh, "DW": dw, "CHANNELS_LAST": self.channels_last,
            "MULTIPLIER": self.out_channels // self.x.shape[1], "QUANTIZE": self.interval is not None,
            "ACTIVATION": self.activation, "enable_fp_fusion": False,
        }  # fmt: skip

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def sizes(self) -> tuple[int, ...]:
        """H, W, OH, OW, top, left."""
        return (*self.x.shape[2:], *self.out_size, self.top, self.left)

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


def _call(
    x: Tensor, weight: Tensor, geometry: tuple[list[int], list[int], list[int]],
    a: Tensor | None = None, c: Tensor | None = None,
    bits: int | None = None, signed: bool = False, offset: float = 0.0, activation: str = "none",
) -> _Call:  # fmt: skip
    stride, pads, dilation = geometry
    chosen = layout.memory_format(x, weight)
    out_size = layout.output_size(x, weight, stride, pads, dilation)
    quantize = bits is not None
    return _Call(
        x.contiguous(memory_format=chosen), chosen == torch.channels_last, weight.shape[0], tuple(weight.shape[2:]), stride,
        dilation, pads[2], pads[0], out_size,
        *(intervals(a, c) if quantize else (None, None)),
        (float(steps(bits, signed)) if quantize else 1.0, -1.0 if signed else 0.0, offset), activation,
    )  # fmt: skip


def _taps_first(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[kh * kw, C_out] in the dtype of x: neighbouring lanes read neighbouring channels."""
    return weight.to(dtype).reshape(weight.shape[0], -1).t().contiguous()


def _forward(call: _Call, weight: Tensor, bias: Tensor | None, pad_value: float) -> Tensor:
    x, out = call.x, call.out_channels
    y = torch.empty((x.shape[0], out, *call.out_size), dtype=x.dtype, device=x.device, memory_format=call.format)
    if y.numel() == 0:
        return y
    chosen = call.tile(out, output_cols(call.taps, call.stride[1]))
    grid, walk = call.grid(chosen, out, *call.out_size)
    with on_device(x):
        kernels.depthwise_forward[grid](
            x, _taps_first(weight, x.dtype), bias, call.interval, call.scale, y,
            *walk, out // chosen.align, *call.sizes, *call.settings, pad_value, HAS_BIAS=bias is not None,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **call.constants,
        )  # fmt: skip
    return y


def _grad_input(call: _Call, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """(gx, the partial sums [2, programs] of dL/dA and dL/dC, or None)."""
    x, channels = call.x, call.x.shape[1]
    gx = torch.empty_like(x)
    if x.numel() == 0:
        return gx, None if call.interval is None else torch.zeros(2, 1, device=x.device)
    (sh, sw), (height, width) = call.stride, x.shape[2:]
    chosen = call.tile(channels, input_cols(sw))
    # Rows are counted in output rows, each of which finishes sh input rows; the first may begin in the border.
    rows = (call.top + height - 1) // sh - call.top // sh + 1
    columns = width + call.left % sw
    grid, walk = call.grid(chosen, channels, rows, columns)
    partial = torch.empty(2, *grid, dtype=torch.float32, device=x.device) if call.interval is not None else None
    with on_device(x):
        kernels.depthwise_grad_input[grid](
            grad, x, _taps_first(weight, x.dtype), call.interval, call.scale, gx, partial,
            *walk, channels // chosen.align, *call.sizes, *call.settings,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **call.constants,
        )  # fmt: skip
    return gx, None if partial is None else partial.view(2, -1)


def _grad_weight(call: _Call, grad: Tensor, weight: Tensor, pad_value: float) -> tuple[Tensor, Tensor]:
    """(gw like weight, gbias [C_out]), both in float32 sums carried on in float64."""
    x, out, taps, sw = call.x, call.out_channels, call.taps, call.stride[1]
    if grad.numel() == 0:
        return torch.zeros_like(weight), torch.zeros(out, dtype=x.dtype, device=x.device)
    chosen = call.tile(out, output_cols(taps, sw), weight_nchw_per_lane(taps, sw, warp_size()))
    (_, channel_blocks), (positions, strips, blocks, rows) = call.grid(chosen, out, *call.out_size)
    if not call.channels_last:
        positions, channel_blocks = x.shape[0] * strips * blocks, out
    blocks_of_positions = -(-positions // chosen.pos)
    tiles = max(1, blocks_of_positions * channel_blocks // _WEIGHT_PROGRAMS)
    grid = (-(-blocks_of_positions // tiles), channel_blocks)
    partial = torch.empty(grid[0], taps + 1, out, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernels.depthwise_grad_weight[grid](
            grad, x, call.interval, call.scale, partial,
            positions, strips, blocks, rows, tiles, out // chosen.align, *call.sizes, *call.settings, pad_value,
            COLS=chosen.cols, POS=chosen.pos, BLOCK_C=chosen.block_c, ALIGN=chosen.align, num_warps=WARPS,
            **call.constants,
        )  # fmt: skip
    sums = partial.sum(dim=0, dtype=torch.float64)
    gw = torch.empty_like(weight).copy_(sums[:taps].t().reshape(weight.shape))
    return gw, sums[taps].to(x.dtype)


def _like_output(call: _Call, grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=call.format)


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int], pad_value: float
) -> Tensor:  # fmt: skip
    """See reference.depthwise."""
    return _forward(_call(x, weight, (stride, pads, dilation)), weight, bias, pad_value)


def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, has_bias: bool, stride: list[int], pads: list[int], dilation: list[int],
    pad_value: float, need_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(dL/dx, dL/dw, dL/dbias); see reference.depthwise_backward."""
    call = _call(x, weight, (stride, pads, dilation))
    grad = _like_output(call, grad)
    gx, _ = _grad_input(call, grad, weight)
    gw, gb = _grad_weight(call, grad, weight, pad_value) if need_weight else (None, _grad_bias(grad, has_bias))
    return gx, gw, gb if has_bias else None


def _grad_bias(grad: Tensor, has_bias: bool) -> Tensor | None:
    """Where the weight needs no gradient, whose kernel sums this one along the way."""
    return grad.sum(dim=(0, 2, 3)) if has_bias else None


def _quantized_weight(weight: Tensor, a: Tensor | None, c: Tensor | None, bits: int | None) -> Tensor:
    return weight if bits is None else duq.forward(weight, a, c, bits, True, 0.0, "none")


def duq_depthwise(
    x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
) -> Tensor:  # fmt: skip
    """See reference.duq_depthwise. The tiny weight is quantized first, once, not by every program."""
    call = _call(x, weight, (stride, pads, dilation), a_x, c_x, act_bits, signed, offset, activation)
    bias = None if bias is None else bias.to(x.dtype)
    return _forward(call, _quantized_weight(weight, a_w, c_w, weight_bits), bias, pad_value)


def duq_depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, a_x: Tensor | None, c_x: Tensor | None, a_w: Tensor | None, c_w: Tensor | None,
    bias: Tensor | None, stride: list[int], pads: list[int], dilation: list[int],
    act_bits: int | None, weight_bits: int | None, signed: bool, offset: float, activation: str, pad_value: float,
    need_weight: bool = True,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, weight, a_x, c_x, a_w, c_w, bias; see reference.duq_depthwise_backward. x is quantized anew."""
    call = _call(x, weight, (stride, pads, dilation), a_x, c_x, act_bits, signed, offset, activation)
    grad = _like_output(call, grad)
    gx, sums = _grad_input(call, grad, _quantized_weight(weight, a_w, c_w, weight_bits))
    ga_x = gc_x = ga_w = gc_w = None
    if sums is not None:
        ga_x, gc_x = interval_gradients(sums, a_x, c_x)
    gw, gb = _grad_weight(call, grad, weight, pad_value) if need_weight else (None, _grad_bias(grad, bias is not None))
    if need_weight and weight_bits is not None:
        gw, ga_w, gc_w = duq.backward(gw, weight, a_w, c_w, weight_bits, True, 0.0, "none")
    return gx, gw, ga_x, gc_x, ga_w, gc_w, None if bias is None else gb.to(bias.dtype)
