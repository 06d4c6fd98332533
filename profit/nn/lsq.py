"""LSQ and LSQ+: a learnable step, and for LSQ+ a learnable offset of the activations.

Sources: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153), section 2; Bhalgat et al., "LSQ+",
CVPR workshops 2020 (arXiv 2004.09576), sections 3.1 to 3.3.

    v = clip((x - beta) / s, -Q_N, Q_P),  y = s * round(v) + beta             (LSQ: beta = 0)
    dy/dx = 1 inside, 0 outside;  dy/ds = round(v) - v inside, -Q_N or Q_P outside;  dy/dbeta = 0 inside, 1 outside

The gradients of s and beta are multiplied by 1 / sqrt(N * Q_P), with N weights, or features of one image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from profit_kernels.layer import levels

from ..errors import CalibrationError
from .quantizer import InputQuantizer, WeightQuantizer, _Quantizer, apply_activation
from .straight_through import clip_strict, in_float, round_ste, scale_gradient


def lsq_quantize(x: Tensor, step: Tensor, beta: Tensor | None, low: int, high: int, elements: int) -> Tensor:
    """The formula above with its gradients.

    Args:
        x: input, at least float32. step, beta: broadcastable to x; the sign of the step is ignored.
        low, high: -Q_N and Q_P. elements: N of the gradient scale.
    """
    factor = 1.0 / math.sqrt(elements * high)
    step = scale_gradient(step.abs(), factor)
    if beta is None:
        return round_ste(clip_strict(x / step, low, high)) * step
    beta = scale_gradient(beta, factor)
    return round_ste(clip_strict((x - beta) / step, low, high)) * step + beta


class _Stepped(_Quantizer):
    """`a` holds the step times `unit()` (no softplus): what a lower bit width inherits from a higher one."""

    is_duq = False

    def levels(self) -> tuple[int, int]:
        """(-Q_N, Q_P) at the present bit width: a two's complement range."""
        return -levels(self.bits, True) - 1, levels(self.bits, True)

    def unit(self) -> float:
        """Q_P, so that `a` is the range and the range is carried on."""
        return float(self.levels()[1])

    @property
    def step(self) -> Tensor:
        """The step s, [1] or [channels]. Under SGD it moves as it would as a parameter: d/da = unit * d/ds."""
        unit = self.unit()
        return scale_gradient(self.a, unit * unit) / unit

    @torch.no_grad()
    def _set_step(self, step: Tensor | float) -> None:
        self.a.copy_(torch.as_tensor(step) * self.unit())
        self.mark_ready()


class LSQInput(_Stepped, InputQuantizer):
    """LSQ of a layer's input: codes 0 .. 2^k - 1 for "unsigned", -2^(k-1) .. 2^(k-1) - 1 where it can be negative.

    So an "offset" input (h-swish) spends half of its codes on the short negative range. `c` is not used.
    """

    def levels(self) -> tuple[int, int]:
        """(-Q_N, Q_P) at the present bit width."""
        return (0, levels(self.bits, False)) if self.kind == "unsigned" else super().levels()

    @torch.no_grad()
    def _set_range(self, value: float) -> None:
        self.a.fill_(value)
        self.mark_ready()

    def set_range(self, value: float) -> None:
        """Set the step so that inputs up to `value` above the lower bound are kept; errors as InputQuantizer.

        The paper's own start, from the data of one batch, is `initialize`.
        """
        end = value + self.offset
        if not (math.isfinite(value) and end > 0):
            raise CalibrationError(
                f"the input range of {self._where()} would end at {end}: LSQ needs a positive finite end"
            )
        self._set_range(end)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """The paper's start, s = 2 mean|x| / sqrt(Q_P), from the activations `x` (before `activation`).

        Raises:
            CalibrationError: the activations are all zero or not finite. ValueError: no bit width is set.
        """
        if self.bits is None:
            raise ValueError("set the bit width before the step: its start depends on it")
        self._set_step(_start(apply_activation(x, self.activation), self.levels()[1], None, self._where()))

    def fake_quantize(self, x: Tensor) -> Tensor:
        h = in_float(apply_activation(x, self.activation))
        return lsq_quantize(h, self.step, None, *self.levels(), elements=_features(h)).to(x.dtype)


