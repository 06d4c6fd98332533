"""Launchers of the Triton kernels of DuQ: layouts, grids and the second stage of the reductions."""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import kernels
from .reference import steps

_BLOCK = 1024
_TILES = 8  # blocks of the backward that one program adds up before it writes its partial sums


def _dense(x: Tensor) -> Tensor:
    """x itself where its memory has no gaps, otherwise a copy: the kernels walk memory, not indices."""
    return x if torch.ops.aten.is_non_overlapping_and_dense(x) else x.contiguous()


def _channels_outermost(x: Tensor, per_channel: bool) -> Tensor:
    """Per channel, dimension 0 must be the slowest in memory, so that each channel is one run."""
    if per_channel and x.stride(0) * x.shape[0] != x.numel():
        return x.contiguous()
    return x


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def _prepare(x: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    per_channel = max(a.numel(), c.numel()) > 1
    x = _channels_outermost(_dense(x), per_channel)
    channels = x.shape[0] if per_channel else 1
    A, C = (F.softplus(raw.float()).expand(channels).contiguous() for raw in (a, c))
    return x, A, C, per_channel


def forward(x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str) -> Tensor:
    """y like x; see reference.forward."""
    out = torch.empty_like(x)
    n = x.numel()
    if n == 0:
        return out
    dense, A, C, per_channel = _prepare(x, a, c)
    y = out if out.stride() == dense.stride() else torch.empty_like(dense)
    with _device(x):
        kernels.duq_forward[(triton.cdiv(n, _BLOCK),)](
            dense, A, C, y, n, n // A.numel(), float(steps(bits, signed)), -1.0 if signed else 0.0, offset,
            PER_CHANNEL=per_channel, ACTIVATION=activation, BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return y if y is out else out.copy_(y)


def backward(
    grad: Tensor, x: Tensor, a: Tensor, c: Tensor, bits: int, signed: bool, offset: float, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(gx like x, ga like a, gc like c); see reference.backward. Deterministic: partial sums in fixed places, then one sum."""
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out, torch.zeros_like(a), torch.zeros_like(c)
    dense, A, C, _ = _prepare(x, a, c)
    g = grad if grad.stride() == dense.stride() else torch.empty_like(dense, dtype=grad.dtype).copy_(grad)
    gx = out if out.stride() == dense.stride() else torch.empty_like(dense)
    channels = A.numel()
    inner = x.numel() // channels
    block = min(_BLOCK, triton.next_power_of_2(inner))  # a depthwise filter has 9 weights a channel
    tiles = min(_TILES, triton.next_power_of_2(triton.cdiv(inner, block)))
    blocks = triton.cdiv(inner, block * tiles)
    partial = torch.empty(2, channels, blocks, dtype=torch.float32, device=x.device)
    with _device(x):
        kernels.duq_backward[(blocks, channels)](
            g, dense, A, C, gx, partial, inner, blocks, float(steps(bits, signed)), -1.0 if signed else 0.0, offset,
            ACTIVATION=activation, BLOCK=block, TILES=tiles, enable_fp_fusion=False,
        )  # fmt: skip
    gA, gC = partial.sum(dim=2, dtype=torch.float64)
    ga, gc = (_raw_gradient(total, raw) for total, raw in ((gA, a), (gC, c)))
    return gx if gx is out else out.copy_(gx), ga, gc


def _raw_gradient(total: Tensor, raw: Tensor) -> Tensor:
    per_value = total if raw.numel() > 1 else total.sum()
    return (per_value.view(raw.shape) * torch.sigmoid(raw.double())).to(raw.dtype)
