"""The quantizers of a layer's input and of its weight: DuQ parameters and the state around them.

`A = softplus(a)` is the clipping interval, `C = softplus(c)` the output scale (PROFIT, section 4.1; docs/maths.md). The
arithmetic is in :mod:`profit_kernels`. The baselines (PACT, QIL, LSQ, LSQ+) subclass these two classes and replace
`fake_quantize` and the initialisation; bits, kinds, calibration state and error messages stay here.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit_kernels import duq_fake_quantize
from profit_kernels.layer import Quantizer

from ..config import ACTIVATIONS, KINDS, check_bits, check_choice
from ..errors import CalibrationError


def inverse_softplus(value: Tensor) -> Tensor:
    """The raw parameter whose softplus is `value` > 0, as `v + log(-expm1(-v))`: no overflow for large `v`."""
    return value + torch.log(-torch.expm1(-value))


def apply_activation(x: Tensor, activation: str) -> Tensor:
    """`activation(x)` for one of "none", "relu", "relu6", "hardswish"; same shape and dtype as `x`."""
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "hardswish":
        return F.hardswish(x)
    return x


class _Quantizer(nn.Module):
    """Raw interval parameters `a`, `c` kept in float32 (float64 after `.double()`), and a flag "has a range".

    The flag is a buffer, so that it travels with the state_dict, and a plain bool, so that a forward on a GPU never waits
    for the device. The buffer is a float, 0 or 1: averages of weights subtract (no bool can) and scale (an integer 1 would be
    truncated to 0).
    """

    is_duq: ClassVar[bool] = True  # the fused operators implement DuQ only
    _flag: ClassVar[str]

    def __init__(self, numel: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dtype is None or dtype.itemsize < 4:
            dtype = torch.float32
        raw = inverse_softplus(torch.ones(numel, device=device, dtype=dtype))
        self.a = nn.Parameter(raw)
        self.c = nn.Parameter(raw.clone())
        self.register_buffer(self._flag, torch.zeros((), device=device))
        self._ready = False
        self.layer_name = ""

    def mark_ready(self) -> None:
        """Record that the parameters hold a usable range."""
        getattr(self, self._flag).fill_(1.0)
        self._ready = True

    def _is_ready(self) -> bool:
        """Whether there is a range; looks at the buffer only while there was none (another model's may be copied there)."""
        if not self._ready and not torch.compiler.is_compiling():
            flag = getattr(self, self._flag)
            self._ready = not flag.is_meta and bool(flag)
        return self._ready

    def _apply(self, fn: Any, recurse: bool = True) -> _Quantizer:
        # Intervals stay in float32 when a model is cast to half precision: their updates are lr * 1e-2 small.
        exact = {name: p.detach() for name, p in self.named_parameters(recurse=False)}
        was_meta = self.a.is_meta
        super()._apply(fn, recurse)
        for name, p in self.named_parameters(recurse=False):
            if p.dtype.itemsize < 4:
                p.data = exact[name].to(device=p.device)
                p.grad = None
        if was_meta and not self.a.is_meta:
            self._forget()
        return self

    @torch.no_grad()
    def _forget(self) -> None:
        """Back to no range: `to_empty` leaves any memory here, the flag included, which would then count as set."""
        for parameter in self.parameters(recurse=False):
            parameter.copy_(inverse_softplus(torch.ones_like(parameter)))
        getattr(self, self._flag).zero_()
        self._ready = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False
        self._is_ready()

    def _where(self) -> str:
        return f"layer {self.layer_name!r}" if self.layer_name else "this layer"


class InputQuantizer(_Quantizer):
    """Activation function and quantizer of a layer's input.

    Args:
        kind: "raw" (never quantized: the image), "unsigned", "offset" or "signed".
        offset: d of the formulas, below 0 for kind "offset", else 0.
        activation: applied first; "none", "relu", "relu6" or "hardswish".
        bits: 2 to 8, or None: only the activation is applied.

    `a`, `c`: float32 [1]. `forward` keeps shape, dtype and memory format and raises :class:`CalibrationError` when it
    should quantize and has no range yet.
    """

    _flag = "calibrated"

    def __init__(
        self, kind: str = "signed", offset: float = 0.0, activation: str = "none", bits: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_choice(kind, KINDS, "kind")
        check_choice(activation, ACTIVATIONS, "activation")
        check_bits(bits, "act_bits")
        if (kind == "offset") != (offset < 0):
            raise ValueError(
                f"kind={kind!r} does not go with offset={offset}: an offset is below 0, other kinds have 0"
            )
        super().__init__(1, device, dtype)
        self.kind = kind
        self.offset = float(offset)
        self.activation = activation
        self.bits = None if kind == "raw" else bits
        if kind == "raw":  # never used: an optimizer or DistributedDataParallel must not wait for its gradient
            self.requires_grad_(False)

    @property
    def signed(self) -> bool:
        """Codes run from -s to s (kind "signed") instead of 0 to s."""
        return self.kind == "signed"

    @property
    def is_calibrated(self) -> bool:
        """Whether a range was set; the host's copy of the buffer `calibrated`."""
        return self._is_ready()

    @torch.no_grad()
    def set_range(self, value: float) -> None:
        """Set A = C = `value`, in units of what the quantizer sees (after activation, and after the shift by -offset).

        Raises:
            CalibrationError: `value` is not a positive finite number.
        """
        if not (math.isfinite(value) and value > 0):
            raise CalibrationError(
                f"the input range of {self._where()} would be {value}: it must be positive and finite"
            )
        raw = inverse_softplus(torch.tensor(float(value), dtype=torch.float64)).item()
        self.a.fill_(raw)
        self.c.fill_(raw)
        self.mark_ready()

    def check_ready(self) -> None:
        """Raise :class:`CalibrationError` if bits are set and no range is."""
        if self.bits is not None and not self._is_ready():
            raise CalibrationError(
                f"the input of {self._where()} has no range yet: run calibrate_ on some batches first"
            )

    def value(self) -> Quantizer:
        """What the operators take."""
        return Quantizer(self.a, self.c, self.bits, self.signed, self.offset, self.activation)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The quantized activation of `x`; replaced by the baselines."""
        return duq_fake_quantize(
            x, self.a, self.c, bits=self.bits, signed=self.signed, offset=self.offset, activation=self.activation
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is None:
            return apply_activation(x, self.activation)
        self.check_ready()
        return self.fake_quantize(x)

    def extra_repr(self) -> str:
        offset = f", offset={self.offset:g}" if self.kind == "offset" else ""
        return f"{self.kind}{offset}, activation={self.activation}, bits={self.bits}"


class WeightQuantizer(_Quantizer):
    """Quantizer of a weight, signed and symmetric.

    Args:
        channels: None for one interval per tensor, else the number of output channels (one interval each).
        bits: 2 to 8, or None: the weight passes through.

    `a`, `c`: float32 [1] or [channels]. The interval is set from the weight at the first bit width
    (:meth:`initialize`) and carried on to later ones.
    """

    _flag = "initialized"

    def __init__(
        self, channels: int | None = None, bits: int | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        check_bits(bits, "weight_bits")
        super().__init__(1 if channels is None else channels, device, dtype)
        self.channels = channels
        self.bits = bits

    @property
    def is_initialized(self) -> bool:
        """Whether the interval was set; the host's copy of the buffer `initialized`."""
        return self._is_ready()

    @torch.no_grad()
    def initialize(self, weight: Tensor) -> None:
        """Set A = C = 0.9 max|w| (up to 5 bits, as published) or max|w| (above), per tensor or per output channel.

        A channel whose weights are all zero takes the interval of the whole tensor.

        Raises:
            CalibrationError: the weights are all zero or not finite.
        """
        peak = self._peak(weight)
        raw = inverse_softplus(peak * (0.9 if self.bits is not None and self.bits <= 5 else 1.0))
        self.a.copy_(raw)
        self.c.copy_(raw)
        self.mark_ready()

    def _peak(self, weight: Tensor) -> Tensor:
        """max|w| as float64 [1] or [channels], checked to be a possible interval."""
        magnitude = weight.detach().to(torch.float64).abs()
        peak = magnitude.max().reshape(1)
        if not weight.is_meta and not (torch.isfinite(peak).item() and peak.item() > 0):
            raise CalibrationError(
                f"the weights of {self._where()} are all zero or not finite, so they have no interval: "
                "give them values, or leave the layer in full precision (overrides: weight_bits=None)"
            )
        if self.channels is None:
            return peak
        per_channel = magnitude.flatten(1).amax(1)
        return torch.where(per_channel > 0, per_channel, peak)

    def check_ready(self) -> None:
        """Raise :class:`CalibrationError` if bits are set and the interval is not."""
        if self.bits is not None and not self._is_ready():
            raise CalibrationError(
                f"the weight interval of {self._where()} is not set: call initialize or set_bits first"
            )

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """The quantized weight; replaced by the baselines."""
        return duq_fake_quantize(weight, self.a, self.c, bits=self.bits, signed=True)

    def forward(self, weight: Tensor) -> Tensor:
        if self.bits is None:
            return weight
        self.check_ready()
        return self.fake_quantize(weight)

    def extra_repr(self) -> str:
        return f"{'per_tensor' if self.channels is None else 'per_channel'}, bits={self.bits}"
