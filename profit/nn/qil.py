"""QIL: a learnable quantization interval, given by its centre and half-width.

Source: Jung et al., "Learning to Quantize Deep Networks by Optimizing Quantization Intervals with Task Loss", CVPR 2019
(arXiv 1808.05779), section 3.

    u = (|x| - c) / (2 d) + 1/2        0 below c - d (pruned), 1 above c + d (saturated)
    y = sign(x) * round(u^gamma * s) / s
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from profit_kernels.layer import levels

from ..errors import CalibrationError
from .quantizer import InputQuantizer, WeightQuantizer, apply_activation
from .straight_through import clip_strict, in_float, round_ste


def qil_quantize(
    x: Tensor, center: Tensor, half_width: Tensor, steps: int, gamma: Tensor | None, signed: bool
) -> Tensor:
    """The formula above; straight-through rounding, no gradient where pruned or saturated.

    Args:
        x: input, at least float32. center, half_width: broadcastable to x; the half-width's sign is ignored.
        steps: s. gamma: exponent, None for 1. signed: False takes x itself for |x|, so that negative inputs are pruned.
    """
    magnitude = x.abs() if signed else x
    u = clip_strict((magnitude - center) / (2.0 * half_width.abs()) + 0.5, 0.0, 1.0)
    if gamma is not None:
        # 0^gamma has an infinite slope for gamma < 1, and the gradient of gamma there is 0 * log 0: leave the zeros out.
        u = torch.where(u > 0, u, 1.0).pow(gamma) * (u > 0)
    y = round_ste(u * steps) / steps
    return y * x.detach().sign() if signed else y


class QILInput(InputQuantizer):
    """QIL of a layer's input, with result in [0, 1]: the scale of the input is lost, so a BatchNorm should follow.

    `a` holds the centre and `c` the half-width themselves (no softplus). A negative range cannot be represented: the
    part of an "offset" input below 0 is pruned. For "signed" inputs, which the paper does not have, the formula of the
    weights is used, with result in [-1, 1].
    """

    is_duq = False

    @torch.no_grad()
    def set_range(self, value: float) -> None:
        """Start with the interval [0, end], `end` being `value` above the input's lower bound; errors as InputQuantizer."""
        end = value + self.offset
        if not (math.isfinite(value) and end > 0):
            raise CalibrationError(
                f"the input range of {self._where()} would end at {end}: QIL needs a positive finite end"
            )
        self.a.fill_(end / 2)
        self.c.fill_(end / 2)
        self.mark_ready()

    def fake_quantize(self, x: Tensor) -> Tensor:
        h = in_float(apply_activation(x, self.activation))
        steps = levels(self.bits, self.signed)
        return qil_quantize(h, self.a, self.c, steps, None, self.signed).to(x.dtype)


class QILWeight(WeightQuantizer):
    """QIL of a weight, with result in [-1, 1] on 2^(k-1) - 1 steps to each side.

    `a` holds the centre, `c` the half-width, `gamma` the exponent, which is 1 except at 2 bits, where it is learned.
    The scale of the weights is lost, so a BatchNorm should follow.
    """

    is_duq = False

    def __init__(
        self, channels: int | None = None, bits: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(channels, bits, device, dtype)
        self.gamma = nn.Parameter(torch.ones_like(self.a))

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Start with the interval [0, max|w|]; raises CalibrationError for weights that are all zero or not finite."""
        half = self._peak(weight) / 2
        self.a.copy_(half)
        self.c.copy_(half)
        self.gamma.fill_(1.0)
        self.mark_ready()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        shape = (-1, *[1] * (weight.dim() - 1)) if self.channels is not None else (1,)
        center, half_width, gamma = (p.reshape(shape) for p in (self.a, self.c, self.gamma))
        steps = levels(self.bits, True)
        exponent = gamma if self.bits == 2 else None
        return qil_quantize(in_float(weight), center, half_width, steps, exponent, signed=True).to(weight.dtype)
