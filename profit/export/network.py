"""What every export format is made from: a quantized network in numbers, free of modules and of PyTorch's graph.

A :class:`Network` is a list of steps. A step is either a layer (a convolution or linear layer with its input quantizer in
front and its BatchNorm behind) or one of the operators of :mod:`profit.export.operators`. For a layer with codes `qx` of
`s` steps, clipping interval A, scale C and offset d in front of integer weights `qw`:

    qx = round(clip((act(x) - d) / A, lo, 1) * s)
    y = multiplier * conv(qx, qw) + bias                     per output channel; the sum is an exact integer

`multiplier` is `Cx/s_x * Cw/s_w * g` and `bias` holds the offset term `d * Cw/s_w * g * sum(qw)`, the layer's own bias and
the shift of the BatchNorm, whose factor is `g` (docs/export.md). Where one side is not quantized, `qx` or `qw` is the float
value itself and its step 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError

INT32_MAX = 2**31 - 1
BATCH = -1  # stands for the number of images in a shape


@dataclass(frozen=True)
class ActivationCodes:
    """The quantizer in front of a layer; `interval` is A, `scale` is C, `offset` is d of the formulas."""

    bits: int
    signed: bool
    offset: float
    interval: float
    scale: float

    @property
    def steps(self) -> int:
        """s, which is also the largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    @property
    def low(self) -> int:
        """The smallest code."""
        return -self.steps if self.signed else 0

    @property
    def step(self) -> float:
        """What one code is worth, C / s."""
        return self.scale / self.steps


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: dotted name in the model.
        type: "conv" or "linear".
        weight: int8 codes, or float32 where `weight_bits` is None; [C_out, C_in / groups, kh, kw] or [C_out, C_in].
        weight_bits: 2 to 8 or None.
        codes: the input's quantizer, None where the input stays float.
        activation: applied to the input first: "none", "relu", "relu6" or "hardswish".
        multiplier, bias: float64 [C_out], see above.
        stride, dilation: (h, w). pads: (left, right, top, bottom), zeros around the codes. groups.
        pad_value: what stands in the border of a float input; 0 for codes.
        real_zero_border: the border holds real 0 behind an offset quantizer (padding="zero"), which is no code: the offset
            term then depends on the position and is not in `bias` but computed from the weights under the image.
        batch_norm: name of the BatchNorm that was folded in, "" if none.
    """

    name: str
    type: str
    weight: Tensor
    weight_bits: int | None
    codes: ActivationCodes | None
    activation: str
    multiplier: Tensor
    bias: Tensor
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pad_value: float = 0.0
    real_zero_border: bool = False
    batch_norm: str = ""

    @property
    def is_integer(self) -> bool:
        """Both sides are codes, so the sum of products is an integer."""
        return self.codes is not None and self.weight_bits is not None

    @property
    def bits(self) -> str:
        """For tables: "W4A4", with 32 for a side that is not quantized."""
        return f"W{self.weight_bits or 32}A{self.codes.bits if self.codes else 32}"

    @property
    def accumulator_bound(self) -> int:
        """The largest magnitude the integer sum can reach with this layer's own weights."""
        return int(self.weight.long().abs().flatten(1).sum(1).max()) * self.codes.steps if self.is_integer else 0

    @property
    def offset_term(self) -> Tensor:
        """float64 [C_out]: what one unit of the sum of weight codes adds where the offset quantizer's d is under it."""
        return self.multiplier * (self.codes.offset / self.codes.step)

    def followed_by(self, factor: Tensor, shift: Tensor, batch_norm: str) -> Layer:
        """The layer with `factor * y + shift` ([C_out] each) behind it."""
        return replace(
            self, multiplier=self.multiplier * factor, bias=self.bias * factor + shift, batch_norm=batch_norm
        )

    def check(self) -> None:
        """Raise ExportError where a 32-bit accumulator could overflow or a number is not finite."""
        if self.accumulator_bound > INT32_MAX:
            raise ExportError(
                f"layer {self.name!r}: its sums can reach {self.accumulator_bound}, more than a 32-bit accumulator holds: "
                "use fewer bits for this layer"
            )
        interval = torch.tensor(0.0 if self.codes is None else self.codes.interval)
        for what, values in (
            ("weights", self.weight), ("folded scale", self.multiplier), ("folded bias", self.bias), ("input range", interval),
        ):  # fmt: skip
            if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                raise ExportError(f"layer {self.name!r}: its {what} is not finite, so it cannot be exported")

    def settings(self) -> dict[str, Any]:
        """Everything but the tensors, JSON-able."""
        tensors = ("weight", "multiplier", "bias")
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key not in tensors}
        values["codes"] = None if self.codes is None else asdict(self.codes)
        values["shape"] = list(self.weight.shape)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class Step:
    """`output = op(*inputs, **settings)`. Inputs are names of values or constants, or numbers. `op` is "layer", with
    `settings["layer"]` its name, or an operator of :mod:`profit.export.operators`. `shape` is that of the output, with
    -1 for the number of images."""

    op: str
    inputs: tuple[str | float, ...]
    output: str
    shape: tuple[int, ...]
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Network:
    """A network of one image input "input" and one output.

    Attributes:
        input_shape: [-1, C, H, W].
        output: name of the value that is returned.
        steps: in the order in which they run.
        layers: by name. constants: float64 tensors that steps name.
    """

    input_shape: tuple[int, ...]
    output: str
    steps: tuple[Step, ...]
    layers: dict[str, Layer]
    constants: dict[str, Tensor]

    def layer_runs(self) -> Iterator[tuple[str, Step, Layer]]:
        """(name of the run, step, layer) in the order in which they run; a layer's second run is called "name#2"."""
        runs: dict[str, int] = {}
        for step in self.steps:
            if step.op == "layer":
                name = step.settings["layer"]
                runs[name] = runs.get(name, 0) + 1
                yield (name if runs[name] == 1 else f"{name}#{runs[name]}"), step, self.layers[name]

    def reader_counts(self) -> dict[str, int]:
        """How often each value is read; the network's output counts as a read."""
        counts = {self.output: 1}
        for step in self.steps:
            for name in step.inputs:
                if isinstance(name, str):
                    counts[name] = counts.get(name, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The structure without tensors, JSON-able."""
        return {
            "input_shape": list(self.input_shape),
            "output": self.output,
            "steps": [{**asdict(s), "inputs": list(s.inputs), "shape": list(s.shape)} for s in self.steps],
            "layers": {name: layer.settings() for name, layer in self.layers.items()},
            "constants": {name: list(value.shape) for name, value in self.constants.items()},
        }
