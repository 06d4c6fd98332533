"""A drop-in Linear that quantizes its input and its weight."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import DuQConfig
from ..errors import ConversionError
from .layer import QuantLayer, build_quantizers, check_own_parameters, finish
from .quantizer import InputQuantizer, WeightQuantizer

_PLAIN = ("timm.layers.linear.Linear",)  # its forward differs from nn.Linear's under TorchScript only


def check_plain_linear(linear: nn.Linear, name: str = "") -> None:
    """Raise ConversionError if `linear` has a forward of its own that is not known here."""
    cls = type(linear)
    if cls.forward is not nn.Linear.forward and f"{cls.__module__}.{cls.__qualname__}" not in _PLAIN:
        raise ConversionError(
            f"layer {name!r}: {cls.__name__} is a Linear with a forward of its own, which conversion would replace; "
            f"leave it out with overrides={{{name!r}: {{'skip': True}}}} or filter_fn"
        )


class QuantLinear(QuantLayer, nn.Linear):
    """Linear over a quantized input [..., in_features] with a quantized weight.

    Takes the arguments of torch.nn.Linear and keeps its state_dict keys `weight` and `bias`. The quantizers default to
    signed ones with bits None (full precision).
    """

    def __init__(
        self, *args: Any, input_quantizer: InputQuantizer | None = None, weight_quantizer: WeightQuantizer | None = None,
        layer_name: str = "", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._init_quantization(input_quantizer, weight_quantizer, layer_name)

    @classmethod
    def from_float(
        cls, linear: nn.Linear, config: DuQConfig | None = None, *, kind: str | None = None, offset: float | None = None,
        activation: str = "none", name: str = "", ranked: bool = False,
    ) -> QuantLinear:  # fmt: skip
        """A quantized layer that shares the parameters of `linear`; arguments and errors as QuantConv2d.from_float."""
        config = DuQConfig() if config is None else config
        check_plain_linear(linear, name)
        check_own_parameters(linear, name)
        settings = config.for_layer(name)
        kind, offset = settings.resolve_kind(kind, offset)
        input_quantizer, weight_quantizer = build_quantizers(linear, config, kind, offset, activation)
        layer = cls(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta", dtype=linear.weight.dtype,
            input_quantizer=input_quantizer, weight_quantizer=weight_quantizer, layer_name=name,
        )  # fmt: skip
        layer._adopt(linear)
        layer.ranked = ranked
        finish(layer, config, settings)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)
