"""KL of two outputs that were summed in another order: how far apart it may be, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import tolerances


def assert_kl_close(found: Tensor, expected: Tensor, y_new: Tensor, y_old: Tensor) -> None:
    """KL divides by a deviation and outputs are rounded at their size: a channel far from 0 for its deviation is worse off.

    With e roundings of the largest output over the deviation, the mean difference and the variances' quotient move by e. As
    KL ~ (difference^2 + (quotient - 1)^2 / 2) / 2 near 0, and is linear in both squares far from it, KL moves by
    e sqrt(2 KL) + e KL + e^2.
    """
    new, old = (y.double().transpose(0, 1).flatten(1) for y in (y_new, y_old))
    off_centre = [y.abs().amax(1) / (y.var(1) + 1e-12).sqrt() for y in (new, old)]
    e = tolerances.KL_ROUNDINGS * 2**-24 * torch.maximum(*off_centre)
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
