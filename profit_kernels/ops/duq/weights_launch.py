"""Launchers of the Triton kernels that quantize all weights of a net.

Forward and backward each quantize all of them in one launch. Beside it stand those that are few whatever the number of
weights: two for the intervals and, in the backward, one that gathers the upstream gradients and one that sums
the pieces of each interval. The tables that tell where the weights lie are made once, since parameters stay where they are;
under CUDA graph capture they must exist already, which the usual warm-up sees to.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ...layer import levels
from . import weights_kernels as kernels
from .launch import FINISH_BLOCK, WARPS, channels_outermost, dense, intervals, like, on_device

BLOCK = 1024


@functools.lru_cache(maxsize=16)
def _tables(rows: tuple[tuple[int, ...], ...], itemsize: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The piece table and the interval table of weights_kernels.py.

    rows: of each weight its address, number of elements, number of intervals, and s.
    """
    pieces, intervals, place = [], [], 0
    for address, numel, count, s in rows:
        inner = numel // count
        starts = np.arange(0, inner, BLOCK)
        channel = np.arange(count)
        at = (channel[:, None] * inner + starts).ravel()
        length = np.tile(np.minimum(BLOCK, inner - starts), count)
        index = sum(map(len, intervals)) + np.repeat(channel, len(starts))
        first = sum(map(len, pieces)) + channel * len(starts)
        pieces.append(np.stack([address + itemsize * at, place + at, length, index, np.full_like(at, s)], 1))
        intervals.append(np.stack([first, np.full_like(channel, len(starts))], 1))
        place += numel
    return tuple(torch.from_numpy(np.concatenate(t).astype(np.int64)).to(device) for t in (pieces, intervals))


class _Layout:
    """The weights as the kernels can walk them (copies live as long as this object), their tables and intervals.

    raw: [2, intervals], all a and all c. A, C: their softplus.
    """

    def __init__(self, weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> None:
        self.counts = [max(p.numel(), q.numel()) for p, q in zip(a, c, strict=True)]
        self.sources = [channels_outermost(dense(w), k > 1) for w, k in zip(weights, self.counts, strict=True)]
        values = [raw.float().expand(k) for raws in (a, c) for raw, k in zip(raws, self.counts, strict=True)]
        self.raw = torch.cat(values).view(2, -1)
        self.A, self.C = intervals(*self.raw, self.raw.shape[1])
        rows = zip(self.sources, self.counts, bits, strict=True)
        self.pieces, self.intervals = _tables(
            tuple((w.data_ptr(), w.numel(), k, levels(b, True)) for w, k, b in rows),
            weights[0].element_size(), weights[0].device,
        )  # fmt: skip

    def flat(self) -> Tensor:
        return self.sources[0].new_empty(sum(w.numel() for w in self.sources))

    def split(self, flat: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """The parts of `flat`, each with the strides that torch.empty_like gives its weight."""
        result, place = [], 0
        for w, source in zip(weights, self.sources, strict=True):
            part = flat.as_strided(source.shape, source.stride(), place)
            result.append(part if w is source else torch.empty_like(w).copy_(part))
            place += w.numel()
        return result


def weights_forward(weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]) -> list[Tensor]:
    """Quantized weights; see reference.weights_forward. They share one block of memory."""
    layout = _Layout(weights, a, c, bits)
    y = layout.flat()
    if y.numel():
        with on_device(y):
            kernels.duq_weights_forward[(len(layout.pieces),)](
                layout.pieces, layout.A, layout.C, y, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
            )
    return layout.split(y, weights)


def weights_backward(
    grads: list[Tensor], weights: list[Tensor], a: list[Tensor], c: list[Tensor], bits: list[int]
) -> list[Tensor]:
    """All dL/dw, then all dL/da, then all dL/dc; see reference.weights_backward. Deterministic."""
    layout = _Layout(weights, a, c, bits)
    gw = layout.flat()
    if not gw.numel():
        return [*layout.split(gw, weights), *(torch.zeros_like(raw) for raw in (*a, *c))]
    g = torch.cat([like(g, w).as_strided((w.numel(),), (1,)) for g, w in zip(grads, layout.sources, strict=True)])
    pieces, intervals = len(layout.pieces), len(layout.intervals)
    partial = torch.empty(2, pieces, dtype=torch.float32, device=gw.device)
    g_raw = torch.empty_like(layout.raw)
    with on_device(gw):
        kernels.duq_weights_backward[(pieces,)](
            layout.pieces, layout.A, layout.C, g, gw, partial, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False
        )
        kernels.duq_weights_finish[(intervals,)](
            layout.intervals, partial, layout.raw, g_raw, pieces, BLOCK=FINISH_BLOCK, num_warps=1, enable_fp_fusion=False
        )
    return [
        *layout.split(gw, weights),
        *(
            (total if like_raw.numel() == total.numel() else total.sum()).reshape(like_raw.shape).to(like_raw.dtype)
            for totals, raws in zip(g_raw, (a, c), strict=True)
            for total, like_raw in zip(totals.split(layout.counts), raws, strict=True)
        ),
    ]