class LSQPlusInput(LSQInput):
    """LSQ+ of a layer's input: codes 0 .. 2^k - 1 and, where the input can be negative, a learnable offset beta in `c`."""

    def levels(self) -> tuple[int, int]:
        """(0, 2^k - 1): the offset serves the negative part."""
        return 0, levels(self.bits, False)

    @torch.no_grad()
    def set_range(self, value: float) -> None:
        """Cover [beta, beta + value] for "unsigned" and "offset", [-value, value] for "signed"; errors as InputQuantizer."""
        if not (math.isfinite(value) and value > 0):
            raise CalibrationError(
                f"the input range of {self._where()} would be {value}: it must be positive and finite"
            )
        self.c.fill_(-value if self.signed else self.offset)
        self._set_range(2.0 * value if self.signed else value)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """The paper's start from the least and greatest activation: s = (max - min) / Q_P, beta = min.

        Raises:
            CalibrationError: the activations are all equal or not finite.
        """
        h = apply_activation(x, self.activation).double()
        low, high = h.min().item(), h.max().item()
        if not (math.isfinite(high - low) and high > low):
            raise CalibrationError(f"the inputs of {self._where()} span {low} .. {high}: no range to quantize")
        self.c.fill_(0.0 if self.kind == "unsigned" else low)
        self._set_range(high if self.kind == "unsigned" else high - low)

    def fake_quantize(self, x: Tensor) -> Tensor:
        h = in_float(apply_activation(x, self.activation))
        beta = None if self.kind == "unsigned" else self.c
        return lsq_quantize(h, self.step, beta, *self.levels(), elements=_features(h)).to(x.dtype)


class LSQWeight(_Stepped, WeightQuantizer):
    """LSQ of a weight, per tensor or per output channel; codes -2^(k-1) .. 2^(k-1) - 1. `c` is not used."""

    def unit(self) -> float:
        """sqrt(Q_P): every bit width starts where the paper's rule, s proportional to 1 / sqrt(Q_P), would start it.

        The rule's range at 8 bits is 22 mean|w|; carried on to 4 bits it would round nearly every weight to 0.
        """
        return math.sqrt(self.levels()[1])

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """s = 2 mean|w| / sqrt(Q_P); raises CalibrationError for weights that are all zero or not finite."""
        self._peak(weight)
        self._set_step(_start(weight, self.levels()[1], self.channels, self._where()))

    def fake_quantize(self, weight: Tensor) -> Tensor:
        w = in_float(weight)
        step, elements = self.step, w.numel()
        if self.channels is not None:
            step, elements = step.reshape(-1, *[1] * (w.dim() - 1)), w[0].numel()
        return lsq_quantize(w, step, None, *self.levels(), elements=elements).to(weight.dtype)


class LSQPlusWeight(LSQWeight):
    """LSQ+ of a weight: LSQ with another start, and no offset."""

    def unit(self) -> float:
        """Q_P: the start covers three standard deviations at every bit width."""
        return float(self.levels()[1])

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """s = max(|mean - 3 std|, |mean + 3 std|) / 2^(k-1); errors as LSQWeight."""
        self._peak(weight)
        rows = weight.double().reshape(1, -1) if self.channels is None else weight.double().flatten(1)
        mean, deviation = rows.mean(1), rows.std(1, correction=0)
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        reach = torch.where(reach > 0, reach, reach.max())
        self._set_step(reach / -self.levels()[0])


def _features(x: Tensor) -> int:
    """Elements of one image."""
    return max(1, x.numel() // max(1, x.shape[0]))


def _start(values: Tensor, high: int, channels: int | None, where: str) -> Tensor:
    """LSQ's first step 2 mean|x| / sqrt(Q_P), [1] or [channels]; an all-zero channel takes that of the whole tensor."""
    magnitude = values.detach().double().abs()
    whole = magnitude.mean().reshape(1)
    if not values.is_meta and not (torch.isfinite(whole).item() and whole.item() > 0):
        raise CalibrationError(f"the data of {where} are all zero or not finite: LSQ's step has no start")
    mean = whole if channels is None else magnitude.flatten(1).mean(1)
    return 2.0 * torch.where(mean > 0, mean, whole) / math.sqrt(high)
