"""AIWQ over several batches or processes: the KL of moments that are pooled first.

A mean of KLs is not the KL of the whole. Where the batch of one iteration is spread over forward passes or processes,
each gives n, mean and M2 (the sum of squared deviations from its own mean) per channel, and these pool exactly:

    n = sum n_i ;  mean = sum n_i mean_i / n ;  M2 = sum M2_i + sum n_i (mean_i - mean)^2

(Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance"). Plain PyTorch on any device, float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .op import EPS

ROWS = ("n", "mean_new", "m2_new", "mean_old", "m2_old")


def pool_moments(moments: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Pool [K, 5, C] moments to [5, C]; a part without values (n = 0) holds zeros.

    Args:
        total: the sum over dimension 0 (of one process), or also over processes: called twice.
    """
    n, mean_new, m2_new, mean_old, m2_old = moments.unbind(1)
    sums = total(torch.stack((n, n * mean_new, n * mean_old), 1))
    means = sums[1:] / sums[0]
    deviations = [m2 + torch.where(n > 0, n * (mean - pooled).square(), 0.0)
                  for m2, mean, pooled in ((m2_new, mean_new, means[0]), (m2_old, mean_old, means[1]))]  # fmt: skip
    m2 = total(torch.stack(deviations, 1))
    return torch.stack((sums[0], means[0], m2[0], means[1], m2[1]))


def kl_of_pooled(moments: Tensor, eps: float = EPS) -> Tensor:
    """KL [C], float32, of pooled moments [5, C]; a channel with fewer than two values is NaN."""
    n, mean_new, m2_new, mean_old, m2_old = moments
    degrees = torch.where(n > 1, n - 1, float("nan"))
    return reference.kl_of_moments(mean_new, m2_new / degrees, mean_old, m2_old / degrees, eps)
