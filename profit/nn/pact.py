"""PACT: learnable upper clip for activations, tanh-normalised (DoReFa) weights.

Sources: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085, section 3;
Zhou et al., "DoReFa-Net", arXiv 1606.06160, section 2.3 (weights).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from profit_kernels.layer import levels

from ..errors import CalibrationError
from .quantizer import InputQuantizer, WeightQuantizer, apply_activation
from .straight_through import in_float, round_ste


class PACTInput(InputQuantizer):
    """`y = clip(x, 0, alpha)`, rounded to 2^k - 1 steps; d/dalpha = 1 where x >= alpha.

    `a` holds alpha itself (no softplus); `c` is not used. A negative range cannot be represented: the part of an
    "offset" input below 0 becomes 0. For "signed" inputs, which the paper does not have, the clip is [-alpha, alpha]
    on 2^(k-1) - 1 steps to each side.
    """

    is_duq = False

    @torch.no_grad()
    def set_range(self, value: float) -> None:
        """Set alpha so that inputs up to `value` above the input's lower bound are kept; errors as InputQuantizer."""
        alpha = value + self.offset
        if not (math.isfinite(value) and alpha > 0):
            raise CalibrationError(
                f"the input range of {self._where()} would end at {alpha}: PACT needs a positive finite end"
            )
        self.a.fill_(alpha)
        self.mark_ready()

    def fake_quantize(self, x: Tensor) -> Tensor:
        h = in_float(apply_activation(x, self.activation))
        low = -1.0 if self.signed else 0.0
        steps = levels(self.bits, self.signed)
        # The step is held constant: PACT takes d/dalpha from the clip alone. With a live step it would also contain the
        # rounding error inside the range, which is LSQ's gradient.
        clipped = torch.where(h >= self.a, self.a, torch.where(h <= low * self.a, low * self.a, h))
        step = (self.a / steps).detach()
        return (round_ste(clipped / step) * step).to(x.dtype)

    def penalty(self) -> Tensor:
        """alpha^2, the L2 term that the paper adds to the loss with the coefficient of the weight decay."""
        return self.a.square().sum()


class PACTWeight(WeightQuantizer):
    """DoReFa: `t = tanh(w) / max|tanh(w)|`, `y = 2 round((t + 1) / 2 * (2^k - 1)) / (2^k - 1) - 1`, within [-1, 1].

    `a` and `c` are not used: nothing is learned. The scale of the weights is lost, so a BatchNorm should follow.
    """

    is_duq = False

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Check that the weights are finite and not all zero; raises CalibrationError."""
        self._peak(weight)
        self.mark_ready()

    def fake_quantize(self, weight: Tensor) -> Tensor:
        t = torch.tanh(in_float(weight))
        magnitude = t.abs()
        if self.channels is None:
            peak = magnitude.max()
        else:
            peak = magnitude.flatten(1).amax(1).reshape(-1, *[1] * (weight.dim() - 1))
            peak = torch.where(peak > 0, peak, 1.0)
        steps = levels(self.bits, False)
        unit = 0.5 * t / peak + 0.5
        return (2.0 * (round_ste(unit * steps) / steps) - 1.0).to(weight.dtype)


def pact_penalty(model: nn.Module) -> Tensor:
    """Sum of alpha^2 over the PACT input quantizers of `model` that quantize; add `weight_decay` times it to the loss.

    Raises:
        ValueError: there is none.
    """
    terms = [m.penalty() for m in model.modules() if isinstance(m, PACTInput) and m.bits is not None]
    if not terms:
        raise ValueError("the model has no active PACT input quantizer: there is nothing to penalise")
    return torch.stack(terms).sum()
