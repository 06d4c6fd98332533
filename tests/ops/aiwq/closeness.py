"""KL of two outputs that were summed in another order: how far apart it may be, channel by channel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests import tolerances


def assert_kl_close(
    found: Tensor, expected: Tensor, padded: Tensor, w_new: Tensor, w_old: Tensor, bias: Tensor | None = None, stride=1,
    dilation=1, groups: int = 1,
) -> None:  # fmt: skip
    """KL of a convolution's outputs on `padded`, the quantized input with its border.

    KL divides by a deviation, and sums are rounded at the size of their terms: a channel that hardly varies is worse off, and
    one whose terms cancel. With e roundings of the terms over the deviation, the mean difference and the variances' quotient
    move by e. As KL ~ (difference^2 + (quotient - 1)^2 / 2) / 2 near 0, and is linear in both squares far from it, KL moves
    by e sqrt(2 KL) + e KL + e^2.
    """
    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        y = F.conv2d(x.double(), w.double(), None if b is None else b.double(), stride, 0, dilation, groups)
        return y.transpose(0, 1).flatten(1)

    e = torch.zeros(len(w_new), dtype=torch.float64)
    for w in (w_new, w_old):
        terms = convolve(padded.abs(), w.abs(), None if bias is None else bias.abs()).amax(1)
        deviation = (convolve(padded, w, bias).var(1) + 1e-12).sqrt()
        e = torch.maximum(e, tolerances.KL_ROUNDINGS * 2**-24 * terms / deviation)
    expected = expected.double()
    allowed = e * ((2 * expected.clamp(min=0)).sqrt() + expected.abs()) + e.square()
    apart = (found.double() - expected).abs()
    wrong = ~(apart <= allowed) & ~(found.isnan() & expected.isnan())  # a single sample is NaN in both
    if wrong.any():
        i = int(torch.where(wrong, (apart / allowed).nan_to_num(torch.inf), 0).argmax())
        raise AssertionError(
            f"{int(wrong.sum())} of {len(wrong)} channels differ; the worst is {i}: {found[i]} instead of {expected[i]}, "
            f"which is {apart[i] / allowed[i]:.3g} times what rounding explains"
        )
