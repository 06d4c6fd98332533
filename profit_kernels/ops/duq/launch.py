"""Launchers of the Triton kernels of DuQ: layouts, grids and the second stage of the reductions."""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from ...layer import levels
from . import kernels
from .reference import refuse_nan

WARPS = 4
FINISH_BLOCK = 256
INTERVALS_BLOCK = 256
TILES = 8  # blocks of the backward that one program adds up before it writes its partial sums


def threads(warp_size: int) -> int:
    """Threads of one program."""
    return WARPS * warp_size


def block_size(warp_size: int) -> int:
    """Elements of one block: 8 a thread, which is one 128-bit access of a half or two of a float32."""
    return 8 * threads(warp_size)


def codes_block_size(warp_size: int) -> int:
    """Elements of one block of codes: 16 a thread, whose 8-bit codes are one 128-bit access."""
    return 16 * threads(warp_size)


def warp_size() -> int:
    """Of the GPUs this torch is built for (64 is right for AMD's data-centre GPUs; elsewhere it costs speed only)."""
    return 64 if torch.version.hip else 32


def dense(x: Tensor) -> Tensor:
    """x itself where its memory has no gaps, otherwise a copy: the kernels walk memory, not indices."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def channels_outermost(x: Tensor, per_channel: bool) -> Tensor:
    """Per channel, dimension 0 must be the slowest in memory, so that each channel is one run."""
    if per_channel and x.stride(0) * x.shape[0] != x.numel():
        return x.contiguous()
    return x


def like(x: Tensor, layout: Tensor) -> Tensor:
    """x, copied where needed so that its elements lie in memory as those of `layout` (dense) do."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout, dtype=x.dtype).copy_(x)


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """The device guard around a launch."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def intervals(a: Tensor, c: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """(A, C), float32 [count] each, from raw a and c of one value or `count`. One launch."""
    raws = [raw.float().expand(count).contiguous() for raw in (a, c)]
    A, C = (torch.empty_like(raw) for raw in raws)
    with on_device(A):
        kernels.duq_intervals[(triton.cdiv(count, INTERVALS_BLOCK),)](
            *raws, A, C, count, BLOCK=INTERVALS_BLOCK, num_warps=1, enable_fp_fusion=False
        )
    return A, C


class _Call:
    """What the three launches of DuQ have in common: the tensor as the kernels can walk it, and their numbers."""

    def __init__(
        self, x: Tensor, raws: tuple[Tensor, ...], block: int, tiles: int, bits: int, signed: bool, offset: float
    ) -> None:
        self.channels = x.shape[0] if max(raw.numel() for raw in raws) > 1 else 1
        self.source = channels_outermost(dense(x), self.channels > 1)
        self.intervals = intervals(raws[0], raws[-1], self.channels)
        inner = x.numel() // self.channels
        self.block = min(block, triton.next_power_of_2(inner))  # a depthwise filter has 9 weights a channel
        self.tiles = min(tiles, triton.next_power_of_2(triton.cdiv(inner, self.block)))
        blocks = triton.cdiv(inner, self.block * self.tiles)
        self.programs = self.channels * blocks
        self.numbers = (inner, blocks, float(levels(bits, signed)), -1.0 if signed else 0.0, offset)

    def result(self, out: Tensor) -> Tensor:
        """`out` itself if the kernel can write to it in the order in which it walks, else a tensor to copy from."""
        return out if out.stride() == self.source.stride() else torch.empty_like(self.source, dtype=out.dtype)


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y like x; see reference.forward."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    call = _Call(x, (a, c), block_size(warp_size()), 1, bits, signed, offset)
    y = call.result(out)
    with on_device(x):
        kernels.duq_forward[(call.programs,)](
            call.source, *call.intervals, y, *call.numbers,
            ACTIVATION=activation, BLOCK=call.block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return y if y is out else out.copy_(y)


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx like x, ga like a, gc like c); see reference.backward. Deterministic: partial sums in fixed places, then one sum."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, torch.zeros_like(a), torch.zeros_like(c)
    call = _Call(x, (a, c), block_size(warp_size()), TILES, bits, signed, offset)
    gx = call.result(out)
    partial = torch.empty(2, call.programs, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernels.duq_backward[(call.programs,)](
            like(grad, call.source), call.source, *call.intervals, gx, partial, *call.numbers,
            ACTIVATION=activation, BLOCK=call.block, TILES=call.tiles, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return gx if gx is out else out.copy_(gx), *interval_gradients(partial, a, c)


def interval_gradients(partial: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """(dL/da, dL/dc) from the partial sums of dL/dA and dL/dC, [2, channels * blocks]: one channel, or one per value of a, c.

    One launch where both raw parameters have a value per channel, as activations always do; a few where one is shared.
    """
    channels = max(a.numel(), c.numel())
    if a.numel() == c.numel():
        raws = [raw.float().contiguous() for raw in (a, c)]
        ga, gc = (torch.empty_like(raw) for raw in raws)
        with on_device(partial):
            kernels.duq_finish[(channels,)](
                partial, *raws, ga, gc, partial.numel() // (2 * channels),
                BLOCK=FINISH_BLOCK, num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
        return ga.to(a.dtype), gc.to(c.dtype)
    gA, gC = partial.view(2, channels, -1).sum(dim=2, dtype=torch.float64)
    return _raw_gradient(gA, a), _raw_gradient(gC, c)


def _raw_gradient(total: Tensor, raw: Tensor) -> Tensor:
    per_value = total if raw.numel() > 1 else total.sum()
    return (per_value.view(raw.shape) * torch.sigmoid(raw.double())).to(raw.dtype)


def codes(x: Tensor, a: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """int8 or uint8, like x; see reference.codes. Waits for the device: whether there was a NaN decides what happens next."""
    out = torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)
    if x.numel() == 0:
        return out
    call = _Call(x, (a,), codes_block_size(warp_size()), 1, bits, signed, offset)
    y = call.result(out)
    nans = torch.empty(call.programs, dtype=torch.int32, device=x.device)
    with on_device(x):
        kernels.duq_codes[(call.programs,)](
            call.source, call.intervals[0], y, nans, *call.numbers,
            ACTIVATION=activation, BLOCK=call.block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    refuse_nan(bool(nans.any()))
    return y if y is out else out.copy_(y)
