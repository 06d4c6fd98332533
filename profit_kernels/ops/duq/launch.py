"""Launchers of the Triton kernels of DuQ: layouts, grids and the second stage of the reductions."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import kernels
from .reference import refuse_nan, steps

WARPS = 4
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


def _intervals(x: Tensor, *raws: Tensor) -> tuple[int, list[Tensor]]:
    """Number of (A, C) pairs, and the softplus of each raw parameter, one value a pair."""
    channels = x.shape[0] if max(raw.numel() for raw in raws) > 1 else 1
    return channels, [F.softplus(raw.float()).expand(channels).contiguous() for raw in raws]


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y like x; see reference.forward."""
    out = torch.empty_like(x)
    n = x.numel()
    if n == 0:
        return out
    channels, (A, C) = _intervals(x, a, c)
    source = channels_outermost(dense(x), channels > 1)
    y = out if out.stride() == source.stride() else torch.empty_like(source)
    block = block_size(warp_size())
    with on_device(x):
        kernels.duq_forward[(triton.cdiv(n, block),)](
            source, A, C, y, n, n // channels, float(steps(bits, signed)), -1.0 if signed else 0.0, offset,
            PER_CHANNEL=channels > 1, ACTIVATION=activation, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return y if y is out else out.copy_(y)


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx like x, ga like a, gc like c); see reference.backward. Deterministic: partial sums in fixed places, then one sum."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, torch.zeros_like(a), torch.zeros_like(c)
    channels, (A, C) = _intervals(x, a, c)
    source = channels_outermost(dense(x), channels > 1)
    g = like(grad, source)
    gx = out if out.stride() == source.stride() else torch.empty_like(source)
    inner = x.numel() // channels
    block = min(block_size(warp_size()), triton.next_power_of_2(inner))  # a depthwise filter has 9 weights a channel
    tiles = min(TILES, triton.next_power_of_2(triton.cdiv(inner, block)))
    blocks = triton.cdiv(inner, block * tiles)
    partial = torch.empty(2, channels, blocks, dtype=torch.float32, device=x.device)
    with on_device(x):
        kernels.duq_backward[(blocks, channels)](
            g, source, A, C, gx, partial, inner, blocks, float(steps(bits, signed)), -1.0 if signed else 0.0, offset,
            ACTIVATION=activation, BLOCK=block, TILES=tiles, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    gA, gC = partial.sum(dim=2, dtype=torch.float64)
    ga, gc = (_raw_gradient(total, raw) for total, raw in ((gA, a), (gC, c)))
    return gx if gx is out else out.copy_(gx), ga, gc


def _raw_gradient(total: Tensor, raw: Tensor) -> Tensor:
    per_value = total if raw.numel() > 1 else total.sum()
    return (per_value.view(raw.shape) * torch.sigmoid(raw.double())).to(raw.dtype)


def codes(x: Tensor, a: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """int8 or uint8, like x; see reference.codes. Waits for the device: whether there was a NaN decides what happens next."""
    out = torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)
    n = x.numel()
    if n == 0:
        return out
    channels, (A,) = _intervals(x, a)
    source = channels_outermost(dense(x), channels > 1)
    y = out if out.stride() == source.stride() else torch.empty_like(source, dtype=out.dtype)
    block = codes_block_size(warp_size())
    nans = torch.empty(triton.cdiv(n, block), dtype=torch.int32, device=x.device)
    with on_device(x):
        kernels.duq_codes[(triton.cdiv(n, block),)](
            source, A, y, nans, n, n // channels, float(steps(bits, signed)), -1.0 if signed else 0.0, offset,
            PER_CHANNEL=channels > 1, ACTIVATION=activation, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    refuse_nan(bool(nans.any()))
    return y if y is out else out.copy_(y)
